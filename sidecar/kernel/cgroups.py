"""The unified hierarchy: where it is mounted, an instance's cgroups, ids and paths.

`sidecar/<instance>/inspector` holds supervisor and workers and is never steered; `sidecar/<instance>/job` holds what `exec` runs.
"""

from __future__ import annotations

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
        inspector.mkdir(parents=True, exist_ok=True)
        job.mkdir(exist_ok=True)
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
    except OSError:
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
    except FileNotFoundError:
        return cgroup.is_dir()


def end_job(instance: str) -> None:
    """Kill what is left in an instance's job cgroup. To be called while its hooks still stand: nobody else steers these processes."""
    job = instance_directory(instance) / "job"
    if job.is_dir() and populated(job):
        _kill(job)


def remove(instance: str, *, job_covered: bool = False) -> list[str]:
    """Remove an instance's cgroups. Our own processes go back to the root. Those of the job do so only where an agent steers them
    there (`job_covered`); else they are killed, and where that does not help the cgroup stays, and is named in the log.
    Returns what was removed."""
    root = cgroup2_mount()
    directory = root / PARENT / instance
    if not job_covered:
        end_job(instance)
    removed = []
    for child in (directory / "inspector", directory / "job", directory):
        if not child.is_dir():
            continue
        if child.name == "inspector" or (child.name == "job" and job_covered):
            for cgroup in (child, *(path for path in child.rglob("*") if path.is_dir())):
                for pid in processes(cgroup):
                    try:
                        move(pid, root)
                    except OSError:
                        continue  # it has just exited
        for nested in sorted((p for p in child.rglob("*") if p.is_dir()), reverse=True):
            _rmdir(nested)
        if _rmdir(child):
            removed.append(f"cgroup {child}")
        elif child.is_dir():
            log.warning(
                "%s cannot be removed: processes %s are left in it", child, processes(child) or "below it"
            )
    _rmdir(root / PARENT)
    return removed


def _kill(cgroup: Path) -> None:
    try:
        (cgroup / "cgroup.kill").write_text("1")
    except FileNotFoundError:  # before Linux 5.14
        for members in (cgroup / "cgroup.procs", *cgroup.glob("**/cgroup.procs")):
            for pid in processes(members.parent):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def _rmdir(directory: Path) -> bool:
    """Waits for processes that are just exiting; False where it is not there, has cgroups below it, or stays populated."""
    deadline = time.monotonic() + REMOVE_S
    while True:
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            return False
        except OSError:
            if any(child.is_dir() for child in directory.iterdir()) or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def instances() -> list[str]:
    """Instances that have cgroups."""
    directory = cgroup2_mount() / PARENT
    return sorted(child.name for child in directory.iterdir() if child.is_dir()) if directory.is_dir() else []
