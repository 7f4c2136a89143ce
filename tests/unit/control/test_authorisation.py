"""Who may ask what: with real processes of other users, groups, sessions and cgroups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.approvals import grants
from sidecar.control import protocol
from sidecar.control.client import ControlClient
from sidecar.control.peer import ancestry, read_process, separates_jobs
from tests.support.control_agent import SmallAgent, origin, run_directory, serving
from tests.support.job_cgroup import job_cgroup
from tests.support.other_user import ROOT, ask, asking

pytestmark = pytest.mark.root

NOBODY = 65_534
SOMEBODY = 54_321
GAMES = 60  # a group that every Debian has; stands for the approvers' group


@pytest.fixture
def agent() -> SmallAgent:
    return SmallAgent()


@pytest.fixture
def path(agent: SmallAgent) -> Iterator[Path]:
    with run_directory() as directory, serving(agent, directory) as socket_path:
        yield socket_path


@pytest.fixture
def job() -> Iterator[subprocess.Popen[bytes]]:
    """The process whose statement is held: a session of its own."""
    with subprocess.Popen(["sleep", "300"], start_new_session=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("method", ["status", "flows", "reload", "stop"])
def test_others_get_no_state_and_it_is_recorded(agent: SmallAgent, path: Path, method: str) -> None:
    answer = ask(path, method, uid=NOBODY)
    assert answer["error"] == f"{method} needs root or the group sidecar"
    assert answer["hint"] == "run it with sudo"
    assert [(r.method, r.uid) for r in agent.refusals] == [(method, NOBODY)]
    assert not agent.stopped.is_set()
    assert agent.reloads == 0


def test_members_of_the_operators_group_get_it(
    agent: SmallAgent, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grants, "OPERATOR_GROUP", "games")
    assert ask(path, "status", uid=NOBODY, groups=(GAMES,))["result"]["instance"] == agent.instance
    assert "error" in ask(path, "status", uid=NOBODY)


def test_why_is_for_ones_own_records(agent: SmallAgent, path: Path) -> None:
    agent.records = {
        "mine": {"id": "mine", "origin": {"uid": NOBODY}},
        "theirs": {"id": "theirs", "origin": {"uid": SOMEBODY}},
        "unknown": {"id": "unknown", "origin": {"uncertain": True}},
    }
    assert ask(path, "why", "mine", uid=NOBODY)["result"]["id"] == "mine"
    for record_id in ("theirs", "unknown", "absent"):
        assert (
            ask(path, "why", record_id, uid=NOBODY)["error"]
            == f"no record {record_id} of nobody is known here"
        )
    assert set(agent.asked_uids) == {NOBODY}
    assert ask(path, "why", "theirs")["result"]["id"] == "theirs"
    assert agent.asked_uids[-1] == 0


def test_named_approvers_see_and_decide_theirs(
    agent: SmallAgent, path: Path, job: subprocess.Popen[bytes]
) -> None:
    agent.park("for-games", by=("games",), held=origin(job.pid))
    agent.park("for-root", held=origin(job.pid))
    listed = ask(path, "holds", uid=NOBODY, groups=(GAMES,))["result"]
    assert [view["id"] for view in listed] == ["for-games"]
    assert ask(path, "holds", uid=NOBODY)["result"] == []
    assert "no hold" in ask(path, "hold", "for-root", uid=NOBODY, groups=(GAMES,))["error"]
    done = ask(path, "decide", "for-games", True, "dressed up as root", uid=NOBODY, groups=(GAMES,))["result"]
    assert (done["state"], done["decided_by"]) == ("approved", "nobody")


def test_others_may_not_decide_and_it_is_recorded(
    agent: SmallAgent, path: Path, job: subprocess.Popen[bytes]
) -> None:
    agent.park("h", by=("games",), held=origin(job.pid))
    answer = ask(path, "decide", "h", True, uid=NOBODY)
    assert answer["error"] == "nobody may not decide this hold"
    assert answer["hint"] == "it takes root, or a user or group named games"
    assert [(r.method, r.subject, r.uid) for r in agent.refusals] == [("decide", "h", NOBODY)]
    assert [grant.state.value for grant in agent.grants] == ["pending"]


def test_an_unprivileged_user_cannot_keep_the_approver_out(path: Path) -> None:
    code = (
        "import socket, sys, time\n"
        "kept = []\n"
        "for _ in range(200):\n"
        "    s = socket.socket(socket.AF_UNIX); s.settimeout(5)\n"
        "    try: s.connect(sys.argv[1]); kept.append(s)\n"
        "    except OSError: time.sleep(0.01)  # a full backlog, which is the point\n"
        "    if len(kept) > 40: kept.pop(20)\n"
        "print('full', flush=True); sys.stdin.read()\n"
    )

    def become() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        preexec_fn=become,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as flood:
        assert flood.stdout is not None
        assert flood.stdout.readline() == "full\n"
        with ControlClient(path) as client:
            client.status()
        flood.kill()
    assert protocol.MAX_CLIENTS_PER_UID < protocol.MAX_CLIENTS


# a job cannot approve itself


def decide_refused(agent: SmallAgent, answer: dict[str, str], why: str) -> None:
    assert answer.get("error") == f"a job cannot approve itself: {why}"
    assert agent.refusals[-1].cause == why
    assert [grant.state.value for grant in agent.grants] == ["pending"]


def test_a_descendant_of_the_held_process_is_refused(agent: SmallAgent, path: Path) -> None:
    """The shell is the held process; what it runs in a session of its own asks for the approval."""
    script = 'read go; setsid "$@"'
    with subprocess.Popen(
        ["sh", "-c", script, "sh", *asking(path, "decide", "h", True)],
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    ) as shell:
        agent.park("h", held=origin(shell.pid))
        out, _ = shell.communicate(b"go\n", timeout=30)
    decide_refused(agent, json.loads(out), "it descends from the process whose statement is held")


def test_a_sibling_in_the_same_session_is_refused(agent: SmallAgent, path: Path) -> None:
    """`psql & sidecar approvals approve …` in one script."""
    script = 'sleep 300 & echo $!; read go; "$@"; kill %1'
    with subprocess.Popen(
        ["bash", "-c", script, "bash", *asking(path, "decide", "h", True)],
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as shell:
        assert shell.stdout is not None
        held = int(shell.stdout.readline())
        agent.park("h", held=origin(held))
        out, _ = shell.communicate("go\n", timeout=30)
    decide_refused(agent, json.loads(out), "it shares a session with the process whose statement is held")


def test_the_same_unprivileged_user_is_refused(agent: SmallAgent, path: Path) -> None:
    with subprocess.Popen(["sleep", "300"], start_new_session=True, user=NOBODY, group=NOBODY) as held:
        agent.park("h", by=("nobody", "games"), held=origin(held.pid, uid=NOBODY))
        answer = ask(path, "decide", "h", True, uid=NOBODY, session=True)
        decide_refused(agent, answer, "it runs as nobody, like the process whose statement is held")
        assert ask(path, "decide", "h", True, uid=SOMEBODY, groups=(GAMES,))["result"]["state"] == "approved"
        held.kill()


def test_whoever_shares_the_jobs_cgroup_is_refused(agent: SmallAgent, path: Path) -> None:
    with (
        job_cgroup() as cgroup,
        subprocess.Popen(
            ["sleep", "300"],
            start_new_session=True,
            preexec_fn=lambda: (cgroup / "cgroup.procs").write_text("0") and None,
        ) as held,
    ):
        shown = f"/{cgroup.parent.name}/job"
        agent.park("h", held=origin(held.pid, cgroup=shown))
        answer = ask(path, "decide", "h", True, session=True, cgroup=cgroup)
        decide_refused(
            agent, answer, f"it shares the cgroup {shown} with the process whose statement is held"
        )
        assert ask(path, "decide", "h", True)["result"]["state"] == "approved"
        held.kill()


def test_where_a_cgroup_separates_the_caller_of_exec_may_decide(agent: SmallAgent, path: Path) -> None:
    """The held process is in this very session, as `sidecar exec` from a script that plays the approver as
    well."""
    with (
        job_cgroup() as cgroup,
        subprocess.Popen(
            ["sleep", "300"], preexec_fn=lambda: (cgroup / "cgroup.procs").write_text("0") and None
        ) as held,
    ):
        agent.park("h", held=origin(held.pid, cgroup=f"/{cgroup.parent.name}/job"))
        assert ask(path, "decide", "h", True)["result"]["state"] == "approved"
        held.kill()


def test_a_steered_process_is_refused(agent: SmallAgent, path: Path, job: subprocess.Popen[bytes]) -> None:
    """Also for another job's hold."""
    with job_cgroup() as cgroup:
        agent.steered_cgroups = (f"/{cgroup.parent.name}/job",)
        agent.park("h", held=origin(job.pid))
        answer = ask(path, "decide", "h", True, cgroup=cgroup, session=True)
        decide_refused(agent, answer, "it comes from inside a steered job")


