"""An inspector that hangs instead of dying: nobody gets past it, new connections are refused by the time its heartbeat is over, and it
goes on when it wakes or is replaced.

SIGSTOP is what hangs best: sockets stay open, backlogs go on accepting, and no handler runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sidecar.audit.verify import verify
from sidecar.proxy import limits
from tests.support.far_host import FarHost
from tests.support.http_far import HttpFar
from tests.support.running_agent import Run, ask, is_steered
from tests.support.steered_job import SteeredJob, worker_pids

pytestmark = [pytest.mark.root, pytest.mark.servers]

POLICY = """\
version: 1
rules:
  - name: read-only-api
    when: {protocol: http, method: [POST]}
    deny: the job may only read
  - name: api-pii
    when: {protocol: http}
    mask: {json: {"$.customers[*].ssn": redact}}
"""
# Each line that it is given is a request over the connection that stands (`old METHOD PATH`), or over a new one; each answer is one line:
# the status and whether it was masked, or the error's name.
JOB = """
import http.client, sys
host = sys.argv[1]
old = http.client.HTTPConnection(host, 8080, timeout=30)
def ask(connection, method, path):
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        text = answer.read().decode()
        return f"{answer.status} {'masked' if '[redacted]' in text else 'plain'}"
    except OSError as error:
        connection.close()
        return type(error).__name__
    except http.client.HTTPException as error:
        connection.close()
        return type(error).__name__
print(ask(old, "GET", "/customers"), flush=True)
for line in sys.stdin:
    which, method, path, timeout = line.split()
    connection = old if which == "old" else http.client.HTTPConnection(host, 8080, timeout=float(timeout))
    if which == "old" and old.sock: old.sock.settimeout(float(timeout))
    print(ask(connection, method, path), flush=True)
