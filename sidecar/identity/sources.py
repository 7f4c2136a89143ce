"""Where a job's token is: in its own environment or file system, never the agent's.

The supervisor reads as root what a job chose to put somewhere, so that a file source is a confused deputy
waiting to happen. `token_file` explains what is accepted and why. Nothing here judges a token: that is
`verify`.
"""

from __future__ import annotations

import os
import pwd
import re
from dataclasses import dataclass
from typing import Final

from sidecar.attribution import procfs
from sidecar.config import SourceDocument
from sidecar.errors import IdentityError
from sidecar.identity.token_file import Reader, read_token_file
from sidecar.model.secret import Secret
from sidecar.model.workload import WorkloadContext

MAX_TOKEN_BYTES: Final = 65_536
MAX_STATUS_BYTES: Final = 1024 * 1024
"""65,536 supplementary groups fit in it."""
_PLACEHOLDER: Final = re.compile(r"\{([a-z]+)\}")
PLACEHOLDERS: Final = ("uid", "gid", "pid", "user")
_SAFE_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?")


@dataclass(frozen=True, slots=True)
class FoundToken:
    """`source` is the kind of source that yielded it."""

    token: Secret
    source: str


def find_token(sources: tuple[SourceDocument, ...], context: WorkloadContext) -> FoundToken | None:
    """The first source that yields a token wins; within a source the process itself, then its ancestors,
    nearest first.

    Raises IdentityError: `too_large`, `source_unsafe`.
    """
    for source in sources:
        if source.env is not None:
            text = _from_environ(source.env.name, context)
            if text:
                return FoundToken(_checked(text), "env")
        elif source.file is not None:
            text = _from_file(source.file.path, context)
            if text:
                return FoundToken(_checked(text), "file")
    return None


def _checked(text: str) -> Secret:
    if len(text) > MAX_TOKEN_BYTES:
        raise IdentityError(f"the token is larger than {MAX_TOKEN_BYTES} bytes", reason="too_large")
    return Secret(text)


def _from_environ(name: str, context: WorkloadContext) -> str | None:
    value = context.environ.get(name, "").strip()
    if value:
        return value
    for index, pid in enumerate(context.pids[1:], 1):
        raw = procfs.raw_environ(pid)
        if f"{name}=".encode() not in raw or not _unchanged(context, index):
            continue
        value = procfs.parse_environ(raw).get(name, "").strip()
        if value:
            return value
    return None


def _unchanged(context: WorkloadContext, index: int) -> bool:
    """Whether `pids[index]` is still the process that it was."""
    if index >= len(context.starts):
        return True
    stat = procfs.read_stat(context.pids[index])
    return stat is not None and stat.start_ticks == context.starts[index]


def _from_file(template: str, context: WorkloadContext) -> str | None:
    tried: set[tuple[str, Reader, tuple[int, int]]] = set()
    for index, pid in enumerate(context.pids):
        reader = _reader(pid)
        if reader is None:
            continue
        if index == 0:
            # the kernel's word on who connected stands above what the process became since
            reader = Reader(context.uid, context.gid, reader.groups)
        path = expand_path(template, pid, reader.uid, reader.gid)
        place = _root_of(pid)
        if path is None or place is None or (path, reader, place) in tried:
            continue
        tried.add((path, reader, place))
        text = read_token_file(pid, path, reader, MAX_TOKEN_BYTES)
        if text and _unchanged(context, index):
            return text
    return None


def _root_of(pid: int) -> tuple[int, int] | None:
    """What a path means to a process: its mount namespace and root directory, as inodes."""
    try:
        return os.stat(f"/proc/{pid}/ns/mnt").st_ino, os.stat(f"/proc/{pid}/root/").st_ino
    except OSError:
        return None


def _reader(pid: int) -> Reader | None:
    """Effective user, group and supplementary groups of a process, from /proc/<pid>/status; None where it is
    gone."""
    uid = gid = None
    groups: tuple[int, ...] = ()
    for line in procfs.read_bounded(f"/proc/{pid}/status", MAX_STATUS_BYTES).split(b"\n"):
        if line.startswith(b"Uid:"):
            uid = int(line.split()[2])
        elif line.startswith(b"Gid:"):
            gid = int(line.split()[2])
        elif line.startswith(b"Groups:"):
            groups = tuple(int(group) for group in line.split()[1:])
            break
    return Reader(uid, gid, groups) if uid is not None and gid is not None else None


def expand_path(template: str, pid: int, uid: int, gid: int) -> str | None:
    """`{uid}`, `{gid}`, `{pid}` and `{user}` filled in. None where the user has no name that is safe in a
    path.

    The values are digits, or a name that is checked: none can hold a separator, so that a path stays below
    its template.
    """
    values = {"uid": str(uid), "gid": str(gid), "pid": str(pid)}
    if "{user}" in template:
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError:
            return None
        if not _SAFE_USER.fullmatch(name):
            return None
        values["user"] = name
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


__all__ = ["MAX_TOKEN_BYTES", "FoundToken", "WorkloadContext", "expand_path", "find_token"]
