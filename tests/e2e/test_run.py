"""`sidecar run` as a whole process, for each kind of scope: who is steered and who is not, what it says of itself, and that nothing of
it is left when it has ended.

It runs in the near namespace: scope `all` covers this whole machine, but connections of other namespaces are only recorded.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.audit.verify import verify
from sidecar.kernel import cgroups, removal, run_state, steering
from tests.support.far_host import FarHost
from tests.support.http_far import HttpFar
from tests.support.job_cgroup import job_cgroup
from tests.support.running_agent import Run, ask, exported, is_steered
from tests.support.steered_job import SIDECAR

pytestmark = [pytest.mark.root, pytest.mark.servers]


@pytest.fixture(scope="module")
def hosts() -> Iterator[FarHost]:
    with FarHost() as hosts, HttpFar(hosts):
        yield hosts


def nothing_is_left(run: Run) -> None:
    assert run.end() == 0, "".join(run.said)
    assert "Traceback" not in "".join(run.said)
    assert steering.traces(run.instance) == []
    assert run.instance not in removal.known_instances()
    tables = run.hosts.run(run.hosts.near, ["nft", "list", "tables"]).stdout
    assert run.instance not in tables
    assert verify(run.audit).ok
    assert [row["reason"] for row in exported(run.audit) if row["kind"] == "agent"] == ["started", "stopped"]


def test_all_steers_every_process_of_the_host(hosts: FarHost, tmp_path: Path) -> None:
    with Run(hosts, tmp_path / "run", "all") as run, job_cgroup() as elsewhere:
        assert is_steered(ask(hosts, None))
        assert is_steered(ask(hosts, elsewhere))
        found = run.status()
        assert found["ok"], found["complaints"]
        assert found["mode"] == "run"
        nothing_is_left(run)
        assert not is_steered(ask(hosts, elsewhere))
    assert len([row for row in exported(run.audit) if row["kind"] == "request"]) == 2


def test_cgroups_steers_these_and_what_is_below_them(hosts: FarHost, tmp_path: Path) -> None:
    with job_cgroup() as job, job_cgroup() as elsewhere:
        path = "/" + str(job.relative_to(cgroups.cgroup2_mount()))
        below = job / "step"
        below.mkdir()
        try:
            with Run(hosts, tmp_path / "run", f"{{cgroups: [{path}]}}") as run:
                assert is_steered(ask(hosts, job))
                assert is_steered(ask(hosts, below))
                assert not is_steered(ask(hosts, elsewhere))
                assert run.status()["ok"]
                nothing_is_left(run)
        finally:
            below.rmdir()


def test_exec_steers_nobody_but_what_exec_runs(hosts: FarHost, tmp_path: Path) -> None:
    with Run(hosts, tmp_path / "run", "exec") as run:
        assert not is_steered(ask(hosts, None))
        url = f"http://{hosts.far_address}:8080/customers"
        job = Run(hosts, tmp_path / "job", "exec")
        command = [SIDECAR, "exec", "-c", str(job.config), "--", "curl", "-sS", "-m", "10", url]
        assert is_steered(hosts.run(hosts.near, command).stdout)
        assert run.status()["ok"]
        nothing_is_left(run)


def second(hosts: FarHost, where: str, directory: Path, scope: str) -> subprocess.CompletedProcess[str]:
    """A `run` that is expected to end by itself."""
    run = Run(hosts, directory, scope)
    return hosts.run(where, ["timeout", "-s", "TERM", "20", SIDECAR, "run", "-c", str(run.config)])


def test_a_second_agent_over_the_same_scope_is_refused(hosts: FarHost, tmp_path: Path) -> None:
    with job_cgroup() as job, job_cgroup() as elsewhere:
        root = cgroups.cgroup2_mount()
        path, other = (f"/{cgroup.relative_to(root)}" for cgroup in (job, elsewhere))
        below = f"{{cgroups: [{path}]}}"
        above = f"{{cgroups: [{Path(path).parent}]}}"
        with Run(hosts, tmp_path / "first", below) as run:
            before = set(removal.known_instances())
            for number, scope in enumerate((below, above, "all", f"{{cgroups: [{other}, {path}]}}")):
                done = second(hosts, hosts.near, tmp_path / f"second{number}", scope)
                assert done.returncode == 3, done.stderr
                assert (
                    f"instance {run.instance} (pid {run.process.pid}) steers the cgroup {job} already"
                    in done.stderr
                )
                assert (
                    f"hint: one agent a scope. sidecar status; to end that one: sidecar down --instance {run.instance}"
                    in done.stderr
                )
                assert not (tmp_path / f"second{number}" / "audit").exists()
            assert set(removal.known_instances()) == before
            with Run(hosts, tmp_path / "beside", f"{{cgroups: [{other}]}}") as beside:
                assert is_steered(ask(hosts, job))
                assert is_steered(ask(hosts, elsewhere))
                assert beside.status()["mode"] == run.status()["mode"] == "run"
            assert is_steered(ask(hosts, job))
            nothing_is_left(run)


def test_a_killed_agents_scope_is_free(hosts: FarHost, tmp_path: Path) -> None:
    with job_cgroup() as job:
        scope = f"{{cgroups: [/{job.relative_to(cgroups.cgroup2_mount())}]}}"
        with Run(hosts, tmp_path / "first", scope) as dead:
            dead.process.kill()
            dead.process.wait(10)
            with Run(hosts, tmp_path / "second", scope) as successor:
                assert is_steered(ask(hosts, job))
                assert steering.traces(dead.instance) == []
                nothing_is_left(successor)


def test_a_cgroup_that_is_not_there_is_named(hosts: FarHost, tmp_path: Path) -> None:
    done = second(hosts, hosts.near, tmp_path / "run", "{cgroups: [/no-such.slice]}")
    assert done.returncode == 3
    assert "there is no cgroup /no-such.slice" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_that_start_at_once_are_never_both_let(tmp_path: Path) -> None:
    """The claim and the look at the others are one step."""
    names = ("a0000001", "a0000002", "a0000003")
    code = "import sys; from pathlib import Path; from sidecar.kernel import run_state; run_state.claim(sys.argv[1], [Path('/none')]); print('claimed', flush=True); input()"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    try:
        with contextlib.ExitStack() as stack:
            said = []
            for process in started:
                stack.enter_context(process)
                assert process.stdout is not None
                said.append(process.stdout.readline().strip())
            assert sorted(said) == ["", "", "claimed"]
            for process in started:
                process.communicate("\n", timeout=20)
    finally:
        for name in names:
            run_state.end(name)
