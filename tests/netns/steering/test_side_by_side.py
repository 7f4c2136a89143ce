"""Instances beside each other: two with a job of their own under an agent at the root; each is steered by its own, none by two.

The root's agent covers the whole machine while this runs, so it covers one unusual port only.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sidecar.kernel import cgroups, steering
from tests.netns.steering.conftest import PORT, Dial, outcome
from tests.support.far_end import FarEnd
from tests.support.far_host import FarHost
from tests.support.job_cgroup import job_cgroup
from tests.support.played_inspector import PlayedInspector

pytestmark = pytest.mark.root

CONNECT = "say(socket.create_connection(FAR4, 4))"
CONNECT6 = "say(socket.create_connection(FAR6, 4))"


@pytest.fixture
def agent(host: FarHost) -> Iterator[PlayedInspector]:
    with PlayedInspector(host, scope=cgroups.cgroup2_mount(), ports=(PORT,)) as agent:
        yield agent


@pytest.fixture
def pair(host: FarHost) -> Iterator[tuple[PlayedInspector, PlayedInspector]]:
    with (
        PlayedInspector(host, ports=(PORT, 443)) as first,
        PlayedInspector(host, ports=(PORT,)) as second,
    ):
        yield first, second


@pytest.mark.parametrize("code", [CONNECT, CONNECT6], ids=["IPv4", "IPv6"])
def test_each_job_is_steered_by_its_own_instance(
    code: str,
    agent: PlayedInspector,
    pair: tuple[PlayedInspector, PlayedInspector],
    dial: Dial,
    far: FarEnd,
) -> None:
    first, second = pair
    far.packets()
    with job_cgroup() as elsewhere:
        assert outcome(dial(first.job, code)) == first.instance
        assert outcome(dial(second.job, code)) == second.instance
        assert outcome(dial(elsewhere, code)) == agent.instance
    assert [len(instance.ask("flows")) for instance in (first, second, agent)] == [1, 1, 1]
    assert f"tcp/{PORT}" not in far.packets()
    assert [event for instance in (first, second, agent) for event in instance.ask("events")] == []


def test_no_inspector_is_steered_by_anyone(
    agent: PlayedInspector, pair: tuple[PlayedInspector, PlayedInspector], host: FarHost
) -> None:
    for instance in (agent, *pair):
        assert instance.ask(f"dial {host.far_address},{PORT}") == "far"


def test_a_job_in_a_nested_cgroup_is_still_its_instances(
    agent: PlayedInspector, pair: tuple[PlayedInspector, PlayedInspector], dial: Dial
) -> None:
    nested = pair[0].job / "a" / "b"
    nested.mkdir(parents=True)
    assert outcome(dial(nested, CONNECT)) == pair[0].instance


def test_when_one_ends_the_others_go_on(
    agent: PlayedInspector, pair: tuple[PlayedInspector, PlayedInspector], dial: Dial, far: FarEnd
) -> None:
    first, second = pair
    far.packets()
    first.ask("close")
    first.process.communicate(timeout=20)
    assert steering.traces(first.instance) == []
    assert outcome(dial(second.job, CONNECT)) == second.instance
    with job_cgroup() as elsewhere:
        assert outcome(dial(elsewhere, CONNECT)) == agent.instance
    assert f"tcp/{PORT}" not in far.packets()


def test_quic_of_one_scope_is_refused_and_anothers_is_not(
    pair: tuple[PlayedInspector, PlayedInspector], dial: Dial, far: FarEnd
) -> None:
    sendto = "s = socket.socket(2, 2); s.sendto(b'x', (FAR4[0], 443)); print('sent')"
    connected = "s = socket.socket(2, 2); s.connect((FAR4[0], 443)); print('connected', flush=True); s.send(b'x'); print('sent')"
    connected6 = connected.replace("2, 2", "10, 2").replace("FAR4", "FAR6")
    first, second = pair
    for code in (sendto, connected, connected6):
        far.packets()
        assert outcome(dial(second.job, code)) == "sent"
        assert far.packets()["udp/443"] == 1
        client = dial(first.job, code)
        said = client.communicate(timeout=20)[0].split()
        assert said == (["PermissionError"] if code == sendto else ["connected", "PermissionError"])
        assert "udp/443" not in far.packets()
        (event,) = first.ask("events")
        assert (event["reason"], event["refused"]) == ("quic_refused", True)
        assert event["cgroup"] == cgroups.identifier(first.job)


def test_an_agent_at_the_root_steers_sockets_that_are_older_than_it(
    host: FarHost, dial: Dial, far: FarEnd
) -> None:
    """Measured: a socket that dials later is steered; a connection that stands already is left alone."""
    code = """
old = socket.create_connection(FAR4, 4); assert old.recv(16) == b'far'
waiting = socket.socket(); print('ready', flush=True); sys.stdin.readline()
old.sendall(b'still here'); waiting.connect(FAR4); say(waiting)
"""
    with job_cgroup() as elsewhere:
        client = dial(elsewhere, code, stdin=-1)
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        with PlayedInspector(host, scope=cgroups.cgroup2_mount(), ports=(PORT,)) as agent:
            far.packets()
            assert client.communicate("\n", timeout=20)[0].strip() == agent.instance
            assert far.packets()[f"tcp/{PORT}"] > 0  # of the connection that stood
