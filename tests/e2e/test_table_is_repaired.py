"""Somebody changes our nft table under a running agent: it is put back as soon as the kernel tells of it, every time, and recorded."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.kernel import cgroups
from tests.support.far_host import FarHost
from tests.support.http_far import HttpFar
from tests.support.job_cgroup import job_cgroup
from tests.support.running_agent import Run, ask, exported, is_steered

pytestmark = [pytest.mark.root, pytest.mark.servers]

CHANGES = {
    "all is flushed": "flush ruleset",
    "the table is deleted": "delete table inet {table}",
    "a rule before ours": "insert rule inet {table} steer accept",
    "our rule is gone": "flush chain inet {table} steer",
    "our chain is gone": "flush chain inet {table} steer; delete chain inet {table} steer",
    "the table sleeps": "add table inet {table} {{ flags dormant; }}",
    "a chain of its own": "add chain inet {table} foreign {{ type filter hook output priority 0; policy drop; }}",
}
SOON_S = 0.2
"""Well below the half second of a beat: ten times by chance would be one in ten thousand."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[FarHost]:
    with FarHost() as hosts, HttpFar(hosts):
        yield hosts


@pytest.fixture
def job() -> Iterator[Path]:
    with job_cgroup() as job:
        yield job


@pytest.fixture
def run(hosts: FarHost, job: Path, tmp_path: Path) -> Iterator[Run]:
    with Run(hosts, tmp_path / "run", f"{{cgroups: [/{job.relative_to(cgroups.cgroup2_mount())}]}}") as run:
        yield run


def ruleset(hosts: FarHost) -> str:
    return hosts.run(hosts.near, ["nft", "list", "ruleset"]).stdout


def eventually_stands(hosts: FarHost, stands: str) -> float:
    """How long that takes, in seconds."""
    begun = time.monotonic()
    while ruleset(hosts) != stands:
        assert time.monotonic() - begun < 5
    return time.monotonic() - begun


def test_every_change_is_repaired_and_recorded(hosts: FarHost, job: Path, run: Run) -> None:
    stands = ruleset(hosts)
    assert f"table inet sidecar_{run.instance}" in stands
    for change in CHANGES.values():
        done = hosts.run(hosts.near, ["nft", change.format(table=f"sidecar_{run.instance}")])
        assert done.returncode == 0, done.stderr
        eventually_stands(hosts, stands)
        assert is_steered(ask(hosts, job))
        assert ruleset(hosts) == stands
    status = run.status()
    assert status["steering"]["drift_count"] >= len(CHANGES)
    assert all(drift["name"] == "table" and drift["repaired"] for drift in status["steering"]["drifts"])
    run.end()
    gaps = [row for row in exported(run.audit) if row["kind"] == "gap" and row["reason"] == "table_changed"]
    assert len(gaps) == status["steering"]["drift_count"]
    assert {gap["detail"] for gap in gaps} >= {
        "table: the table is gone or dormant; repaired",
        "table: chain steer was changed; repaired",
        "table: chain steer is gone; repaired",
        "table: chain foreign was changed; repaired",
    }


def test_a_flushed_table_is_noticed_at_once(hosts: FarHost, run: Run) -> None:
    stands = ruleset(hosts)
    took = []
    for _ in range(11):
        time.sleep(random.uniform(0.3, 0.8))  # at any time between two beats
        assert hosts.run(hosts.near, ["nft", "flush ruleset"]).returncode == 0
        took.append(eventually_stands(hosts, stands))
    assert sorted(took)[9] < SOON_S, took  # one may meet a busy moment


def test_changes_of_others_are_no_drift(hosts: FarHost, run: Run) -> None:
    for number in range(20):
        subprocess.run(
            ["nsenter", f"--net=/run/netns/{hosts.near}", "nft", f"add table inet other{number}"], check=True
        )
    assert run.status()["steering"]["drift_count"] == 0
    assert run.status()["ok"]
