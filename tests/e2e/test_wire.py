"""Proof on the wire: what a job's far host and the job itself are sent, taken from the interfaces and not from our own records.

Three captures at once: the far host's interface (all that reaches it), the near host's own (all that leaves), and the near loopback, over
which the job's sockets speak with the inspector: what is not on it, no process of the job has received.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.audit.verify import verify
from tests.support.far_host import FarHost
from tests.support.http_far import HttpFar, in_url
from tests.support.postgres_server import PostgresServer
from tests.support.steered_job import SIDECAR, SteeredJob, pending_hold, worker_pids
from tests.support.tokens import SUBJECT, Issuer
from tests.support.wiretap import Wire, Wiretap

pytestmark = [pytest.mark.root, pytest.mark.servers]

SSN = b"123-45-6789"
POLICY = """\
version: 1
rules:
  - name: no-schema-changes
    when: {protocol: postgres, statement: [DROP, TRUNCATE, ALTER]}
    deny: schema changes go through the migration job
  - name: deletes
    when: {protocol: postgres, statement: [DELETE]}
    approve: {within: 20s}
  - name: pii
    when: {protocol: postgres}
    mask: {columns: {customers.ssn: redact}}
  - name: read-only-api
    when: {protocol: http, method: [POST, DELETE]}
    deny: the job may only read
  - name: api-pii
    when: {protocol: http}
    mask: {json: {"$.customers[*].ssn": redact}}
