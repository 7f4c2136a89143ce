"""What happens to covered connections when the inspector, its rules or its supervisor fail; and what is left afterwards."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sidecar.kernel import cgroups, maps, nft, steering
from sidecar.kernel.run_state import RUN_DIRECTORY
from tests.netns.steering.conftest import PORT, Dial, outcome
from tests.support.far_end import FarEnd
from tests.support.far_host import FarHost
from tests.support.job_cgroup import job_cgroup
from tests.support.played_inspector import ROOT, PlayedInspector

pytestmark = pytest.mark.root

CONNECT = "say(socket.create_connection(FAR4, 4))"
CONNECT6 = "say(socket.create_connection(FAR6, 4))"
NOBODY = 65534
TIMEOUT_S = 1.0


def in_near(host: FarHost, code: str) -> str:
    """Removal belongs to the network namespace whose tables it removes."""
    done = host.run(host.near, [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("code", [CONNECT, CONNECT6], ids=["IPv4", "IPv6"])
def test_a_hung_supervisor_refuses_at_once_and_recovers(
    code: str, host: FarHost, dial: Dial, far: FarEnd
) -> None:
    with PlayedInspector(host, ports=(PORT,), heartbeat_timeout_s=TIMEOUT_S) as inspector:
        inspector.ask("hold")
        time.sleep(TIMEOUT_S + 0.3)
        begun = time.monotonic()
        assert outcome(dial(inspector.job, code)) == "PermissionError"
        assert time.monotonic() - begun < 2
        (event,) = inspector.ask("events")
        assert (event["reason"], event["refused"]) == ("refused_by_kernel", True)
        inspector.ask("go")
        assert outcome(dial(inspector.job, code)) == inspector.instance
    assert f"tcp/{PORT}" not in far.packets()


def test_on_failure_open_lets_through_and_says_so(host: FarHost, dial: Dial, far: FarEnd) -> None:
    with PlayedInspector(host, ports=(PORT,), heartbeat_timeout_s=TIMEOUT_S, on_failure="open") as inspector:
        assert outcome(dial(inspector.job, CONNECT)) == inspector.instance
        inspector.ask("hold")
        time.sleep(TIMEOUT_S + 0.3)
        far.packets()
        client = dial(inspector.job, CONNECT)
        assert outcome(client) == "far"
        assert far.packets()[f"tcp/{PORT}"] > 0
        (event,) = inspector.ask("events")
        assert (event["reason"], event["refused"], event["tgid"]) == ("fail_open", False, client.pid)
        assert event["to"] == f"{host.far_address}:{PORT}"


def test_without_listener_both_families_are_refused_at_once(host: FarHost, dial: Dial, far: FarEnd) -> None:
    with PlayedInspector(host, ports=(PORT,)) as inspector:
        inspector.ask("deaf")
        for code in (CONNECT, CONNECT6):
            assert outcome(dial(inspector.job, code)) == "ConnectionRefusedError"
    assert f"tcp/{PORT}" not in far.packets()


def test_a_detached_hook_and_a_changed_table_are_put_back(host: FarHost, dial: Dial) -> None:
    with PlayedInspector(host, ports=(PORT,)) as inspector:
        kind = maps.ATTACH_TYPES["sidecar_connect4"]
        (number,) = maps.attached_ids(inspector.job, kind)
        program = maps.program_fd(number)
        assert program is not None
        inspector.ask("hold")
        assert maps.detach(program, inspector.job, kind)
        for command in (
            f"insert rule inet sidecar_{inspector.instance} steer accept",
            f"add table inet sidecar_{inspector.instance} {{ flags dormant; }}",
        ):
            assert host.run(host.near, ["nft", command]).returncode == 0
        inspector.ask("go")
        drifts = inspector.ask("drifts")
        assert [drift.split(":")[0] for drift in drifts] == ["hook", "table"]
        assert "sidecar_connect4" in drifts[0]
        assert maps.attached_ids(inspector.job, kind) == [number]
        assert outcome(dial(inspector.job, CONNECT)) == inspector.instance
        assert inspector.ask("drifts") == []


def test_a_killed_supervisor_fails_closed_until_removed(host: FarHost, dial: Dial, far: FarEnd) -> None:
    with PlayedInspector(host, ports=(PORT,), heartbeat_timeout_s=TIMEOUT_S) as inspector:
        assert outcome(dial(inspector.job, CONNECT)) == inspector.instance
        inspector.kill()
        # Before the heartbeat is stale: the redirect meets no listener.
        assert outcome(dial(inspector.job, CONNECT)) in ("ConnectionRefusedError", "PermissionError")
        bind = f"s = socket.socket(); s.setsockopt(1, 2, 1); s.bind(('127.0.0.1', {inspector.port})); print('bound')"
        bind6 = f"s = socket.socket(10); s.bind(('::', {inspector.port})); print('bound')"
        with job_cgroup() as elsewhere:
            for uid, code in ((NOBODY, bind), (NOBODY, bind6), (0, bind)):
                assert outcome(dial(elsewhere, code, uid=uid)) == "PermissionError"
        time.sleep(TIMEOUT_S)
        assert outcome(dial(inspector.job, CONNECT)) == "PermissionError"
        assert f"tcp/{PORT}" not in far.packets()
        removal = f"from sidecar.kernel.steering import remove_all, traces; print(len(remove_all('{inspector.instance}')), traces('{inspector.instance}'), remove_all('{inspector.instance}'))"
        removed, *rest = in_near(host, removal).split()
        assert int(removed) == 7 + 1 + 3  # hooks, table, cgroups
        assert rest == ["[]", "[]"]
        assert not (RUN_DIRECTORY / inspector.instance).exists()
        with job_cgroup() as elsewhere:
            assert outcome(dial(elsewhere, bind, uid=NOBODY)) == "bound"


def test_a_job_whose_inspector_died_falls_to_the_agent_at_the_root(
    host: FarHost, dial: Dial, far: FarEnd
) -> None:
    """Never to nobody: while the dead instance's state stands its hooks refuse, and once it is removed the agent covers."""
    with PlayedInspector(host, scope=cgroups.cgroup2_mount(), ports=(PORT,)) as agent:
        with PlayedInspector(host, ports=(PORT,), heartbeat_timeout_s=TIMEOUT_S) as inspector:
            code = """
print('ready', flush=True)
for _ in range(2):
    sys.stdin.readline()
    try: say(socket.create_connection(FAR4, 4))
    except OSError as error: print(type(error).__name__)
    sys.stdout.flush()
"""
            client = dial(inspector.job, code, stdin=subprocess.PIPE)
            assert client.stdin is not None
            assert client.stdout is not None
            assert client.stdout.readline() == "ready\n"
            inspector.kill()
            time.sleep(TIMEOUT_S + 0.3)
            client.stdin.write("\n")
            client.stdin.flush()
            assert client.stdout.readline() == "PermissionError\n"
            in_near(
                host, f"from sidecar.kernel.steering import remove_all; remove_all('{inspector.instance}')"
            )
            assert client.communicate("\n", timeout=20)[0].strip() == agent.instance
        assert f"tcp/{PORT}" not in far.packets()


