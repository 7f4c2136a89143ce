"""The main job, with nothing replaced: kernel, namespaces, PostgreSQL, psql, curl, psycopg; what passes the wire is sniffed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.audit.verify import verify
from sidecar.kernel import cgroups, run_state, steering
from tests.support.far_host import FarHost
from tests.support.postgres_server import PostgresServer
from tests.support.tokens import Issuer

pytestmark = [pytest.mark.root, pytest.mark.servers]

SIDECAR = str(Path(sys.executable).parent / "sidecar")
POLICY = """\
version: 1
rules:
  - name: no-schema-changes
    when: {protocol: postgres, statement: [DROP, TRUNCATE, ALTER]}
    deny: schema changes go through the migration job
  - name: customer-deletes
    when: {protocol: postgres, statement: [DELETE], table: customers}
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
API = """\
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = json.dumps({"customers": [{"id": 1, "ssn": "123-45-6789"}], "seen": self.headers.get("X-Workload-Identity", "")}).encode()
        self.send_response(200); self.send_header("Content-Type", "application/json"); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    do_POST = do_GET
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer((sys.argv[1], 8080), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FarHost, PostgresServer, Path]]:
    directory = tmp_path_factory.mktemp("world")
    with FarHost() as hosts:
        prefix = ("nsenter", f"--net=/run/netns/{hosts.far}")
        with PostgresServer(address=f"{hosts.far_address},{hosts.far_address6}", prefix=prefix) as server:
            server.sql(
                "CREATE TABLE customers(id int primary key, name text, ssn text);"
                "INSERT INTO customers VALUES (1,'Ann','123-45-6789'),(2,'Bob','987-65-4321'); CREATE TABLE t(x int)"
            )
            api = hosts.popen(hosts.far, [sys.executable, "-c", API, hosts.far_address])
            try:
                time.sleep(1)
                yield hosts, server, directory
            finally:
                api.terminate()
                api.wait(10)


class Job:
    """One configuration and the commands run under it."""

    def __init__(self, hosts: FarHost, directory: Path, extra: str = "", policy: str = POLICY) -> None:
        self.hosts = hosts
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "policy.yaml").write_text(policy)
        self.audit = directory / "audit"
        self.config = directory / "sidecar.yaml"
        self.config.write_text(
            f"steering:\n  ports: {{5432: postgres, 8080: auto}}\npolicy: policy.yaml\naudit: {{directory: {self.audit}}}\n{extra}"
        )

    def command(self, *command: str) -> list[str]:
        return [SIDECAR, "exec", "-c", str(self.config), "--", *command]

    def run(self, *command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return self.hosts.run(self.hosts.near, self.command(*command), env=env)

    def psql(self, *statements: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        arguments = [part for text in statements for part in ("-c", text)]
        return self.run("psql", "-h", self.hosts.far_address, "-U", "postgres", "-XAt", *arguments, env=env)

    def records(self) -> list[dict[str, object]]:
        done = subprocess.run(
            [SIDECAR, "audit", "export", "--directory", str(self.audit)],
            capture_output=True,
            text=True,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]


def test_mask_deny_and_a_usable_session(world: tuple[FarHost, PostgresServer, Path], tmp_path: Path) -> None:
    hosts, server, _ = world
    before = dead_traces()
    job = Job(hosts, tmp_path)
    capture = hosts.popen(
        hosts.far,
        [sys.executable, "-c", "import sys\nfrom scapy.all import sniff, raw\n"
         "sniff(iface=sys.argv[1], timeout=12, prn=lambda p: (sys.stdout.buffer.write(raw(p)), sys.stdout.flush()))\n", f"{hosts.interface}f"],
        stdout=subprocess.PIPE, encoding="latin-1",
    )  # fmt: skip
    time.sleep(3)
    done = job.psql(
        "SELECT ssn FROM customers ORDER BY id",
        "DROP TABLE customers",
        "BEGIN; SELECT 1; DROP TABLE t; INSERT INTO t VALUES (1); COMMIT",
        "SELECT 'still usable'",
    )
    wire, _ = capture.communicate(timeout=30)
    assert done.stdout.splitlines() == ["[redacted]", "[redacted]", "still usable"]
    assert "denied by policy: no-schema-changes: schema changes go through the migration job" in done.stderr
    assert "SELECT ssn FROM customers" in wire  # what is allowed was seen, so the sniffer saw
    assert "DROP TABLE" not in wire
    assert server.sql("SELECT count(*) FROM t") == "0"
    report = verify(job.audit)
    assert report.ok, report.findings
    assert not dead_traces(before)


def test_transactions_end_as_the_server_says(
    world: tuple[FarHost, PostgresServer, Path], tmp_path: Path
) -> None:
    hosts, server, _ = world
    job = Job(hosts, tmp_path)
    script = """
