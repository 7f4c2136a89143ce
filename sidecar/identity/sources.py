"""Where a job's token is: in its own environment or file system, never the agent's.

Files are resolved below the process's own root (/proc/<pid>/root) and must be small regular files; a link, device or fifo that
a job puts there gains nothing, because the supervisor only reads a token that then has to verify.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from sidecar.attribution import procfs
from sidecar.config import SourceDocument
from sidecar.errors import IdentityError
from sidecar.model.secret import Secret

MAX_TOKEN_BYTES: Final = 65_536


@dataclass(frozen=True, slots=True)
class WorkloadContext:
    """`pids`: the process, its parent, … up to the job's root, nearest first, pid 1 excluded. `environ` is the process's own."""

    pids: tuple[int, ...]
    uid: int
    environ: Mapping[str, str] = field(repr=False, hash=False)


@dataclass(frozen=True, slots=True)
class FoundToken:
    token: Secret
    source: str


def find_token(sources: tuple[SourceDocument, ...], context: WorkloadContext) -> FoundToken | None:
    """The first source that yields a token wins. Raises IdentityError(`too_large`)."""
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
    return Secret(text.strip())


def _from_environ(name: str, context: WorkloadContext) -> str | None:
    value = context.environ.get(name)
    if value:
        return value
    for pid in context.pids[1:]:
        value = procfs.environ(pid).get(name)
        if value:
            return value
    return None


def _from_file(template: str, context: WorkloadContext) -> str | None:
    for pid in context.pids:
        path = template.replace("{uid}", str(context.uid)).replace("{pid}", str(pid))
        text = _read_token(f"/proc/{pid}/root/{path.lstrip('/')}")
        if text:
            return text
        if "{pid}" not in template:
            break
    return None


def _read_token(path: str) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            return None
        if facts.st_size > MAX_TOKEN_BYTES:
            raise IdentityError(f"the token is larger than {MAX_TOKEN_BYTES} bytes", reason="too_large")
        return os.read(descriptor, MAX_TOKEN_BYTES).decode("ascii", errors="replace")
    except OSError:
        return None
    finally:
        os.close(descriptor)