def test_another_jobs_beginning_does_not_set_a_dead_ones_job_free(
    host: FarHost, dial: Dial, far: FarEnd
) -> None:
    """Found by these tests: a starting instance removed every dead one's hooks, and what still ran there dialled unseen."""
    far.packets()
    with PlayedInspector(host, ports=(PORT,), heartbeat_timeout_s=TIMEOUT_S) as dead:
        code = "print('ready', flush=True); sys.stdin.readline(); say(socket.create_connection(FAR4, 4))"
        client = dial(dead.job, code, stdin=subprocess.PIPE)
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        dead.kill()
        time.sleep(TIMEOUT_S + 0.3)
        with PlayedInspector(host, ports=(PORT,)):
            assert client.communicate("\n", timeout=20)[0].strip() == "PermissionError"
            assert steering.traces(dead.instance) != []
        with PlayedInspector(host, ports=(PORT,)):  # now nobody lives there any more
            assert steering.traces(dead.instance) == []
    assert f"tcp/{PORT}" not in far.packets()


def test_a_successor_removes_its_dead_predecessor_after_its_own_hooks_stand(
    host: FarHost, dial: Dial, far: FarEnd
) -> None:
    """ALLOW_MULTI takes the strictest answer: a dead instance at the root would refuse for ever."""
    root = cgroups.cgroup2_mount()
    with PlayedInspector(host, scope=root, ports=(PORT,), heartbeat_timeout_s=TIMEOUT_S) as dead:
        dead.kill()
        time.sleep(TIMEOUT_S + 0.3)
        with job_cgroup() as elsewhere:
            assert outcome(dial(elsewhere, CONNECT)) == "PermissionError"
            with PlayedInspector(host, scope=root, ports=(PORT,)) as successor:
                assert outcome(dial(elsewhere, CONNECT)) == successor.instance
                assert in_near(host, f"from sidecar.kernel.steering import traces; print(traces('{dead.instance}'))") == "[]"  # fmt: skip
        assert f"tcp/{PORT}" not in far.packets()


