"""From a kernel's origin to a workload, with real processes: trees, users, cgroups, pids that changed
hands."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.attribution import cgroup, procfs
from sidecar.attribution.resolver import Resolver, boot_offset_ns, demands_tls, started_after
from tests.support.job_process import job, job_below, seen

ALICE = 61001


@pytest.fixture
def resolver() -> Resolver:
    return Resolver()


@pytest.fixture
def made() -> Iterator[Path]:
    mount = cgroup.mount_point()
    assert mount is not None
    directory = mount / f"attribution-{os.urandom(4).hex()}"
    directory.mkdir()
    try:
        yield directory
    finally:
        for _ in range(50):
            if not (directory / "cgroup.procs").read_text():
                break
            time.sleep(0.02)
        directory.rmdir()


def test_a_process_with_its_ancestors(resolver: Resolver) -> None:
    with job("--password=hunter2", env={"PGSSLMODE": "prefer"}) as pid:
        found = resolver.resolve(seen(pid))
        origin = found.origin
        assert (origin.pid, origin.tgid, origin.uid, origin.comm) == (pid, pid, 0, "job")
        assert origin.exe == procfs.exe(pid)
        assert origin.cmdline[-1] == "--password=****"
        assert origin.netns == os.stat("/proc/self/ns/net").st_ino
        assert not origin.exited
        assert origin.ancestors[0].pid == os.getpid()
        assert origin.ancestors[0].start_ticks == procfs.read_stat(os.getpid()).start_ticks  # type: ignore[union-attr]
        assert [ancestor.pid for ancestor in origin.ancestors] == list(
            dict.fromkeys(a.pid for a in origin.ancestors)
        )
        assert not found.client_wants_tls
        assert found.context.pids[0] == pid
        assert 1 not in found.context.pids
        assert "hunter2" not in repr(found)


def test_it_is_a_process_until_something_says_otherwise(resolver: Resolver) -> None:
    with job() as pid:
        workload = resolver.resolve(seen(pid, uid=ALICE)).workload
    assert workload.kind == "process"
    assert workload.uid == ALICE
    assert workload.ci is None
    assert dict(workload.facts)["session"] == str(os.getsid(0))


def test_a_ci_job_from_an_ancestor(resolver: Resolver) -> None:
    env = {"GITHUB_ACTIONS": "true", "GITHUB_JOB": "report", "GITHUB_REPOSITORY": "acme/reports"}
    with job_below(env=env) as (child, parent):
        found = resolver.resolve(seen(child))
        assert found.origin.ancestors[0].pid == parent
        assert found.workload.kind == "ci"
        assert found.workload.ci is not None
        assert found.workload.ci.job == "report"


@pytest.mark.root
def test_an_ancestor_outside_the_jobs_cgroup_is_not_asked(resolver: Resolver, made: Path) -> None:
    """A container engine's own CI variables, or token, are not its container's."""
    env = {"GITHUB_ACTIONS": "true", "GITHUB_JOB": "report", "SIDECAR_ID_TOKEN": "x"}
    with job_below(env=env) as (child, parent):
        (made / "cgroup.procs").write_text(str(child))
        found = resolver.resolve(seen(child, cgroup_id=made.stat().st_ino))
        assert found.origin.cgroup == f"/{made.name}"
        assert found.workload.cgroup == f"/{made.name}"
        assert found.origin.ancestors[0].pid == parent  # still recorded
        assert found.workload.ci is None
        assert found.context.pids == (child,)


def test_a_pid_that_was_used_again_is_not_believed(resolver: Resolver) -> None:
    """The process began after the connect: it is another one, and everything of procfs is dropped."""
    connected = time.monotonic_ns()
    time.sleep(0.03)
    with job("of-a-stranger", env={"SIDECAR_ID_TOKEN": "of-a-stranger", "PGSSLMODE": "require"}) as pid:
        found = resolver.resolve(seen(pid, uid=ALICE, ktime_ns=connected))
        assert found.origin.exited
        assert (found.origin.pid, found.origin.uid, found.origin.comm) == (pid, ALICE, "job")
        assert (found.origin.exe, found.origin.cmdline, found.origin.ancestors) == ("", (), ())
        assert found.context.pids == ()
        assert dict(found.context.environ) == {}
        assert not found.client_wants_tls
        # the same process, had it connected after it began
        assert not resolver.resolve(seen(pid)).origin.exited


def test_the_clocks_agree() -> None:
    """Start times count from boot in ticks, the hook's clock does not count suspended time."""
    for _ in range(20):
        with job() as pid:
            stat = procfs.read_stat(pid)
            assert stat is not None
            now = time.monotonic_ns()
            assert not started_after(stat, now)
            assert started_after(stat, now - 60_000_000_000)
            assert 0 <= now + boot_offset_ns() - stat.start_ticks * procfs.TICK_NS < 10_000_000_000