def test_a_process_that_has_ended_decides_nothing(
    agent: SmallAgent, path: Path, job: subprocess.Popen[bytes]
) -> None:
    """It connects, hands the connection to a child and ends: nobody could say whose the child is."""
    agent.park("h", held=origin(job.pid))
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from sidecar.control.client import ControlClient\n"
        "from sidecar.errors import ControlError\n"
        "client = ControlClient(Path(sys.argv[1]))\n"
        "parent = os.getpid()\n"
        "if os.fork(): os._exit(0)\n"
        "while os.getppid() == parent: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "try: client.decide('h', True)\n"
        "except ControlError as error: print(error, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "the process that asks has ended" in done.stdout
    assert [grant.state.value for grant in agent.grants] == ["pending"]


def test_without_an_origin_only_root_decides(agent: SmallAgent, path: Path) -> None:
    agent.park("h", by=("games",))
    answer = ask(path, "decide", "h", True, uid=NOBODY, groups=(GAMES,))
    decide_refused(agent, answer, "the origin of the held statement is unknown: only root may decide")
    assert ask(path, "decide", "h", True)["result"]["state"] == "approved"


def test_children_of_the_agent_are_the_page(agent: SmallAgent) -> None:
    """Although they share a session with the job, where an agent was started from the same terminal."""
    with (
        run_directory() as directory,
        serving(agent, directory, relay_parent=os.getpid()) as path,
        subprocess.Popen(["sleep", "300"]) as held,
    ):
        agent.park("h", held=origin(held.pid))
        assert ask(path, "decide", "h", True, "web page")["result"]["decided_by"] == "root (web page)"
        held.kill()


