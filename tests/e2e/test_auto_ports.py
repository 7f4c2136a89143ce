"""Ports with `auto`, as real sockets see them: who speaks first, and how slowly, changes nothing about what is judged."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.far_end import FarEnd
from tests.support.far_host import FarHost
from tests.support.http_far import HttpFar
from tests.support.postgres_server import PostgresServer
from tests.support.steered_job import SteeredJob

pytestmark = [pytest.mark.root, pytest.mark.servers]

POLICY = """\
version: 1
rules:
  - {name: no-delete, when: {protocol: http, method: [DELETE]}, deny: not by a job}
  - {name: no-drops, when: {protocol: postgres, statement: [DROP]}, deny: not here}
"""
SLOW = """
import socket, sys, time
host, pauses = sys.argv[1], [float(word) for word in sys.argv[2:]]
request = b"DELETE /slow HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n"
with socket.create_connection((host, 8080), timeout=20) as sock:
    for number, pause in enumerate(pauses):
        time.sleep(pause)
        sock.sendall(request[number:number + 1] if number + 1 < len(pauses) else request[number:])
    print(b"".join(iter(lambda: sock.recv(4096), b"")).split(b"\\r\\n")[0].decode())
"""
GREETED = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 2525), timeout=20) as sock:
    began = time.monotonic()
    print(sock.recv(10).decode(), time.monotonic() - began < 5)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[FarHost]:
    with FarHost() as found:
        yield found


def test_a_server_that_speaks_first(hosts: FarHost, tmp_path: Path) -> None:
    job = SteeredJob(hosts, tmp_path, POLICY)
    with FarEnd(hosts, (2525,)):
        done = job.run(sys.executable, "-c", GREETED, hosts.far_address)
    assert done.stdout == "far True\n", done.stderr
    (gap,) = job.records("gap")
    assert (gap["reason"], gap["detail"]) == ("unknown_protocol", "the server spoke first")


@pytest.mark.parametrize("pauses", [["1.2"], ["0", "0.8", "0.8"], ["0.05"] * 40])
def test_waiting_is_no_way_around(hosts: FarHost, tmp_path: Path, pauses: list[str]) -> None:
    job = SteeredJob(hosts, tmp_path, POLICY)
    with HttpFar(hosts) as far:
        done = job.run(sys.executable, "-c", SLOW, hosts.far_address, *pauses)
        assert done.stdout == "HTTP/1.1 403 Forbidden\n", done.stderr
        assert [row["path"] for row in far.ask("/requests") if row["path"] == "/slow"] == []


def test_postgres_is_recognised(hosts: FarHost, tmp_path: Path) -> None:
    job = SteeredJob(hosts, tmp_path, POLICY)
    prefix = ("nsenter", f"--net=/run/netns/{hosts.far}")
    with PostgresServer(address=hosts.far_address, port=2525, prefix=prefix):
        done = job.run(
            "psql", "-h", hosts.far_address, "-p", "2525", "-U", "postgres", "-XAt",
            "-c", "DROP TABLE t", "-c", "SELECT 'on'",
        )  # fmt: skip
    assert done.stdout == "on\n"
    assert "denied by policy: no-drops" in done.stderr
