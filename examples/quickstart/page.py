"""The collector with its web page, in the background; how to stop it and remove what a quickstart left."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from far_host import NAMESPACE_PREFIX, FarHostError, remove_namespace

STATE_PREFIX = "quickstart-"
FIRST_PORT = 8420
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
SIDECAR = str(Path(sys.executable).with_name("sidecar"))


@dataclass(frozen=True, slots=True)
class Page:
    address: str
    pid: int
    log: Path


def start(state: Path) -> Page:
    """`sidecar collector` on the first free port from 8420 on, in a session of its own."""
    address = f"127.0.0.1:{free_port(FIRST_PORT)}"
    log = state / "collector.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [SIDECAR, "collector", "--listen", address, "--data", str(state / "collector")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            start_new_session=True,
        )
    (state / "collector.pid").write_text(f"{process.pid} {_start_ticks(process.pid)}")
    host, port = address.split(":")
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
            return Page(address, process.pid, log)
        except OSError:
            time.sleep(0.05)
    raise FarHostError(f"the collector did not start: {log.read_text(errors='replace')[-2000:]}")


def stop(state: Path) -> bool:
    """True where a collector ran and was stopped."""
    note = state / "collector.pid"
    if not note.exists():
        return False
    pid, ticks = (int(word) for word in note.read_text().split())
    note.unlink()
    if _start_ticks(pid) != ticks:
        return False  # it has ended, and the number may be somebody else's
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while _start_ticks(pid) == ticks and time.monotonic() < deadline:
        time.sleep(0.05)
    if _start_ticks(pid) == ticks:
        os.kill(pid, signal.SIGKILL)
    return True


def stop_all(states: Path, only: str = "") -> list[str]:
    """Stop every page, or that of one state; remove states and far hosts of quickstarts that have ended. Says what was
    done."""
    done = []
    for state in sorted(states.glob(STATE_PREFIX + "*")):
        if only and Path(only).name != state.name:
            continue
        running = state / "pid"
        if running.exists() and Path("/proc", running.read_text().strip()).exists():
            done.append(f"kept {state}: its quickstart is running")
            continue
        if stop(state):
            done.append("stopped a page")
        namespace = state / "namespace"
        if namespace.exists() and namespace.read_text().startswith(NAMESPACE_PREFIX):
            remove_namespace(namespace.read_text())
        shutil.rmtree(state, ignore_errors=True)
        done.append(f"removed {state}")
    return done or ["nothing to stop"]


def free_port(first: int) -> int:
    """The first port from `first` on at which nothing listens on the loopback address."""
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise FarHostError(f"no free port from {first} on")


def _start_ticks(pid: int) -> int:
    """When the process started, in ticks since boot; 0 where it is gone or only waits to be reaped."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])
