"""What instances share outside their processes: /run/sidecar, its lock, its bpffs, and each instance's state file.

`steering.json` (root only) is the first thing that an instance makes and the last that goes. It says who the instance is, before there
is a cgroup, and what it is about to attach, before it does: whatever a crash leaves can be found, and is known to be dead.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from sidecar.errors import PrerequisiteError, SteeringError

RUN_DIRECTORY: Final = Path("/run/sidecar")
BPF_DIRECTORY: Final = RUN_DIRECTORY / "bpf"
"""A bpffs of our own: hosts differ in whether /sys/fs/bpf is mounted, and in who may read it."""
OWNERS_PIN: Final = BPF_DIRECTORY / "owners"
STATE_FILE: Final = "steering.json"
STATE_FILE_NEW: Final = "steering.new"
TLS_DIRECTORY: Final = "tls"
"""What an `exec` tells its command to trust."""
INSTANCE_NAME: Final = re.compile(r"[0-9a-f]{8}")
LOCK_FILE: Final = RUN_DIRECTORY / "lock"
_SAVE_ATTEMPTS: Final = 20

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def host_lock() -> Iterator[None]:
    """One instance at a time begins or ends: the last one to end takes the shared bpffs with it."""
    RUN_DIRECTORY.mkdir(mode=0o755, exist_ok=True)
    descriptor = os.open(LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def mount_bpf() -> None:
    """A bpffs at /run/sidecar/bpf, root only. Idempotent. By mount(2) itself: a mount(8) of ours could outlive us when we are killed,
    and mount what was just removed."""
    RUN_DIRECTORY.mkdir(mode=0o755, exist_ok=True)
    BPF_DIRECTORY.mkdir(mode=0o700, exist_ok=True)
    if os.path.ismount(BPF_DIRECTORY):
        return
    if _libc.mount(b"sidecar", os.fsencode(BPF_DIRECTORY), b"bpf", ctypes.c_ulong(0), b"mode=0700") != 0:
        reason = os.strerror(ctypes.get_errno())
        raise SteeringError(f"a BPF file system cannot be mounted: {reason}", hint="sidecar doctor")


def start_ticks(pid: int) -> int:
    """When the process began (proc_pid_stat(5), starttime); 0 where it is gone, or has ended and is not reaped (as for ever in
    a container whose first process reaps nobody)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if state in "ZX" else int(fields[18])


def run_directories() -> list[str]:
    """Names of all instances that have a run directory, live or dead."""
    if not RUN_DIRECTORY.is_dir():
        return []
    return sorted(entry.name for entry in RUN_DIRECTORY.iterdir() if INSTANCE_NAME.fullmatch(entry.name))


def save(
    instance: str,
    *,
    scopes: Sequence[str] | None = None,
    table: str = "",
    owned: Sequence[int] = (),
    attached: Sequence[tuple[str, str, int]] = (),
) -> None:
    """Write the state of `instance`, which this process is.

    `scopes`: cgroups that it steers for the whole host, None for an `exec`; `table`: its nft table; `owned`: ids of cgroups in the shared
    map; `attached`: (hook, cgroup, program id). Raises OSError.
    """
    state = {
        "pid": os.getpid(),
        "started": start_ticks(os.getpid()),
        "netns": _netns(),
        "scopes": scopes,
        "table": table,
        "owned": owned,
        "attached": attached,
    }
    directory = RUN_DIRECTORY / instance
    for attempt in range(_SAVE_ATTEMPTS):
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        try:
            _write(directory, json.dumps(state))
            return
        except (
            FileNotFoundError
        ):  # a `down` has just taken the directory for one that a crash left: there was no state in it yet
            if attempt == _SAVE_ATTEMPTS - 1:
                raise


def claim(instance: str, scopes: Sequence[Path]) -> None:
    """Begin as the agent that steers `scopes`, cgroups, for the whole host; none: what only `exec` steers.

    Raises PrerequisiteError where a live agent of this network namespace steers one of them, or above or below it: both would mark the
    same connections, and neither record would be whole. A dead one is no hindrance: its successor takes over.
    """
    with host_lock():
        for name, state in states().items():
            theirs = state.get("scopes")
            if not isinstance(theirs, list) or not alive(state) or state.get("netns") != _netns():
                continue
            shared = _overlap([Path(str(scope)) for scope in theirs], scopes)
            if shared is not None:
                raise PrerequisiteError(
                    f"instance {name} (pid {state['pid']}) steers {shared} already",
                    hint=f"one agent a scope. sidecar status; to end that one: sidecar down --instance {name}",
                )
        save(instance, scopes=[str(scope) for scope in scopes])


def _overlap(theirs: Sequence[Path], ours: Sequence[Path]) -> str | None:
    """Theirs that covers, or lies in, one of ours, in words."""
    if not theirs and not ours:
        return "scope exec"
    for there in theirs:
        if any(there.is_relative_to(here) or here.is_relative_to(there) for here in ours):
            return f"the cgroup {there}"
    return None


def _netns() -> str:
    return os.readlink("/proc/self/ns/net")


def _write(directory: Path, text: str) -> None:
    temporary = directory / STATE_FILE_NEW
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    temporary.replace(directory / STATE_FILE)


def end(instance: str) -> None:
    """The instance is over and nothing else of it is left. Idempotent."""
    forget(instance)
    unmount_if_unused()


def forget(instance: str) -> None:
    """Remove the state, and the directory where nothing else is in it."""
    (RUN_DIRECTORY / instance / STATE_FILE).unlink(missing_ok=True)
    clear(instance)


def clear(instance: str) -> None:
    """Remove the run directory where there is no state in it. One that is just beginning makes it again."""
    directory = RUN_DIRECTORY / instance
    (directory / STATE_FILE_NEW).unlink(missing_ok=True)
    shutil.rmtree(directory / TLS_DIRECTORY, ignore_errors=True)
    with contextlib.suppress(OSError):  # somebody's state or socket is in it, or it is gone
        directory.rmdir()


def states() -> dict[str, dict[str, object]]:
    found = {}
    if not RUN_DIRECTORY.is_dir():
        return {}
    for path in RUN_DIRECTORY.glob(f"*/{STATE_FILE}"):
        try:
            found[path.parent.name] = json.loads(path.read_text())
        except FileNotFoundError:
            continue  # it has just ended
        except json.JSONDecodeError:
            found[path.parent.name] = {}
    return found


def alive(state: dict[str, object]) -> bool:
    pid = state.get("pid")
    return isinstance(pid, int) and start_ticks(pid) == state.get("started") != 0


def unmount_if_unused() -> None:
    """The bpffs and its map go with the last instance."""
    with host_lock():
        _unmount()


def _unmount() -> None:
    if states() or not os.path.ismount(BPF_DIRECTORY):
        return
    OWNERS_PIN.unlink(missing_ok=True)
    _libc.umount2(
        os.fsencode(BPF_DIRECTORY), 0
    )  # EBUSY: somebody looks at it; the next one to end tries again
    with contextlib.suppress(OSError):
        BPF_DIRECTORY.rmdir()
