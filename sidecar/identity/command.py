"""A token from a program of the administrator's: it is told which process it is about, and prints the token or nothing.

It runs as the agent does, outside of any job: in a clean environment, without standard input, with a time limit. The program has to
be root's, on the whole way there, so that no job can put one in its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import signal
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.config_document import CommandSource
from sidecar.documents import parse_duration
from sidecar.errors import IdentityError
from sidecar.identity.compact import MAX_TOKEN_BYTES
from sidecar.model.secret import Secret
from sidecar.model.workload import WorkloadContext

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class CommandQuestion:
    """One run. `facts` are what it is told, as environment variables: SIDECAR_PID, SIDECAR_UID, SIDECAR_GID, and SIDECAR_START, the
    process's start time in clock ticks since boot, by which a pid that was used again can be told apart."""

    argv: tuple[str, ...]
    timeout_s: float
    facts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, source: CommandSource, context: WorkloadContext) -> CommandQuestion | None:
        """None where the process has gone: there is nothing that the program could look at. Raises IdentityError:
        `source_unsafe`."""
        if not context.pids:
            return None
        _check_program(Path(source.argv[0]))
        facts = {
            "SIDECAR_PID": context.pids[0],
            "SIDECAR_UID": context.uid,
            "SIDECAR_GID": context.gid,
            "SIDECAR_START": context.starts[0] if context.starts else 0,
        }
        return cls(
            source.argv,
            parse_duration(source.timeout),
            tuple((name, str(value)) for name, value in facts.items()),
        )

    @property
    def place(self) -> str:
        return self.argv[0]

    def key(self) -> bytes:
        return hashlib.sha256(repr((self.argv, self.facts)).encode("utf-8", "surrogateescape")).digest()

    def ask(self) -> Secret | None:
        """Raises OSError where it cannot be started, ValueError where it fails or says too much."""
        process = subprocess.Popen(
            self.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": PATH, "LANG": "C.UTF-8", **dict(self.facts)},
            cwd="/",
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            with process.stdout:
                output = _read(process.stdout.fileno(), time.monotonic() + self.timeout_s)
            status = process.wait(1.0)
        except subprocess.TimeoutExpired:
            raise ValueError("it closed its output and goes on") from None
        finally:
            _end(process)
        if status != 0:
            raise ValueError(f"exit status {status}")
        try:
            text = output.decode("ascii").strip()
        except UnicodeDecodeError:
            raise ValueError("what it prints is no token") from None
        return Secret(text) if text else None


def _read(descriptor: int, deadline: float) -> bytes:
    found = bytearray()
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            raise ValueError("it does not end in time")
        chunk = os.read(descriptor, 65_536)
        if not chunk:
            return bytes(found)
        found += chunk
        if len(found) > MAX_TOKEN_BYTES:
            raise ValueError(f"it prints more than {MAX_TOKEN_BYTES} bytes")


def _end(process: subprocess.Popen[bytes]) -> None:
    """With everything that it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _check_program(path: Path) -> None:
    """Raises IdentityError: `source_unsafe`, where anybody but root could have put it there."""
    try:
        real = path.resolve(strict=True)
        for place in (real, *real.parents):
            facts = place.stat()
            sticky = stat.S_ISDIR(facts.st_mode) and facts.st_mode & stat.S_ISVTX
            if facts.st_uid != 0 or (facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky):
                raise IdentityError(
                    f"{path}: {place} can be changed by others than root", reason="source_unsafe"
                )
    except (OSError, RuntimeError) as error:
        raise IdentityError(f"{path} cannot be run: {error}", reason="source_unavailable") from error