def test_a_process_that_connects_at_once_is_not_taken_for_another(resolver: Resolver) -> None:
    process = subprocess.Popen(["sleep", "30"])
    try:
        assert not resolver.resolve(seen(process.pid)).origin.exited
    finally:
        process.kill()
        process.wait()


@pytest.mark.root
def test_a_process_that_is_gone(resolver: Resolver, made: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    found = resolver.resolve(seen(process.pid, uid=ALICE, cgroup_id=made.stat().st_ino))
    assert found.origin.exited
    assert found.origin.cgroup == f"/{made.name}"
    assert found.workload.uid == ALICE
    assert found.context.exited


def test_a_zombie_is_known_by_its_parent(resolver: Resolver) -> None:
    process = subprocess.Popen(["true"])
    try:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        found = resolver.resolve(seen(process.pid))
        assert found.origin.exited
        assert found.origin.ancestors[0].pid == os.getpid()
        assert os.getpid() in found.context.pids
    finally:
        process.wait()


def test_a_parent_that_ran_another_program_is_read_again(resolver: Resolver) -> None:
    script = "read go; exec sleep 30"
    process = subprocess.Popen(
        ["sh", "-c", f"sleep 60 & echo $!; {script}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    child = int(process.stdout.readline())
    try:
        assert resolver.resolve(seen(child)).origin.ancestors[0].comm == "sh"
        process.stdin.write(b"go\n")
        process.stdin.flush()
        for _ in range(100):
            if procfs.read_stat(process.pid).comm == "sleep":  # type: ignore[union-attr]
                break
            time.sleep(0.01)
        parent = resolver.resolve(seen(child)).origin.ancestors[0]
        assert (parent.comm, parent.cmdline) == ("sleep", ("sleep", "30"))
    finally:
        os.kill(child, 9)
        process.kill()
        process.communicate()


def test_a_deep_tree_is_bounded(resolver: Resolver) -> None:
    script = 'if [ "$1" -gt 0 ]; then sh -c "$2" x $(($1 - 1)) "$2"; : ; else echo $$; read wait; fi'
    process = subprocess.Popen(
        ["sh", "-c", script, "x", "40", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        found = resolver.resolve(seen(int(process.stdout.readline())))
        assert len(found.origin.ancestors) == 32
    finally:
        process.communicate(b"go\n", timeout=10)


@pytest.mark.parametrize(
    ("environ", "cmdline", "expected"),
    [
        ({}, (), False),
        ({"PGSSLMODE": "require"}, (), True),
        ({"PGSSLMODE": "verify-ca"}, (), True),
        ({"PGSSLMODE": "verify-full"}, (), True),
        ({"PGSSLMODE": "prefer"}, (), False),
        ({"PGREQUIRESSL": "1"}, (), True),
        ({"PGREQUIRESSL": "1", "PGSSLMODE": "disable"}, (), False),
        ({}, ("psql", "host=db sslmode=require"), True),
        ({}, ("psql", "host=db sslmode = 'verify-full'"), True),
        ({}, ("psql", "postgresql://db/shop?sslmode=require&x=y"), True),
        ({}, ("psql", "host=db sslmode=prefer"), False),
        ({"PGSSLMODE": "require"}, ("psql", "host=db sslmode=disable"), False),
        ({}, ("java", "jdbc:postgresql://db/shop?ssl=true"), True),
        ({}, ("psql", "host=db sslmode=requirement"), False),
    ],
)
def test_who_demands_tls(environ: dict[str, str], cmdline: tuple[str, ...], expected: bool) -> None:
    assert demands_tls(environ, cmdline) is expected


def test_the_cost(resolver: Resolver) -> None:
    """Under 300 µs for a normal process in a job that opens connections; the bound here leaves room for a
    busy machine."""
    with job(env={"A": "x" * 2000}) as pid:
        origin = seen(pid)
        resolver.resolve(origin)
        times = []
        for _ in range(200):
            started = time.perf_counter()
            resolver.resolve(origin)
            times.append(time.perf_counter() - started)
    assert sorted(times)[20] < 600e-6
