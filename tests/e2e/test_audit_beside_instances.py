"""`sidecar audit verify` and `export` while an agent and several `exec` write into one directory, one of them dies, and the agent ships
and recovers: whole processes, real traffic."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.audit.verify import verify
from tests.support.far_host import FarHost
from tests.support.http_far import HttpFar
from tests.support.running_agent import Run
from tests.support.steered_job import SIDECAR

pytestmark = [pytest.mark.root, pytest.mark.servers]

REQUESTS = 150


@pytest.fixture(scope="module")
def hosts() -> Iterator[FarHost]:
    with FarHost() as hosts, HttpFar(hosts):
        yield hosts


def test_verify_beside_an_agent_and_execs(hosts: FarHost, tmp_path: Path) -> None:
    url = f"http://{hosts.far_address}:8080/customers"
    loop = f"for n in $(seq {REQUESTS}); do curl -s -o /dev/null {url} || exit 1; done"
    with Run(hosts, tmp_path / "run", "exec") as run:

        def job() -> subprocess.Popen[str]:
            command = [SIDECAR, "exec", "-c", str(run.config), "--", "sh", "-c", loop]
            return hosts.popen(hosts.near, command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)

        def look(command: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [SIDECAR, "audit", command, "--directory", str(run.audit), "--json"],
                capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip

        jobs = [job() for _ in range(3)]
        looked, most_live = 0, 0
        try:
            while any(each.poll() is None for each in jobs[:2]):
                verified = look("verify")
                report = json.loads(verified.stdout)
                assert (verified.returncode, report["findings"]) == (0, [])
                most_live = max(most_live, sum(stream["live"] for stream in report["streams"]))
                exported = look("export")
                assert (exported.returncode, exported.stderr) == (0, "")
                looked += 1
                if looked == 2:
                    jobs[2].send_signal(signal.SIGKILL)
            assert [each.wait(60) for each in jobs[:2]] == [0, 0]
        finally:
            for each in jobs:
                if each.poll() is None:
                    each.terminate()
                each.communicate(timeout=60)
        assert looked > 2
        assert most_live >= 3  # the agent's and two jobs'
        assert run.end() == 0, "".join(run.said)
        report_after = verify(run.audit)
        assert report_after.ok, report_after.findings
        rows = [json.loads(line) for line in look("export").stdout.splitlines()]
        assert sum(row["kind"] == "request" for row in rows) >= 2 * REQUESTS
