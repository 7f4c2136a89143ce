"""The audit directory fills up under a running job: its statements wait, `status` says why, and it goes on when there is room, with
nothing lost; with `on_full: drop` it goes on at once, and what is lost is counted. Likewise where the disk fails to take what was
written."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.audit import read
from sidecar.audit.verify import verify
from tests.support.far_host import FarHost
from tests.support.postgres_server import PostgresServer
from tests.support.thin_disk import thin_disk

pytestmark = [pytest.mark.root, pytest.mark.servers]

SIDECAR = str(Path(sys.executable).parent / "sidecar")
JOB = """
import psycopg, sys
with psycopg.connect(sys.argv[1], autocommit=True) as c:
    for line in sys.stdin:
        print(c.execute(f"SELECT {int(line)} /* {'x' * 3000} */").fetchone()[0], flush=True)
"""


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[FarHost, PostgresServer]]:
    with FarHost() as hosts:
        prefix = ("nsenter", f"--net=/run/netns/{hosts.far}")
        with PostgresServer(address=hosts.far_address, prefix=prefix) as server:
            yield hosts, server


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path) -> Path:
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096) == 4096:
            pass
    return ballast


def status(config: Path) -> dict[str, Any]:
    done = subprocess.run([SIDECAR, "status", "--json"], capture_output=True, text=True, check=False)
    for agent in json.loads(done.stdout)["instances"]:
        if agent["spool"]["directory"].startswith(str(config.parent)):
            return dict(agent)
    raise AssertionError(done.stdout)


def until(condition: Callable[[], Any], timeout_s: float = 15.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@contextlib.contextmanager
def job(
    hosts: FarHost, small: Path, audit: str = ""
) -> Iterator[tuple[subprocess.Popen[str], Path, Callable[[int], None]]]:
    config = small.parent / "sidecar.yaml"
    config.write_text(
        f"steering:\n  ports: {{5432: postgres}}\naudit:\n  directory: {small / 'audit'}\n  max_bytes: 64MiB\n{audit}"
    )
    running = hosts.popen(
        hosts.near,
        [SIDECAR, "exec", "-c", str(config), "--", sys.executable, "-c", JOB, f"host={hosts.far_address} user=postgres"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip

    def ask(number: int) -> None:
        assert running.stdin is not None
        running.stdin.write(f"{number}\n")
        running.stdin.flush()

    try:
        yield running, config, ask
    finally:
        running.kill()
        running.wait()


def test_a_full_directory_holds_requests_up(world: tuple[FarHost, PostgresServer], small: Path) -> None:
    hosts, _ = world
    with job(hosts, small) as (running, config, ask):
        assert running.stdout is not None
        ask(1)
        assert running.stdout.readline() == "1\n"
        assert status(config)["spool"]["ok"] is True
        ballast = fill(small)
        until(lambda: not status(config)["spool"]["ok"])
        said = status(config)["spool"]["blocked_reason"]
        assert "No space left on device" in said
        assert str(small / "audit") in said
        shown = subprocess.run([SIDECAR, "status"], capture_output=True, text=True, check=False)
        assert shown.returncode == 1
        assert "new requests are blocked: " in shown.stdout + shown.stderr
        for number in range(2, 6):
            ask(number)
        assert select.select([running.stdout], [], [], 1.5)[0] == []  # they wait
        assert running.poll() is None
        ballast.unlink()
        for number in range(2, 6):
            assert running.stdout.readline() == f"{number}\n"
        until(lambda: status(config)["spool"]["ok"])
        out, _ = running.communicate(timeout=30)
        assert (out, running.returncode) == ("", 0)
    report = verify(small / "audit")
    assert report.ok, report.findings
    asked = [
        row["operation"]["text"].split()[1]
        for row in read.records(small / "audit")
        if row["kind"] == "request" and "xxx" in (row.get("operation") or {}).get("text", "")
    ]
    assert asked == ["1", "2", "3", "4", "5"]


def test_a_full_directory_with_drop_counts_what_is_lost(
    world: tuple[FarHost, PostgresServer], small: Path
) -> None:
    hosts, _ = world
    with job(hosts, small, "  on_full: drop\n") as (running, config, ask):
        assert running.stdout is not None
        ask(1)
        assert running.stdout.readline() == "1\n"
        ballast = fill(small)
        until(lambda: not status(config)["spool"]["ok"])
        for number in range(2, 12):  # the last page of the file may take the first of them
            ask(number)
            assert running.stdout.readline() == f"{number}\n"
        shown = subprocess.run([SIDECAR, "status"], capture_output=True, text=True, check=False)
        assert "records are lost (audit.on_full: drop): " in shown.stdout + shown.stderr
        ballast.unlink()
        until(lambda: status(config)["spool"]["ok"])
        ask(12)
        assert running.stdout.readline() == "12\n"
        running.communicate(timeout=30)
    rows = list(read.records(small / "audit"))
    (gap,) = [row for row in rows if row["kind"] == "gap" and row["reason"] == "spool_dropped"]
    lost = int(gap["detail"].split()[0])
    kept = [
        row
        for row in rows
        if "xxx" in (row.get("operation") or {}).get("text", "")
        or (row["kind"] == "response" and (row.get("response") or {}).get("rows") == 1)
    ]
    assert lost > 10
    assert lost + len(kept) == 24  # twelve statements and their answers
    report = verify(small / "audit")
    assert report.ok, report.findings
    assert report.gaps["spool_dropped"] == 1


def test_a_disk_that_fails_holds_requests_up(world: tuple[FarHost, PostgresServer], tmp_path: Path) -> None:
    """Writes succeed, syncs fail: what the kernel forgets to say twice, `status` goes on saying."""
    hosts, _ = world
    with thin_disk(tmp_path) as disk:
        with job(hosts, disk.place) as (running, config, ask):
            assert running.stdout is not None
            ask(0)
            assert running.stdout.readline() == "0\n"
            disk.fill()
            answered = 0
            while status(config)["spool"]["ok"]:
                answered += 1
                assert answered < 100
                ask(answered)
                assert running.stdout.readline() == f"{answered}\n"
            waiting = range(answered + 1, answered + 4)
            for number in waiting:
                ask(number)
            assert select.select([running.stdout], [], [], 2.0)[0] == []  # they wait
            spool = status(config)["spool"]
            assert spool["ok"] is False
            assert "not on disk yet" in spool["blocked_reason"]
            assert running.poll() is None
            disk.widen()
            for number in waiting:
                assert running.stdout.readline() == f"{number}\n"
            until(lambda: status(config)["spool"]["ok"])
            out, _ = running.communicate(timeout=30)
            assert (out, running.returncode) == ("", 0)
        disk.forget()
        report = verify(disk.place / "audit")
        assert report.ok, report.findings
        rows = list(read.records(disk.place / "audit"))
    asked = [
        int(row["operation"]["text"].split()[1])
        for row in rows
        if row["kind"] == "request" and "xxx" in (row.get("operation") or {}).get("text", "")
    ]
    assert asked == list(range(answered + 4))
    assert "disk_failed" in [row["reason"] for row in rows if row["kind"] == "agent"]