"""
JOB = """
import os, subprocess, sys
import httpx, psycopg
host = sys.argv[1]
child = None
if len(sys.argv) == 2:  # a child process of the job does the same
    child = subprocess.Popen([sys.executable, __file__, host, "child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    print(child.stdout.readline(), end="", flush=True)
with psycopg.connect(host=host, user="postgres", autocommit=True) as pg, httpx.Client(base_url=f"http://{'[' + host + ']' if ':' in host else host}:8080") as http:
    print("seen", pg.execute("SELECT ssn FROM customers ORDER BY id").fetchall(), http.get("/customers").text, flush=True)
    if child is None:
        print("child holds", flush=True); sys.stdin.readline(); raise SystemExit
    for statement, values in (
        ("DROP TABLE t /* nobody_may_see_this */", None),
        ("SELECT 1; TRUNCATE t -- nobody_may_see_this", None),
        ("ALTER TABLE t RENAME TO nobody_may_see_this", ()),  # Parse, Bind, Execute
    ):
        try: pg.execute(statement, values)
        except psycopg.errors.InsufficientPrivilege: print("denied", flush=True)
    try: pg.execute("DELETE FROM customers WHERE name = 'nobody_may_see_that'")
    except psycopg.errors.InsufficientPrivilege: print("rejected", flush=True)
    print(http.post("/nobody_may_see_this", content=b"nor_this_body", headers={"X-Workload-Identity": "forged"}).status_code, flush=True)
    print(http.get("/again", headers={"X-Workload-Identity": "forged"}).status_code, flush=True)
    sys.stdin.readline()
    child.communicate("\\n")
"""


@dataclass(frozen=True)
class Seen:
    """What the job printed, the three captures, and whose sockets stood towards the far host while all were open."""

    hosts: FarHost
    far_address: str
    token: str
    output: list[str]
    far: Wire
    near: Wire
    loopback: Wire
    inspector_ports: frozenset[int]
    job_ports: frozenset[int]
    job: SteeredJob


@pytest.fixture(scope="module", params=["IPv4", "IPv6"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    directory = tmp_path_factory.mktemp("wire")
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(FarHost())
        far = hosts.far_address if request.param == "IPv4" else hosts.far_address6
        stack.enter_context(HttpFar(hosts, address=far))
        prefix = ("nsenter", f"--net=/run/netns/{hosts.far}")
        with PostgresServer(address=far, prefix=prefix) as server:
            server.sql(
                "CREATE TABLE customers(id int primary key, name text, ssn text);"
                f"INSERT INTO customers VALUES (1, 'Ann', '{SSN.decode()}'), (2, 'Bob', '987-65-4321');"
                "CREATE TABLE t(x int)"
            )
            yield _play(hosts, far, directory)
            assert server.sql("SELECT count(*) FROM customers") == "2"
            assert server.sql("SELECT count(*) FROM t") == "0"


def _play(hosts: FarHost, far_address: str, directory: Path) -> Seen:
    issuer = Issuer()
    token = issuer.token()
    network = ipaddress.ip_network(far_address)
    extra = (
        issuer.configuration(issuer.jwks(directory))
        + f"targets:\n  - {{name: orders, host: '{network}', port: 5432, protocol: postgres}}\n"
        f"  - {{name: api, host: '{network}', port: 8080}}\n"
    )
    job = SteeredJob(hosts, directory / "job", POLICY, extra)
    script = directory / "job.py"
    script.write_text(JOB)
    far = Wiretap(hosts, hosts.far, f"{hosts.interface}f", directory / "far.frames")
    near = Wiretap(hosts, hosts.near, f"{hosts.interface}n", directory / "near.frames")
    loopback = Wiretap(hosts, hosts.near, "lo", directory / "lo.frames")
    with far, near, loopback:
        running = hosts.popen(
            hosts.near,
            [
                "env",
                f"SIDECAR_ID_TOKEN={token}",
                *job.command(sys.executable, str(script), far_address),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert running.stdout is not None
            output = [running.stdout.readline() for _ in range(5)]
            hold = pending_hold()
            subprocess.run(
                [SIDECAR, "approvals", "reject", hold["id"]], check=True, capture_output=True, timeout=30
            )
            output += [running.stdout.readline() for _ in range(3)]
            inspector, others = _ports_towards(hosts, far_address, set(worker_pids(running.pid)))
        finally:
            running.communicate("\n", timeout=60)
    return Seen(hosts, far_address, token, output, far.wire, near.wire, loopback.wire, inspector, others, job)


def _ports_towards(
    hosts: FarHost, far_address: str, workers: set[int]
) -> tuple[frozenset[int], frozenset[int]]:
    """(local ports of the workers' connections to the far host, those of everybody else's), as the kernel lists them."""
    listed = hosts.run(hosts.near, ["ss", "-Htnp", "state", "established", "dst", in_url(far_address)]).stdout
    inspector, others = set(), set()
    for line in listed.splitlines():
        port = int(line.split()[2].rpartition(":")[2])
        owners = {int(part.partition(",")[0]) for part in line.split("pid=")[1:]}
        (inspector if owners and owners <= workers else others).add(port)
    return frozenset(inspector), frozenset(others)


def test_the_job_ran_as_meant(seen: Seen) -> None:
    child, own, *rest = seen.output
    for line in (child, own):
        assert line.startswith("seen [('[redacted]',), ('[redacted]',)] {"), seen.output
        assert json.loads(line[line.index("{") :])["customers"][0]["ssn"] == "[redacted]"
    assert [line.strip() for line in rest] == ["denied", "denied", "denied", "rejected", "403", "200"]
    assert verify(seen.job.audit).ok


def test_no_byte_of_what_was_refused_reached_the_far_host(seen: Seen) -> None:
    for wire in (seen.far, seen.near):
        assert wire.holding(b"SELECT ssn FROM customers")  # the capture sees what is let through
        assert wire.holding(b"GET /again")
        for refused in (
            b"nobody_may_see",
            b"nor_this_body",
            b"DROP TABLE",
            b"TRUNCATE",
            b"ALTER TABLE",
            b"DELETE FROM",
            b"POST /",
        ):
            assert wire.holding(refused) == [], refused


def test_no_unmasked_value_reached_a_process_of_the_job(seen: Seen) -> None:
    # The upstream hop carries the real values, from the server to the inspector alone.
    carrying = seen.far.holding(SSN)
    assert {source for source, _ in carrying} == {(seen.far_address, port) for port in (5432, 8080)}
    assert {port for _, (_, port) in carrying} <= seen.inspector_ports
    # All that the job's sockets were sent is on the loopback.
    assert seen.loopback.holding(b"[redacted]")
    assert seen.loopback.holding(SSN) == []
    assert seen.loopback.holding(b"987-65-4321") == []


def test_every_packet_to_the_far_host_is_the_inspectors(seen: Seen) -> None:
    far = seen.far_address
    assert len(seen.inspector_ports) == 4  # two processes, PostgreSQL and HTTP each
    assert len(seen.job_ports) == 4
    assert not seen.inspector_ports & seen.job_ports
    for wire in (seen.far, seen.near):
        dialled = [stream for stream in wire.opened if stream[1][0] == far]
        assert {port for (_, port), _ in dialled} == seen.inspector_ports
        assert len(dialled) == len(seen.inspector_ports)
        sources = {stream[0][1] for stream, _ in wire.streams() if stream[1][0] == far}
        assert sources <= seen.inspector_ports
        assert [other for other in wire.others if far in other and "ICMPv6" not in other] == []


def test_the_identity_arrived_and_the_forged_one_did_not(seen: Seen) -> None:
    far = seen.far_address
    header = b"\r\nX-Workload-Identity: " + seen.token.encode() + b"\r\n"
    requests = [data for ((_, _), to), data in seen.far.streams() if to == (far, 8080)]
    assert len(requests) == 2
    for data in requests:
        assert data.count(header) == data.count(b"GET ")
    assert seen.far.holding(b"forged") == []
    assert seen.loopback.holding(b"forged")
    statements = [data for ((_, _), to), data in seen.far.streams() if to == (far, 5432)]
    assert len(statements) == 2
    for data in statements:
        assert b"application_name\0" + SUBJECT.encode() in data
        assert b"workload.identity" in data
    sent = [to for _, to in seen.far.holding(seen.token.encode()) if to[0] == far]
    assert sent == [(far, 8080)] * 2  # never to PostgreSQL, which gets a signed assertion
