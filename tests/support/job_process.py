"""Real child processes of other users, in their own places, to be attributed and identified."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_WAITS = "import sys; sys.stdout.write('r'); sys.stdout.flush(); sys.stdin.read()"
_PARENT = """
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}
)
child.stdout.read(1)
sys.stdout.write(f"{child.pid}\\n")
sys.stdout.flush()
sys.stdin.read()
child.communicate()
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """What kernel.steering.SocketOrigin says."""

    pid: int
    tgid: int
    uid: int
    gid: int
    comm: str
    cgroup_id: int
    netns_cookie: int
    ktime_ns: int


def seen(pid: int, *, uid: int = 0, gid: int = 0, cgroup_id: int = 1, ktime_ns: int | None = None) -> Seen:
    """A connect by `pid`, now unless told otherwise."""
    return Seen(
        pid, pid, uid, gid, "job", cgroup_id, 1, time.monotonic_ns() if ktime_ns is None else ktime_ns
    )


@contextmanager
def job(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    uid: int | None = None,
    gid: int | None = None,
    groups: tuple[int, ...] | None = None,
) -> Iterator[int]:
    """The pid of a Python that waits; `arguments` stand in its command line."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _WAITS, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(env or {}),
        user=uid,
        group=gid if gid is not None else uid,
        extra_groups=groups if groups is not None else ([] if uid is not None else None),
        cwd="/",
    )
    assert process.stdout is not None
    try:
        assert process.stdout.read(1) == b"r"
        yield process.pid
    finally:
        process.communicate(timeout=10)


@contextmanager
def job_below(*, env: Mapping[str, str]) -> Iterator[tuple[int, int]]:
    """(child, parent): the parent has `env`, the child has none."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _PARENT, _WAITS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(env),
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline()), process.pid
    finally:
        process.communicate(timeout=10)


@contextmanager
def scratch(base: Path) -> Iterator[Path]:
    """A directory that only root decides on (pytest's own are below /tmp, where anyone creates names)."""
    directory = base / f"sidecar-test-{os.urandom(4).hex()}"
    directory.mkdir(mode=0o755)
    try:
        yield directory
    finally:
        for path in sorted(directory.rglob("*"), reverse=True):
            path.unlink() if not path.is_dir() or path.is_symlink() else path.rmdir()
        directory.rmdir()
