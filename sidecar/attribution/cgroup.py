"""cgroup ids to paths, and what a path says: systemd unit, container.

The kernel hook notes a cgroup's id, which is never used twice, so that a path once learnt stays right. An id
is opened by file handle (name_to_handle_at(2); a cgroup2 handle is its 8-byte id), which costs the same on a
host with ten thousand cgroups; a walk of the hierarchy is the fallback where that is not permitted.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
from pathlib import Path
from typing import Final

from sidecar.attribution import procfs
from sidecar.model.workload import Container

MAX_KNOWN: Final = 8192
MAX_WALKED: Final = 20_000
"""Directories looked at in one fallback walk."""
_FILEID_KERNFS: Final = 0xFE
"""include/linux/exportfs.h; since Linux 5.5 kernfs ids are 64 bits wide and are the inode number."""

_CONTAINER: Final = re.compile(
    r"(?:^|/)(?:(?:docker|cri-containerd|containerd|crio|libpod|nerdctl)[-:])?(?:[\w.-]+:cri-containerd:)?([0-9a-f]{64})(?:\.scope)?(?=/|$)"
)
_LXC: Final = re.compile(
    r"(?:^|/)(?:lxc\.payload[./]|lxc/|machine\.slice/machine-)([\w.\\-]+?)(?:\.scope)?(?=/|$)"
)
_UNIT: Final = re.compile(r"(?:^|/)([^/]+\.(?:service|scope))(?=/|$)")
_ESCAPED: Final = re.compile(r"\\x([0-9a-f]{2})")


def mount_point() -> Path | None:
    """Where cgroup2 is mounted (mountinfo); None where it is not."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.split(" ", 1)[0] == "cgroup2":
            return Path(fields.split(" ")[4].replace("\\040", " "))
    return None


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("id", ctypes.c_ubyte * 8),
    )


class CgroupPaths:
    """Looks an id up, and remembers within a bound. Thread-safe."""

    def __init__(self) -> None:
        self._mount = mount_point()
        self._known: dict[int, str] = {}
        self._lock = threading.Lock()
        self._libc = ctypes.CDLL(None, use_errno=True)

    def path(self, cgroup_id: int, pid: int = 0) -> str:
        """The path in the unified hierarchy, from `/`; empty where the cgroup is gone and was never seen.

        `pid` may hold a process that was in it at connect; only consulted where the kernel does not open
        handles.
        """
        known = self._known.get(cgroup_id)
        if known is not None:
            return known
        if self._mount is None or cgroup_id <= 0:
            return ""
        found = self._by_handle(cgroup_id)
        if found is None:
            found = self._by_process(cgroup_id, pid) or self._by_walk(cgroup_id)
        return self._remember(cgroup_id, found) if found else ""

    def _by_handle(self, cgroup_id: int) -> str | None:
        """Empty where the cgroup is gone, None where handles cannot be opened here."""
        assert self._mount is not None
        handle = _FileHandle(
            8, _FILEID_KERNFS, (ctypes.c_ubyte * 8).from_buffer_copy(cgroup_id.to_bytes(8, "little"))
        )
        try:
            mount = os.open(self._mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            descriptor = self._libc.open_by_handle_at(mount, ctypes.byref(handle), os.O_PATH | os.O_CLOEXEC)
            if descriptor < 0:
                return "" if ctypes.get_errno() == errno.ESTALE else None
            try:
                target = os.readlink(f"/proc/self/fd/{descriptor}")
                identity = os.fstat(descriptor).st_ino
            finally:
                os.close(descriptor)
        except OSError:
            return None
        finally:
            os.close(mount)
        if identity != cgroup_id:
            return None
        mount_text = str(self._mount)
        if target != mount_text and not target.startswith(mount_text + "/"):
            return None  # outside what is mounted here: an agent in a container sees a part of the hierarchy
        return target[len(mount_text) :] or "/"

    def _by_process(self, cgroup_id: int, pid: int) -> str:
        own = unified_path(procfs.cgroup_text(pid)) if pid > 0 else ""
        try:
            return own if own and os.stat(f"{self._mount}{own}").st_ino == cgroup_id else ""
        except OSError:
            return ""

    def _by_walk(self, cgroup_id: int) -> str:
        assert self._mount is not None
        for walked, (directory, _, _) in enumerate(os.walk(self._mount)):
            if walked > MAX_WALKED:
                break
            try:
                if os.stat(directory).st_ino == cgroup_id:
                    return directory[len(str(self._mount)) :] or "/"
            except OSError:
                continue  # removed while we walked
        return ""

    def _remember(self, cgroup_id: int, path: str) -> str:
        path = path.removesuffix(DELETED)
        with self._lock:
            while len(self._known) >= MAX_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[cgroup_id] = path
        return path


DELETED: Final = procfs.DELETED


def unified_path(text: str) -> str:
    """Of /proc/<pid>/cgroup: the path in the unified hierarchy (line `0::`), empty where there is none."""
    for line in text.splitlines():
        if line.startswith("0::"):
            return line[3:].removesuffix(DELETED)
    return ""


def naming_paths(text: str) -> tuple[str, ...]:
    """Of /proc/<pid>/cgroup: the paths that name units and containers, most telling first.

    On a unified host there is one. On a hybrid or v1 host systemd's own hierarchy names the unit and the
    engines use every controller's, while the unified path may be `/`.
    """
    unified, systemd, others = "", "", []
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        path = path.removesuffix(DELETED)
        if number == "0" and not controllers:
            unified = path
        elif controllers == "name=systemd":
            systemd = path
        else:
            others.append(path)
    return tuple(dict.fromkeys(path for path in (unified, systemd, *others) if path and path != "/"))


def unit_of(*paths: str) -> str:
    """The innermost systemd service or scope that a path names, unescaped; empty where none does."""
    for path in paths:
        found = _UNIT.findall(path)
        if found:
            return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), str(found[-1]))
    return ""


def container_of(*paths: str) -> Container | None:
    """The innermost container that a path names: Docker, containerd, CRI-O, Podman (64 hex digits) or LXC (a
    name).

    `libpod-conmon-<id>.scope` holds the monitor, which runs outside, and is no container.
    """
    for path in paths:
        found = _CONTAINER.findall(path) or _LXC.findall(path)
        if found:
            return Container(id=str(found[-1]))
    return None