import psycopg, sys
with psycopg.connect(sys.argv[1]) as c:
    try: c.execute("DROP TABLE t")
    except psycopg.errors.InsufficientPrivilege as e: print("denied", c.info.transaction_status.name, e.diag.message_detail)
    try: c.execute("INSERT INTO t VALUES (1)")
    except psycopg.errors.InFailedSqlTransaction: print("failed transaction")
    c.rollback()
    print(c.execute("SELECT ssn AS x, %s::int FROM customers WHERE id = %s", (7, 1)).fetchall())
    with c.pipeline():
        c.execute("SELECT 1"); c.execute("SELECT 2")
    cur = c.cursor(binary=True); print(cur.execute("SELECT ssn, id FROM customers WHERE id = %s", (2,)).fetchall())
"""
    done = job.run(sys.executable, "-c", script, f"host={hosts.far_address} user=postgres")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("denied INERROR not sent to")
    assert lines[1:] == ["failed transaction", "[('[redacted]', 7)]", "[(None, 2)]"]
    assert server.sql("SELECT count(*) FROM t") == "0"


def test_http_is_masked_denied_and_recorded(
    world: tuple[FarHost, PostgresServer, Path], tmp_path: Path
) -> None:
    hosts, _, _ = world
    job = Job(hosts, tmp_path)
    url = f"http://{hosts.far_address}:8080/customers"
    got = job.run("curl", "-s", "-H", "X-Workload-Identity: forged", url)
    assert json.loads(got.stdout) == {"customers": [{"id": 1, "ssn": "[redacted]"}], "seen": ""}
    refused = job.run("curl", "-s", "-o", "-", "-w", "%{http_code}", "-d", "x=1", url)
    assert refused.stdout.endswith("403")
    assert "denied by policy: read-only-api" in refused.stdout
    kinds = [
        (row["kind"], row.get("verdict", {}).get("action"))
        for row in job.records()
        if row["kind"] == "request"
    ]  # type: ignore[attr-defined]
    assert kinds == [("request", "mask"), ("request", "deny")]
    assert verify(job.audit).ok


def test_identity_reaches_the_record_and_the_server(
    world: tuple[FarHost, PostgresServer, Path], tmp_path: Path
) -> None:
    hosts, _, _ = world
    issuer = Issuer()
    token = issuer.token(sub="repo:acme/reports:main")
    extra = (
        issuer.configuration(issuer.jwks(tmp_path)).replace("identity:\n", "identity:\n  required: true\n")
        + f"targets:\n  - {{name: orders, host: {hosts.far_address}/32, port: 5432, protocol: postgres}}\n"
        f"  - {{name: api, host: {hosts.far_address}/32, port: 8080}}\n"
    )
    job = Job(hosts, tmp_path / "job", extra)
    done = job.psql(
        "SHOW application_name",
        "SELECT length(current_setting('workload.identity')) > 100",
        env={"SIDECAR_ID_TOKEN": token},
    )
    assert done.stdout.splitlines() == ["repo:acme/reports:main", "t"], done.stderr
    forged = job.psql("SET workload.identity = 'x'", env={"SIDECAR_ID_TOKEN": token})
    assert "denied by policy: identity.attach" in forged.stderr
    seen = job.run("curl", "-s", f"http://{hosts.far_address}:8080/", env={"SIDECAR_ID_TOKEN": token})
    assert json.loads(seen.stdout)["seen"] == token
    rows = [row for row in job.records() if row["kind"] == "request"]
    assert {row["principal"]["subject"] for row in rows} == {"repo:acme/reports:main"}  # type: ignore[index]
    assert token not in "".join(path.read_bytes().decode("latin-1") for path in job.audit.glob("*.seg"))
    without = job.psql("SELECT 1")
    assert without.returncode == 2
    assert "a verified identity is required" in without.stderr
    assert "no_token" in without.stderr


def test_hold_is_approved_once_and_rejected(
    world: tuple[FarHost, PostgresServer, Path], tmp_path: Path
) -> None:
    hosts, server, _ = world
    job = Job(hosts, tmp_path)

    def decided(how: str) -> tuple[str, str]:
        running = hosts.popen(
            hosts.near, job.command("psql", "-h", hosts.far_address, "-U", "postgres", "-XAt", "-c", "DELETE FROM customers WHERE id = 99", "-c", "SELECT 'on'"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            listed = subprocess.run(
                [SIDECAR, "approvals", "list", "--json"], capture_output=True, text=True, check=False
            )
            rows = json.loads(listed.stdout or "[]")
            rows = [
                row
                for row in (rows if isinstance(rows, list) else rows.get("holds", []))
                if row["state"] == "pending"
            ]
            if rows:
                break
            time.sleep(0.2)
        assert rows, listed.stderr
        subprocess.run([SIDECAR, "approvals", how, rows[0]["id"]], check=True, capture_output=True)
        return running.communicate(timeout=30)

    out, err = decided("approve")
    assert out.splitlines() == ["DELETE 0", "on"], err
    assert "held by policy: customer-deletes" in err
    out, err = decided("reject")
    assert out.splitlines() == ["on"]
    assert "rejected" in err
    assert server.sql("SELECT count(*) FROM customers") == "2"
    assert [row["hold"]["state"] for row in job.records() if row["kind"] == "decision"] == [
        "approved",
        "rejected",
    ]  # type: ignore[index]


def dead_traces(but: frozenset[str] = frozenset()) -> frozenset[str]:
    """What instances whose supervisor is gone have left in the kernel. (Others may be alive beside this test, or have left
    something before it: `but`.)"""
    found = frozenset(
        trace
        for name in {*run_state.states(), *cgroups.instances()}
        if not run_state.alive(run_state.states().get(name, {}))
        for trace in steering.traces(name)
    )
    return found - but


def inspector_pids(front: int) -> tuple[int, list[int]]:
    """(supervisor, its workers) below the process that the shell started."""
    children = subprocess.run(
        ["pgrep", "-P", str(front)], capture_output=True, text=True, check=False
    ).stdout.split()
    for child in map(int, children):
        workers = subprocess.run(
            ["pgrep", "-P", str(child), "-f", "sidecar.proxy.worker"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.split()
        if workers:
            return child, [int(pid) for pid in workers]
    return 0, []


@pytest.mark.parametrize("victim", ["worker", "supervisor"])
def test_sigkill_mid_flow_is_an_error_never_a_bypass(
    world: tuple[FarHost, PostgresServer, Path], tmp_path: Path, victim: str
) -> None:
    hosts, _, _ = world
    job = Job(hosts, tmp_path)
    script = """
