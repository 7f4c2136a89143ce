"""Holds from end to end: one that nobody decides, and one that is approved by a click on the page. Real clients, kernel, servers and
browser; the page is `sidecar collector`'s."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.audit.verify import verify
from sidecar.model.ids import short_id
from tests.support.chromium import Chromium
from tests.support.collectors import CollectorProcess
from tests.support.far_host import FarHost
from tests.support.http_far import HttpFar
from tests.support.postgres_server import PostgresServer
from tests.support.steered_job import SIDECAR, SteeredJob, pending_hold

pytestmark = [pytest.mark.root, pytest.mark.servers]

WITHIN_S = 2
POLICY = f"""\
version: 1
rules:
  - name: writes
    when: {{protocol: http, method: [PUT]}}
    approve: {{within: {WITHIN_S}s}}
    owner: the api team
  - name: quick-deletes
    when: {{protocol: postgres, statement: [DELETE], table: orders}}
    approve: {{within: {WITHIN_S}s}}
  - name: customer-deletes
    when: {{protocol: postgres, statement: [DELETE], table: customers}}
    approve: {{within: 60s}}
"""


@pytest.fixture(scope="module")
def far() -> Iterator[HttpFar]:
    with FarHost() as hosts, HttpFar(hosts) as servers:
        yield servers


@pytest.fixture(scope="module")
def server(far: HttpFar) -> Iterator[PostgresServer]:
    prefix = ("nsenter", f"--net=/run/netns/{far.hosts.far}")
    with PostgresServer(address=far.hosts.far_address, prefix=prefix) as started:
        started.sql(
            "CREATE TABLE customers(id int); INSERT INTO customers VALUES (1), (2);"
            "CREATE TABLE orders(id int); INSERT INTO orders VALUES (1)"
        )
        yield started


@pytest.fixture
def job(far: HttpFar, tmp_path: Path) -> SteeredJob:
    return SteeredJob(far.hosts, tmp_path, POLICY)


def why(job: SteeredJob, record: str) -> str:
    return subprocess.run(
        [SIDECAR, "why", short_id(record), "--directory", str(job.audit)],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip


def test_a_request_that_nobody_decides_expires(far: HttpFar, job: SteeredJob) -> None:
    """It is answered as a denial, the connection goes on, and nothing of it was sent."""
    url = f"http://{far.hosts.far_address}:8080"
    before = len(far.ask("/requests"))
    script = (
        f"curl -s -w '\\n%{{http_code}} %{{content_type}} %{{time_total}} %{{num_connects}}\\n' -X PUT -d x=1 {url}/orders/9"
        f" --next -s -w '\\n%{{http_code}} %{{num_connects}}\\n' {url}/after"
    )
    done = job.run("sh", "-c", script)
    answer, told, *_, after = done.stdout.splitlines()
    status, kind, seconds, _ = told.split()
    assert (status, kind) == ("403", "application/problem+json")
    assert WITHIN_S <= float(seconds) < WITHIN_S + 5
    assert after == "200 0"  # on the same connection
    problem = json.loads(answer)
    assert problem["detail"] == "denied by policy: writes: expired"
    assert (problem["status"], problem["rule"]) == (403, "writes")
    assert [row["path"] for row in far.ask("/requests")[before:]] == ["/after"]

    (held,) = job.records("hold")
    (decided,) = job.records("decision")
    assert held["hold"].get("state", "pending") == "pending"
    assert (decided["hold"]["id"], decided["hold"]["state"]) == (held["hold"]["id"], "expired")
    asked = next(row for row in job.records("request") if row["operation"]["method"] == "PUT")
    assert asked["verdict"]["action"] == "hold"
    assert problem["hint"] == f"sidecar why {short_id(asked['id'])}"
    explained = why(job, asked["id"])
    assert "nobody decided in time: run it again while an approver is there, or ask the api team" in explained
    assert verify(job.audit).ok


def test_a_statement_that_nobody_decides_expires(
    far: HttpFar, server: PostgresServer, job: SteeredJob
) -> None:
    began = time.monotonic()
    done = job.run(
        "psql", "-h", far.hosts.far_address, "-U", "postgres", "-XAt",
        "-c", "DELETE FROM orders", "-c", "SELECT count(*) FROM orders",
    )  # fmt: skip
    assert time.monotonic() - began > WITHIN_S
    assert "held by policy: quick-deletes" in done.stderr
    assert "ERROR:  denied by policy: quick-deletes: expired" in done.stderr
    assert done.stdout == "1\n"
    assert [row["hold"]["state"] for row in job.records("decision")] == ["expired"]


@pytest.mark.browser
def test_a_held_statement_is_approved_by_a_click(
    far: HttpFar, server: PostgresServer, job: SteeredJob, tmp_path: Path
) -> None:
    browser = Chromium()
    running = None
    try:
        with CollectorProcess(tmp_path / "collector") as collector:
            running = job.start(
                "psql", "-h", far.hosts.far_address, "-U", "postgres", "-XAt",
                "-c", "DELETE FROM customers WHERE id = 2", "-c", "SELECT 'on'",
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            hold = pending_hold()["id"]
            page = browser.page()
            page.go(collector.url + "/approvals")
            page.click("input[type=password]")
            page.type((tmp_path / "collector" / "page.token").read_text().strip())
            with page.loading():
                page.press_enter()
            for part in ("DELETE FROM customers WHERE id = 2", "customer-deletes", "psql"):
                assert part in page.text
            assert server.sql("SELECT count(*) FROM customers") == "2"
            assert running.poll() is None
            page.click(f"article[id='{hold[-8:]}'] input[name=reason]")
            page.type("agreed with Ann")
            with page.loading():
                page.click(f"article[id='{hold[-8:]}'] button.approve")
            out, err = running.communicate(timeout=30)
            assert out.splitlines() == ["DELETE 1", "on"], err
            assert running.returncode == 0
    finally:
        if running is not None and running.poll() is None:
            running.terminate()
            running.wait(30)
        browser.close()
    assert server.sql("SELECT count(*) FROM customers") == "1"
    (decided,) = [row["hold"] for row in job.records("decision")]
    assert (decided["id"], decided["state"], decided["reason"]) == (hold, "approved", "agreed with Ann")
    assert "root" in decided["by"]
    report = verify(job.audit)
    assert report.ok, report.findings
