"""What instances share outside their processes: /run/sidecar, its lock, its bpffs, and each instance's state file.

`steering.json` (root only) says what an instance is about to attach, before it does: what a crash leaves can be removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sidecar.errors import SteeringError

RUN_DIRECTORY: Final = Path("/run/sidecar")
BPF_DIRECTORY: Final = RUN_DIRECTORY / "bpf"
"""A bpffs of our own: hosts differ in whether /sys/fs/bpf is mounted, and in who may read it."""
OWNERS_PIN: Final = BPF_DIRECTORY / "owners"
STATE_FILE: Final = "steering.json"
STATE_FILE_NEW: Final = "steering.new"
INSTANCE_NAME: Final = re.compile(r"[0-9a-f]{8}")
LOCK_FILE: Final = RUN_DIRECTORY / "lock"


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
    """A bpffs at /run/sidecar/bpf, root only. Idempotent."""
    RUN_DIRECTORY.mkdir(mode=0o755, exist_ok=True)
    BPF_DIRECTORY.mkdir(mode=0o700, exist_ok=True)
    if not os.path.ismount(BPF_DIRECTORY):
        done = subprocess.run(
            ["mount", "-t", "bpf", "-o", "mode=0700", "sidecar", str(BPF_DIRECTORY)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SteeringError(
                f"a BPF file system cannot be mounted: {done.stderr.strip()}", hint="sidecar doctor"
            )


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


def forget(instance: str) -> None:
    directory = RUN_DIRECTORY / instance
    for name in (STATE_FILE, STATE_FILE_NEW):
        (directory / name).unlink(missing_ok=True)
    if directory.is_dir() and not any(directory.iterdir()):
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
    subprocess.run(["umount", str(BPF_DIRECTORY)], capture_output=True, check=False)
    with contextlib.suppress(OSError):
        BPF_DIRECTORY.rmdir()