import psycopg, sys, time
c = psycopg.connect(sys.argv[1], autocommit=True); print("open", flush=True); sys.stdin.readline()
try: c.execute("SELECT 1"); print("answered")
except psycopg.OperationalError: print("connection error")
try: psycopg.connect(sys.argv[1], connect_timeout=5).execute("SELECT 1"); print("steered again")
except psycopg.OperationalError: print("refused")
"""
    running = hosts.popen(
        hosts.near, job.command(sys.executable, "-c", script, f"host={hosts.far_address} user=postgres"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == "open\n"
        supervisor, workers = inspector_pids(running.pid)
        os.kill(supervisor if victim == "supervisor" else workers[0], signal.SIGKILL)
        time.sleep(4.0 if victim == "supervisor" else 2.0)
        out, _ = running.communicate("\n", timeout=40)
    finally:
        running.kill()
    assert out.splitlines() == ["connection error", "refused" if victim == "supervisor" else "steered again"]
    report = verify(job.audit)
    assert report.ok, report.findings
    subprocess.run([SIDECAR, "down", "--dead"], check=True, capture_output=True)
    assert not dead_traces()


def test_sslmode_require_is_relayed_opaque_and_recorded(
    world: tuple[FarHost, PostgresServer, Path], tmp_path: Path
) -> None:
    hosts, _, _ = world
    job = Job(hosts, tmp_path)
    done = job.psql("SELECT 1", env={"PGSSLMODE": "require"})
    assert (
        "server does not support SSL" in done.stderr
    )  # the server's own answer: this one has no certificate
    assert any(row["kind"] == "gap" and row["reason"] == "client_requires_tls" for row in job.records())


def test_ipv6(world: tuple[FarHost, PostgresServer, Path], tmp_path: Path) -> None:
    hosts, _, _ = world
    job = Job(hosts, tmp_path)
    done = job.run(
        "psql",
        "-h",
        hosts.far_address6,
        "-U",
        "postgres",
        "-XAt",
        "-c",
        "SELECT ssn FROM customers WHERE id = 1",
    )
    assert done.stdout == "[redacted]\n", done.stderr


def test_exit_status_is_the_commands(world: tuple[FarHost, PostgresServer, Path], tmp_path: Path) -> None:
    job = Job(world[0], tmp_path)
    assert job.run("sh", "-c", "exit 7").returncode == 7
