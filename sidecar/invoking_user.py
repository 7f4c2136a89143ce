"""Who really runs `sidecar exec`: plain root, or the person behind sudo, with the environment they had.

sudo replaces the environment, so the caller's own is read from the nearest sudo process above us. What was
set on top of it on purpose (`sudo NAME=value …`, or by a script that sudo runs) wins, except for the names
that describe the target user of sudo and not the caller.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sidecar.errors import ControlError

MAX_ANCESTORS: Final = 64
OF_THE_TARGET_USER: Final = frozenset(
    {"HOME", "LOGNAME", "MAIL", "PATH", "SHELL", "USER", "USERNAME", "XDG_RUNTIME_DIR"}
)
"""sudo sets these for root; the caller's own values count."""


@dataclass(frozen=True, slots=True)
class InvokingUser:
    """Identity and environment for the command. The environment holds secrets: it is never shown."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    environ: Mapping[str, str] = field(repr=False, hash=False)

    @property
    def through_sudo(self) -> bool:
        return self.uid != os.getuid()


def invoking_user(environ: Mapping[str, str] | None = None) -> InvokingUser:
    """The caller. `environ` stands for our own environment (`os.environ`).

    Only root is believed about `SUDO_UID`: anybody else is just who they are. Raises ControlError where
    sudo's variables are not numbers.
    """
    own = dict(environ) if environ is not None else _own_environment()
    uid_text = own.get("SUDO_UID", "")
    if os.geteuid() != 0 or not uid_text or uid_text == "0":
        return InvokingUser(_name(os.getuid()), os.getuid(), os.getgid(), tuple(os.getgroups()), own)
    try:
        uid, gid = int(uid_text), int(own.get("SUDO_GID", ""))
        if uid < 0 or gid < 0:
            raise ValueError(uid_text)
    except ValueError as error:
        raise ControlError(
            "SUDO_UID and SUDO_GID are not numbers", hint="run through sudo, or unset them to run as root"
        ) from error
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        name, home, shell, groups = str(uid), "/", "/bin/sh", [gid]
    else:
        name, home, shell = account.pw_name, account.pw_dir, account.pw_shell or "/bin/sh"
        groups = os.getgrouplist(name, gid)
    before = _environment_before_sudo()
    return InvokingUser(
        name, uid, gid, tuple(groups), merge_environment(before, own, name=name, home=home, shell=shell)
    )


def merge_environment(
    before: Mapping[str, str] | None, own: Mapping[str, str], *, name: str, home: str, shell: str
) -> dict[str, str]:
    """The caller's environment `before` sudo (None: unknown), with what was set on purpose since, from our
    `own`."""
    kept = {
        key: value
        for key, value in own.items()
        if key not in OF_THE_TARGET_USER and not key.startswith("SUDO_")
    }
    identity = {"HOME": home, "LOGNAME": name, "USER": name, "SHELL": shell}
    path = {"PATH": own["PATH"]} if "PATH" in own else {}
    return {**identity, **path, **(before or {}), **kept}


def _own_environment() -> dict[str, str]:
    """Ours, without the LC_CTYPE that Python sets for itself in the C locale (PEP 538)."""
    own = dict(os.environ)
    try:
        given = _parse_environ(Path("/proc/self/environ").read_bytes())
    except OSError:
        return own
    if "LC_CTYPE" not in given:
        own.pop("LC_CTYPE", None)
    return own


def _environment_before_sudo() -> dict[str, str] | None:
    """The environment with which the nearest sudo above us was started."""
    pid = os.getppid()
    for _ in range(MAX_ANCESTORS):
        if pid <= 1:
            return None
        process = Path("/proc") / str(pid)
        try:
            if os.readlink(process / "exe").rsplit("/", 1)[-1] == "sudo":
                return _parse_environ((process / "environ").read_bytes())
            pid = int((process / "stat").read_bytes().rsplit(b")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            return None
    return None


def _parse_environ(raw: bytes) -> dict[str, str]:
    pairs = (entry.partition(b"=") for entry in raw.split(b"\0"))
    return {os.fsdecode(key): os.fsdecode(value) for key, sep, value in pairs if sep and key}


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
