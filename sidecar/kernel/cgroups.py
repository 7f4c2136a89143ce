"""The unified hierarchy: where it is mounted, an instance's cgroups, ids and paths.

`sidecar/<instance>/inspector` holds supervisor and workers and is never steered; `sidecar/<instance>/job` holds what `exec` runs.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import time
from pathlib import Path
from typing import Final

from sidecar.errors import PrerequisiteError

log = logging.getLogger(__name__)

PARENT: Final = "sidecar"
REMOVE_S: Final = 5.0
"""How long a cgroup is waited for whose processes are just exiting."""
MAX_NAMED: Final = 10
GONE: Final = (errno.ENOENT, errno.ENODEV)
"""A cgroup that has just been removed: its directory is not there, or a file in it that was open already says ENODEV."""
_POLL_S: Final = 0.02
_CREATE_ATTEMPTS: Final = 20


def cgroup2_mount() -> Path:
    """The mount point of cgroup2, from mountinfo(5). Raises PrerequisiteError where there is none."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.split(" ", 1)[0] == "cgroup2":
            return Path(fields.split(" ")[4])
    raise PrerequisiteError(
        "no cgroup2 file system is mounted",
        hint="mount -t cgroup2 none /sys/fs/cgroup/unified (or boot with systemd)",
    )


def instance_directory(instance: str) -> Path:
    return cgroup2_mount() / PARENT / instance


def create(instance: str) -> tuple[Path, Path]:
    """Make and return (inspector, job)."""
    directory = instance_directory(instance)
    inspector, job = directory / "inspector", directory / "job"
    try:
        for attempt in range(_CREATE_ATTEMPTS):
            try:
                inspector.mkdir(parents=True, exist_ok=True)
                job.mkdir(exist_ok=True)
                break
            except FileNotFoundError:  # the last other instance has just ended, and taken the parent with it
                if attempt == _CREATE_ATTEMPTS - 1:
                    raise
    except OSError as error:
        raise PrerequisiteError(
            f"cgroups cannot be created: {error}", hint="run as root, outside a read-only container"
        ) from error
    return inspector, job


def move(pid: int, cgroup: Path) -> None:
    (cgroup / "cgroup.procs").write_text(str(pid))


def identifier(cgroup: Path) -> int:
    """The cgroup's id as BPF sees it: the inode of its directory."""
    return cgroup.stat().st_ino


def processes(cgroup: Path) -> list[int]:
    try:
        return [int(line) for line in (cgroup / "cgroup.procs").read_text().split()]
    except OSError as error:
        if error.errno not in GONE:
            raise
        return []


def of(pid: int) -> str:
    """The cgroup2 path of a process, `/` at least."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return line[3:]
    return "/"


def populated(cgroup: Path) -> bool:
    """Whether a process lives in it or below it (cgroup.events); the root has no such file and always is."""
    try:
        return "populated 1" in (cgroup / "cgroup.events").read_text()
    except OSError as error:
        if error.errno not in GONE:
            raise
        return cgroup.is_dir()


def end_job(instance: str) -> None:
    """Kill what is left in an instance's job cgroup. To be called while its hooks still stand: nobody else steers these processes."""
    job = instance_directory(instance) / "job"
    if job.is_dir() and populated(job):
        _kill(job)


def end_inspector(instance: str) -> None:
    """Kill what is left of an instance's supervisor, workers and collector, except for the calling process."""
    inspector = instance_directory(instance) / "inspector"
    if os.getpid() in (members := processes(inspector)):
        _kill_each([pid for pid in members if pid != os.getpid()])
    elif inspector.is_dir() and populated(inspector):
        _kill(inspector)


def remove(instance: str, *, job_covered: bool = False) -> list[str]:
    """Remove an instance's cgroups. The calling process, where it is the inspector itself, goes back to the root; what else is in
    the inspector's is killed. Processes of the job go to the root only where an agent steers them there (`job_covered`); else they
    are killed. Repeated until the cgroups are gone, because a process that forks or is just
    exiting escapes a single look; what is left after REMOVE_S stays, and is named in the log. Returns what was removed."""
    root = cgroup2_mount()
    directory = root / PARENT / instance
    inspector, job = directory / "inspector", directory / "job"
    standing = [cgroup for cgroup in (inspector, job, directory) if cgroup.is_dir()]
    deadline = time.monotonic() + REMOVE_S
    while directory.is_dir():
        if os.getpid() in processes(inspector):
            move(os.getpid(), root)
        end_inspector(instance)
        if job_covered:
            _move_all(job, root)
        else:
            end_job(instance)
        _remove_tree(directory)
        if directory.is_dir():
            if time.monotonic() > deadline:
                log.warning("%s cannot be removed: %s", directory, _inhabitants(directory))
                break
            time.sleep(_POLL_S)
    _remove_tree(root / PARENT, and_below=False)
    return [f"cgroup {cgroup}" for cgroup in standing if not cgroup.is_dir()]


def _tree(cgroup: Path) -> list[Path]:
    """The cgroup and those below it, deepest first; empty where it is gone."""
    return [Path(path) for path, _, _ in os.walk(cgroup, topdown=False)]


def _move_all(cgroup: Path, to: Path) -> None:
    for member in _tree(cgroup):
        for pid in processes(member):
            with contextlib.suppress(ProcessLookupError):  # it has just exited
                move(pid, to)


def _remove_tree(cgroup: Path, *, and_below: bool = True) -> None:
    """As far as they are empty."""
    for directory in _tree(cgroup) if and_below else [cgroup]:
        try:
            os.rmdir(directory)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOENT):
                raise


def _inhabitants(cgroup: Path) -> str:
    pids = [pid for member in _tree(cgroup) for pid in processes(member)]
    return f"processes {pids[:MAX_NAMED]} are left in it" if pids else "something in it is still exiting"


def _kill(cgroup: Path) -> None:
    try:
        (cgroup / "cgroup.kill").write_text("1")
    except FileNotFoundError:  # before Linux 5.14
        for member in _tree(cgroup):
            _kill_each(processes(member))


def _kill_each(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def instances() -> list[str]:
    """Instances that have cgroups."""
    directory = cgroup2_mount() / PARENT
    return sorted(child.name for child in directory.iterdir() if child.is_dir()) if directory.is_dir() else []