"""
MARGIN_S = 1.0
AFTER_HEARTBEAT_S = limits.HEARTBEAT_TIMEOUT_S + MARGIN_S


@pytest.fixture(scope="module")
def hosts() -> Iterator[FarHost]:
    with FarHost() as hosts, HttpFar(hosts):
        yield hosts


class Job:
    """Context manager: a steered job with one kept connection, and the processes that inspect it."""

    def __init__(self, hosts: FarHost, directory: Path, on_failure: str = "closed") -> None:
        self.hosts = hosts
        steering = f"{{on_failure: {on_failure}, ports: {{8080: auto}}}}"
        self.job = SteeredJob(hosts, directory / "job", POLICY, steering=steering)
        self.script = directory / "job.py"
        self.script.write_text(JOB)

    def __enter__(self) -> Job:
        self.process = self.job.start(
            sys.executable,
            str(self.script),
            self.hosts.far_address,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._line() == "200 masked"
        (self.worker,) = worker_pids(self.process.pid)
        self.supervisor = int(Path(f"/proc/{self.worker}/stat").read_text().rpartition(")")[2].split()[1])
        self.stopped: list[int] = []
        return self

    def _line(self) -> str:
        assert self.process.stdout is not None
        return str(self.process.stdout.readline().strip())

    def ask(self, which: str, path: str = "/customers", method: str = "GET", timeout_s: float = 25) -> str:
        self.begin(which, path, method, timeout_s)
        return self._line()

    def begin(self, which: str, path: str = "/customers", method: str = "GET", timeout_s: float = 25) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{which} {method} {path} {timeout_s}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        return self._line()

    def stop(self, pid: int) -> float:
        os.kill(pid, signal.SIGSTOP)
        self.stopped.append(pid)
        return time.monotonic()

    def wake(self) -> None:
        for pid in self.stopped:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue  # killed for hanging
        self.stopped.clear()

    def end(self) -> list[dict[str, Any]]:
        """Its records."""
        self.wake()
        self.process.communicate(timeout=60)
        assert verify(self.job.audit).ok
        return self.job.records()

    def __exit__(self, *_: object) -> None:
        self.wake()
        if self.process.poll() is None:
            self.process.communicate(timeout=60)


def reached(hosts: FarHost) -> list[str]:
    """Paths that the far host has been asked for, besides this question."""
    done = hosts.run(hosts.far, ["curl", "-s", f"http://{hosts.far_address}:8080/requests"])
    return [row["path"] for row in json.loads(done.stdout)]


def until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def eventually(what: Callable[[], str], wanted: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (found := what()) != wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_a_worker_that_hangs_is_refused_and_goes_on(hosts: FarHost, tmp_path: Path) -> None:
    with Job(hosts, tmp_path) as job:
        stopped = job.stop(job.worker)
        # At once: the backlog takes it, and nobody passes.
        assert job.ask("new", "/new-while-hung", timeout_s=0.5) == "TimeoutError"
        until(stopped + AFTER_HEARTBEAT_S)
        asked = time.monotonic()
        assert job.ask("new", "/new-while-stale") == "PermissionError"
        assert time.monotonic() - asked < MARGIN_S
        job.begin("old", "/old-while-hung")
        assert not any("-while-" in path for path in reached(hosts))
        assert time.monotonic() - stopped < limits.WORKER_SILENCE_S
        job.wake()
        assert job.answer() == "200 plain"
        eventually(lambda: job.ask("new"), "200 masked")
        assert job.ask("old") == "200 masked"
        assert job.ask("old", "/denied", method="POST").startswith("403")
        assert worker_pids(job.process.pid) == [job.worker]
        records = job.end()
    gaps = [row for row in records if row["kind"] == "gap"]
    assert {row["reason"] for row in gaps} == {"refused_by_kernel"}
    assert {row["target"]["port"] for row in gaps} == {8080}
    assert not any(path in ("/new-while-stale", "/denied") for path in reached(hosts))


def test_a_worker_that_hangs_on_is_replaced(hosts: FarHost, tmp_path: Path) -> None:
    with Job(hosts, tmp_path) as job:
        stopped = job.stop(job.worker)
        job.begin("new", "/waits-for-the-successor")
        assert job.answer() == "200 plain"  # it waited in the backlog, which the successor has got
        assert time.monotonic() - stopped > limits.WORKER_SILENCE_S - MARGIN_S
        assert worker_pids(job.process.pid) not in ([job.worker], [])
        assert job.ask("old") in ("ConnectionResetError", "BrokenPipeError", "RemoteDisconnected")
        eventually(lambda: job.ask("old"), "200 masked")  # it connects anew
        records = job.end()
    assert [row["reason"] for row in records if row["kind"] == "close"].count("worker_died") == 1


def test_a_supervisor_that_hangs_is_refused_and_goes_on(hosts: FarHost, tmp_path: Path) -> None:
    """Longer than it would leave a worker: its own workers are alive, and must not be killed for its sleep."""
    with Job(hosts, tmp_path) as job:
        stopped = job.stop(job.supervisor)
        until(stopped + AFTER_HEARTBEAT_S)
        asked = time.monotonic()
        assert job.ask("new", "/new-while-stale") == "PermissionError"
        assert time.monotonic() - asked < MARGIN_S
        # What stands is inspected as before: the policy is the worker's.
        assert job.ask("old") == "200 masked"
        assert job.ask("old", "/denied", method="POST").startswith("403")
        until(stopped + limits.WORKER_SILENCE_S + 2 * MARGIN_S)
        job.wake()
        eventually(lambda: job.ask("new"), "200 masked")
        assert job.ask("old") == "200 masked"
        assert worker_pids(job.process.pid) == [job.worker]
        records = job.end()
    assert {row["reason"] for row in records if row["kind"] == "gap"} == {"refused_by_kernel"}
    assert not any(path in ("/new-while-stale", "/denied") for path in reached(hosts))


@pytest.mark.parametrize("who", ["worker", "supervisor"])
def test_on_failure_open_lets_pass_what_nobody_would_look_at(
    who: str, hosts: FarHost, tmp_path: Path
) -> None:
    with Job(hosts, tmp_path, on_failure="open") as job:
        assert job.ask("new") == "200 masked"
        stopped = job.stop(getattr(job, who))
        until(stopped + AFTER_HEARTBEAT_S)
        assert job.ask("new") == "200 plain"  # the customers, as the far host has them
        if who == "worker":  # what was steered stays so: it waits
            assert job.ask("old", "/old-while-open", timeout_s=0.5) == "TimeoutError"
            assert "/old-while-open" not in reached(hosts)
        job.wake()
        eventually(lambda: job.ask("new"), "200 masked")
        records = job.end()
    gaps = [row for row in records if row["kind"] == "gap"]
    assert {row["reason"] for row in gaps} == {"fail_open"}
    assert {(row["target"]["host"], row["target"]["port"]) for row in gaps} == {(hosts.far_address, 8080)}
    assert all(row["origin"]["pid"] for row in gaps)


@pytest.mark.skipif(os.cpu_count() == 1, reason="an agent has one worker for each processor")
def test_one_hung_worker_of_several_loses_nobody(hosts: FarHost, tmp_path: Path) -> None:
    """Some of the new connections are given to it: they wait for its successor, the rest go on at once."""
    with Run(hosts, tmp_path / "run", "all") as run:
        workers = worker_pids(run.process.pid)
        assert len(workers) > 1
        os.kill(workers[0], signal.SIGSTOP)
        begun = time.monotonic()
        with ThreadPoolExecutor(40) as threads:
            assert all(map(is_steered, threads.map(lambda _: ask(hosts, None), range(40))))
        assert time.monotonic() - begun > limits.WORKER_SILENCE_S - MARGIN_S  # else it was given none
        assert worker_pids(run.process.pid) != workers
        assert run.status()["ok"]