def test_ancestry_of_this_process() -> None:
    line = ancestry(os.getpid())
    assert [line[0].pid, line[0].ppid] == [os.getpid(), os.getppid()]
    assert line[0].session == os.getsid(0)
    assert line[-1].ppid <= 1
    assert read_process(2**22 + 1) is None


def test_a_reused_pid_ends_the_ancestry(tmp_path: Path) -> None:
    def process(pid: int, ppid: int, start: int) -> None:
        directory = tmp_path / str(pid)
        directory.mkdir()
        fields = ["S", str(ppid), "1", "1", *["0"] * 15, str(start), "0"]
        (directory / "stat").write_text(f"{pid} (a) b) {' '.join(fields)}\n")
        (directory / "cgroup").write_text("1:name=systemd:/x\n0::/here\n")

    process(30, 20, 900)
    process(20, 10, 500)
    process(10, 1, 600)  # younger than its child: not its parent
    line = ancestry(30, tmp_path)
    assert [facts.pid for facts in line] == [30, 20]
    assert (line[0].comm, line[0].cgroup) == ("a) b", "/here")


@pytest.mark.parametrize(
    ("cgroup", "separates"),
    [
        ("/", False),
        ("", False),
        ("/user.slice/user-1000.slice/session-3.scope", False),
        ("/system.slice/actions-runner.service", True),
        ("/sidecar/0a0a0a0a/job", True),
    ],
)
def test_which_cgroups_separate_jobs(cgroup: str, separates: bool) -> None:
    assert separates_jobs(cgroup) is separates
