"""Processes as /proc shows them. Every read is bounded, and a process that vanishes is an answer, not an error.

Source: proc(5). Start times are in clock ticks since boot and tell a reused pid apart.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.model.origin import Process

MAX_CMDLINE_BYTES: Final = 65_536
MAX_ENVIRON_BYTES: Final = 2 * 1024 * 1024
MAX_ANCESTORS: Final = 32
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")

MASK: Final = "****"
_SECRET_NAME = r"(?:password|passwd|pwd|secret|token|api[-_]?key|access[-_]?key|auth|credential|private[-_]?key|pgpassword|mysql_pwd)"
_OPTION: Final = re.compile(rf"(?i)^(-{{0,2}}[\w.-]*{_SECRET_NAME}[\w.-]*)([=:])(.+)$", re.DOTALL)
_NAME_ONLY: Final = re.compile(rf"(?i)^--?[\w-]*{_SECRET_NAME}[\w-]*$")
_URL: Final = re.compile(r"(?i)([a-z][a-z0-9+.-]*://[^/\s:@]*:)([^@\s/]+)(@)")
_CONNINFO: Final = re.compile(r"(?i)\b(password\s*=\s*)('(?:[^'\\]|\\.)*'|\S+)")
_QUERY: Final = re.compile(rf"(?i)([?&]{_SECRET_NAME}=)([^&\s]+)")
_HEADER: Final = re.compile(r"(?i)^((?:proxy-)?authorization|cookie|x-api-key|x-auth-token)(\s*:\s*)(.+)$", re.DOTALL)
_JWT: Final = re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*")
_MYSQL: Final = re.compile(r"^-p\S+$")


def redact_cmdline(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The command line without passwords, tokens and keys, as far as their form can be known."""
    found: list[str] = []
    hide_next = False
    mysql = bool(arguments) and os.path.basename(arguments[0]).startswith(("mysql", "mariadb"))
    user_follows = False
    for argument in arguments:
        if hide_next:
            found.append(MASK)
            hide_next = False
            continue
        if user_follows:
            found.append(argument.partition(":")[0] + (":" + MASK if ":" in argument else ""))
            user_follows = False
            continue
        if mysql and _MYSQL.match(argument):
            found.append("-p" + MASK)
            continue
        if _NAME_ONLY.match(argument):
            hide_next = True
            found.append(argument)
            continue
        user_follows = argument in ("-u", "--user", "--proxy-user") and os.path.basename(arguments[0]).startswith("curl")
        text = _URL.sub(rf"\1{MASK}\3", argument)
        text = _CONNINFO.sub(rf"\1{MASK}", text)
        text = _QUERY.sub(rf"\1{MASK}", text)
        text = _HEADER.sub(rf"\1\2{MASK}", text)
        text = _OPTION.sub(rf"\1\2{MASK}", text) if "://" not in text else text
        found.append(_JWT.sub(MASK, text))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Stat:
    ppid: int
    start_ticks: int
    comm: str
    session: int


def read_stat(pid: int) -> Stat | None:
    """None where the process is gone."""
    try:
        raw = Path(f"/proc/{pid}/stat").read_bytes()
        head, _, tail = raw.rpartition(b")")
        fields = tail.split()
        return Stat(
            ppid=int(fields[1]),
            start_ticks=int(fields[19]),
            comm=head.partition(b"(")[2].decode(errors="replace"),
            session=int(fields[3]),
        )
    except (OSError, IndexError, ValueError):
        return None


def _read(path: str, limit: int) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        chunks, size = [], 0
        while size < limit:
            chunk = os.read(descriptor, min(65_536, limit - size))
            if not chunk:
                break
            chunks.append(chunk)
            size += len(chunk)
        return b"".join(chunks)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def raw_cmdline(pid: int) -> tuple[str, ...]:
    raw = _read(f"/proc/{pid}/cmdline", MAX_CMDLINE_BYTES)
    return tuple(part.decode(errors="replace") for part in raw.rstrip(b"\0").split(b"\0")) if raw else ()


def environ(pid: int) -> dict[str, str]:
    """The environment the process was started with; empty where it is gone or larger than MAX_ENVIRON_BYTES allows to read."""
    raw = _read(f"/proc/{pid}/environ", MAX_ENVIRON_BYTES)
    pairs = (entry.partition(b"=") for entry in raw.split(b"\0"))
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, sep, value in pairs if sep and key}


def exe(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


def netns(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


def process(pid: int) -> Process | None:
    stat = read_stat(pid)
    if stat is None:
        return None
    return Process(
        pid=pid, comm=stat.comm, exe=exe(pid), cmdline=redact_cmdline(raw_cmdline(pid)), start_ticks=stat.start_ticks
    )


def ancestors(pid: int) -> tuple[Process, ...]:
    """Parent, grandparent, … up to pid 1, at most MAX_ANCESTORS."""
    found: list[Process] = []
    stat = read_stat(pid)
    while stat is not None and stat.ppid > 0 and len(found) < MAX_ANCESTORS:
        parent = process(stat.ppid)
        if parent is None:
            break
        found.append(parent)
        stat = read_stat(parent.pid)
    return tuple(found)
