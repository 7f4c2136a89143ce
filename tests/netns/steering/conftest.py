"""A far host, what dials it, and where: shared by the tests of steering."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.far_end import FarEnd
from tests.support.far_host import FarHost

PORT, OPEN_PORT = 15432, 15999
PRELUDE = """
import ctypes, os, socket, sys, time
FAR, FAR6, DEVICE = sys.argv[1:4]
FAR4, FAR6 = (FAR, 15432), (FAR6, 15432)
socket.setdefaulttimeout(4)
def say(s): s.settimeout(4); print(s.recv(16).decode()); s.sendall(b'x')
try:
"""
EPILOGUE = """
except OSError as error:
    print(type(error).__name__)
"""

Dial = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def host() -> Iterator[FarHost]:
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    with FarHost() as host:
        yield host


@pytest.fixture(scope="module")
def far(host: FarHost) -> Iterator[FarEnd]:
    with FarEnd(host, (PORT, OPEN_PORT)) as far:
        yield far


@pytest.fixture
def dial(host: FarHost) -> Dial:
    """Start Python statements in the near namespace, in a cgroup, as a uid. What they print last is the outcome: a greeting, or
    the name of the error."""

    def start(cgroup: Path, code: str, *, uid: int = 0, **more: Any) -> subprocess.Popen[str]:
        body = "".join(f"    {line}\n" for line in code.strip().splitlines())

        def enter() -> None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))

        command = [sys.executable, "-c", PRELUDE + body + EPILOGUE]
        if uid:
            command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--", *command]
        return host.popen(
            host.near,
            [*command, host.far_address, host.far_address6, f"{host.interface}n"],
            preexec_fn=enter,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **more,
        )

    return start


def outcome(process: subprocess.Popen[str]) -> str:
    said = process.communicate(timeout=20)[0].strip()
    return said.splitlines()[-1] if said else ""