def test_hooks_that_no_state_file_names_are_found_by_name(host: FarHost) -> None:
    with PlayedInspector(host, ports=(PORT,)) as inspector:
        state = RUN_DIRECTORY / inspector.instance / "steering.json"
        inspector.ask("hold")
        text = state.read_text()
        state.unlink()
        try:
            found = [trace for trace in steering.traces() if str(inspector.job) in trace and "hook" in trace]
        finally:
            state.write_text(text)
        assert len(found) == 5
    assert not Path(state).exists()


def test_unsteered_clients_are_turned_away_at_the_listener(host: FarHost, dial: Dial) -> None:
    with PlayedInspector(host, ports=(PORT,)) as inspector, job_cgroup() as elsewhere:
        for target in (("127.0.0.1", inspector.port), ("::1", inspector.port)):
            assert (
                outcome(dial(elsewhere, f"say(socket.create_connection({target}, 4))"))
                == "ConnectionRefusedError"
            )
        assert inspector.ask("flows") == []


@pytest.mark.parametrize("what", ["refuse", "record"])
def test_another_network_namespace(what: str, host: FarHost, dial: Dial) -> None:
    """In a new namespace loopback is down: a connection that was let through ends with another error than a refusal by the hook."""
    with PlayedInspector(host, ports=(PORT,), foreign_netns=what) as inspector:
        code = (
            "import subprocess; ctypes.CDLL(None).unshare(0x40000000); s = socket.create_connection(FAR4, 1)"
        )
        assert outcome(dial(inspector.job, code)) == ("PermissionError" if what == "refuse" else "OSError")
        (event,) = inspector.ask("events")
        assert (event["reason"], event["refused"]) == ("foreign_netns", what == "refuse")


def test_an_event_storm_is_counted(host: FarHost, dial: Dial) -> None:
    with PlayedInspector(host, ports=(PORT, 443)) as inspector:
        code = """
s = socket.socket(2, 2)
for _ in range(6000):
    try: s.sendto(b'x', (FAR4[0], 443))
    except PermissionError: pass
"""
        client = dial(inspector.job, code)
        client.communicate(timeout=20)
        events = inspector.ask("events")
        lost = [event for event in events if event["reason"] == "events_lost"]
        assert len(lost) == 1
        assert all(event["tgid"] == client.pid for event in events if event not in lost)
        assert inspector.ask("events") == []


def test_nothing_is_left(host: FarHost) -> None:
    with PlayedInspector(host, ports=(PORT,)) as inspector:
        assert steering.traces(inspector.instance) != []
    assert steering.traces(inspector.instance) == []
    left = in_near(host, "from sidecar.kernel import nft; print(nft.tables())")
    assert nft.table_name(inspector.instance) not in left
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", inspector.port))
