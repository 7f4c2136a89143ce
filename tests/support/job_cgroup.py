"""A cgroup of the unified hierarchy for one test, removed with everything in it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def unified_mount() -> Path:
    """Where cgroup2 is mounted, as mountinfo says."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.split()[0] == "cgroup2":
            return Path(fields.split()[4])
    pytest.fail("cgroup2 is not mounted")


@contextlib.contextmanager
def job_cgroup() -> Iterator[Path]:
    directory = unified_mount() / f"sidecar-test-{secrets.token_hex(4)}" / "job"
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and members(directory):
            for pid in members(directory):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        directory.rmdir()
        directory.parent.rmdir()


def members(directory: Path) -> list[int]:
    return [int(line) for line in (directory / "cgroup.procs").read_text().split()]
