"""cgroup ids to paths, and what a path says: systemd unit, container."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from sidecar.model.workload import Container

MAX_KNOWN: Final = 8192
_CONTAINER: Final = re.compile(r"(?:^|/)(?:docker[-/]|libpod-|cri-containerd-|crio-)?([0-9a-f]{64})(?:\.scope)?(?:/|$)")
_UNIT: Final = re.compile(r"/([^/]+\.(?:service|scope|slice))(?=/|$)")


def mount_point() -> Path | None:
    """Where cgroup2 is mounted (mountinfo)."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.split(" ", 1)[0] == "cgroup2":
            return Path(fields.split(" ")[4])
    return None


class CgroupPaths:
    """Looks an id up: first by the process's own cgroup, else by walking the hierarchy. Remembers, within a bound."""

    def __init__(self) -> None:
        self._mount = mount_point()
        self._known: dict[int, str] = {}

    def path(self, cgroup_id: int, pid: int) -> str:
        """The path in the unified hierarchy; empty where the cgroup is gone and was never seen."""
        known = self._known.get(cgroup_id)
        if known is not None:
            return known
        own = path_of(pid)
        if own and self._identifier(own) == cgroup_id:
            return self._remember(cgroup_id, own)
        if self._mount is not None:
            for directory, _, _ in os.walk(self._mount):
                try:
                    if os.stat(directory).st_ino == cgroup_id:
                        relative = "/" + os.path.relpath(directory, self._mount)
                        return self._remember(cgroup_id, "/" if relative == "/." else relative)
                except OSError:
                    continue
        return ""

    def _identifier(self, path: str) -> int:
        if self._mount is None:
            return 0
        try:
            return os.stat(str(self._mount) + path).st_ino
        except OSError:
            return 0

    def _remember(self, cgroup_id: int, path: str) -> str:
        if len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[cgroup_id] = path
        return path


def path_of(pid: int) -> str:
    try:
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return line[3:]
    except OSError:
        return ""
    return ""


def unit_of(path: str) -> str:
    found = _UNIT.findall(path)
    return found[-1] if found else ""


def container_of(path: str) -> Container | None:
    match = _CONTAINER.search(path)
    return Container(id=match[1]) if match else None
