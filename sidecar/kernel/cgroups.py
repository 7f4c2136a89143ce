"""The unified hierarchy: where it is mounted, an instance's cgroups, ids and paths.

`sidecar/<instance>/inspector` holds supervisor and workers and is never steered; `sidecar/<instance>/job` holds what `exec` runs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from sidecar.errors import PrerequisiteError

PARENT: Final = "sidecar"


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


def remove(instance: str) -> list[str]:
    """Remove an instance's cgroups; processes that are left (our own) go back to the root. Returns what was removed."""
    root = cgroup2_mount()
    directory = root / PARENT / instance
    removed = []
    for child in (directory / "inspector", directory / "job", directory):
        if not child.is_dir():
            continue
        for pid in processes(child):
            try:
                move(pid, root)
            except OSError:
                continue
        for nested in sorted((p for p in child.rglob("*") if p.is_dir()), reverse=True):
            _rmdir(nested)
        if _rmdir(child):
            removed.append(f"cgroup {child}")
    _rmdir(root / PARENT)
    return removed


def _rmdir(directory: Path) -> bool:
    for _ in range(20):  # a process that has just exited is still counted for a moment
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            return False
        except OSError:
            if any(child.is_dir() for child in directory.iterdir()):
                return False
            time.sleep(0.02)
        else:
            return True
    return False


def instances() -> list[str]:
    """Instances that have cgroups."""
    directory = cgroup2_mount() / PARENT
    return sorted(child.name for child in directory.iterdir() if child.is_dir()) if directory.is_dir() else []
