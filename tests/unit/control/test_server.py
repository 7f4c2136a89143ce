"""The control socket with real connections: framing, bounds, and that each answer reaches the one who may
have it."""

from __future__ import annotations

import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from sidecar.control import protocol
from sidecar.control.client import Approvals, ControlClient, discover, known_instances
from sidecar.control.protocol import (
    DriftStatus,
    FlowRow,
    IdentityStatus,
    PolicyStatus,
    Reply,
    Request,
    SpoolStatus,
    Status,
    SteeringStatus,
    WorkerStatus,
)
from sidecar.errors import ControlError
from tests.support.control_agent import SmallAgent, origin, run_directory, serving

pytestmark = pytest.mark.root  # most answers are for root and the group sidecar


@pytest.fixture
def agent() -> SmallAgent:
    return SmallAgent()


@pytest.fixture
def directory() -> Iterator[Path]:
    with run_directory() as made:
        yield made


@pytest.fixture
def path(agent: SmallAgent, directory: Path) -> Iterator[Path]:
    with serving(agent, directory) as socket_path:
        yield socket_path


def exchange(path: Path, data: bytes) -> Reply:
    """Send raw bytes, read one reply."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(path))
        raw.sendall(data)
        with raw.makefile("rb") as stream:
            size = int.from_bytes(stream.read(4), "big")
            return protocol.decode_reply(stream.read(size))


def test_status_arrives_as_it_was(agent: SmallAgent, path: Path) -> None:
    agent.state = Status(
        instance="0a0a0a0a",
        pid=7,
        version="1.2",
        mode="exec",
        started_ns=5,
        scope=("/ci.slice",),
        ports={5432: "postgres", 80: "auto"},
        policy=PolicyStatus("p.yaml", "ff", 3, "line 4", 2, 1),
        workers=(WorkerStatus(9, 1, 2, 3),),
        spool=SpoolStatus(False, "full", True, 1, 2, "/var/x"),
        steering=SteeringStatus(False, "open", 1, (DriftStatus("table", "flushed", True, 8),), 1, 4),
        identity=IdentityStatus(True, ("https://i",), 1, 2, "unreachable"),
        gaps={"encrypted": 3},
        limitations=("no containers",),
        command=("psql",),
    )
    with ControlClient(path) as client:
        assert client.status() == agent.state
        assert client.status() == agent.state  # one connection, several questions


def test_flows_once_and_as_a_stream(agent: SmallAgent, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "WATCH_INTERVAL_S", 0.05)
    first = FlowRow("f1", 1, 2, "/bin/psql", 0, "s", "db:5432", "postgres", 3, 1, 10, 20)
    agent.rows = [first]
    with ControlClient(path) as client:
        assert client.flows() == [first]
        stream = client.watch_flows()
        assert next(stream) == [first]
        agent.rows = []
        deadline = time.monotonic() + 10
        while next(stream):
            assert time.monotonic() < deadline
    with ControlClient(path) as client:
        assert client.flows() == []


def test_reload_and_stop(agent: SmallAgent, path: Path) -> None:
    with ControlClient(path) as client:
        client.reload()
        client.stop()
    assert agent.reloads == 1
    assert agent.stopped.is_set()


def test_holds_are_decided_once(agent: SmallAgent, path: Path, directory: Path) -> None:
    agent.park("019aaaaa-1111", held=origin(999_999_999))
    gateway = Approvals(directory)
    assert [view.state for view in gateway.views()] == ["pending"]
    assert gateway.find("a-1111").statement == "DELETE FROM t"
    done = gateway.decide_view("a-1111", True, reason="checked with finance")
    assert (done.state, done.decided_by, done.decision_reason) == ("approved", "root", "checked with finance")
    with pytest.raises(ControlError, match="approved already, by root"):
        gateway.decide_view("a-1111", False)


def test_a_short_id_has_to_be_unambiguous(agent: SmallAgent, path: Path, directory: Path) -> None:
    agent.park("019aaaaa-1111")
    agent.park("019bbbbb-1111")
    gateway = Approvals(directory)
    with pytest.raises(ControlError, match="2 holds end in 1111"):
        gateway.find("1111")
    assert gateway.find("b-1111").id == "019bbbbb-1111"
    with pytest.raises(ControlError, match="at least 4 digits"):
        gateway.find("")
    with pytest.raises(ControlError, match="no hold 2222"):
        gateway.find("2222")


def test_a_missing_hold_is_an_error(path: Path) -> None:
    with ControlClient(path) as client:
        for ask in (lambda: client.hold("nope"), lambda: client.decide("nope", True)):
            with pytest.raises(ControlError, match="no .*hold"):
                ask()


def test_a_label_of_the_page_is_shown_beside_root(agent: SmallAgent, path: Path) -> None:
    agent.park("h")
    with ControlClient(path) as client:
        assert (
            client.decide("h", False, by="web page,\x1b[31m alice").decided_by == "root (web page,[31m alice)"
        )


def test_discovery_sees_the_living_only(agent: SmallAgent, directory: Path) -> None:
    assert discover(directory / "absent") == []
    dead = directory / "0b0b0b0b" / "control.sock"
    dead.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(dead))
    with serving(agent, directory):
        assert [entry.instance for entry in discover(directory)] == ["0a0a0a0a"]
        assert known_instances(directory) == ["0a0a0a0a", "0b0b0b0b"]
    assert discover(directory) == []


def test_a_dead_agents_socket_is_replaced_and_a_living_ones_is_not(
    agent: SmallAgent, directory: Path
) -> None:
    stale = directory / agent.instance / "control.sock"
    stale.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(stale))
    with serving(agent, directory) as path:
        with pytest.raises(ControlError, match="another agent answers"), serving(SmallAgent(), directory):
            pass
        with ControlClient(path) as client:
            assert client.status().instance == agent.instance
    assert not stale.exists()


def test_modes(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o711


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x01",
        msgspec.msgpack.encode({"args": {}}),
        msgspec.msgpack.encode({"method": 3}),
        b"\xff" * 50,
    ],
)
def test_garbage_is_answered_and_hurts_nobody(path: Path, body: bytes) -> None:
    reply = exchange(path, len(body).to_bytes(4, "big") + body)
    assert reply.error is not None
    assert "not a request" in reply.error
    with ControlClient(path) as client:
        client.status()


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request("format_disk"), "unknown request"),
        (Request("hold"), "needs `id`"),
        (Request("hold", {"id": 7}), "needs `id`"),
        (Request("decide", {"id": "h"}), "a decision needs `approve`"),
        (Request("decide", {"id": "h", "approve": "yes"}), "a decision needs `approve`"),
        (Request("why", {}), "needs `id`"),
    ],
)
def test_wrong_requests_say_what_is_wrong(
    agent: SmallAgent, path: Path, request_: Request, error: str
) -> None:
    agent.park("h")
    reply = exchange(path, protocol.encode(request_))
    assert reply.error is not None
    assert error in reply.error
    assert [grant.state.value for grant in agent.grants] == ["pending"]


def test_too_long_a_request_ends_the_connection(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(path))
        raw.sendall((protocol.MAX_REQUEST_BYTES + 1).to_bytes(4, "big"))
        assert raw.recv(1) == b""


def test_a_slow_client_is_let_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "REQUEST_TIMEOUT_S", 0.2)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(path))
        raw.sendall(b"\0\0")
        assert raw.recv(1) == b""


def test_an_agent_that_hangs_is_said_to(
    agent: SmallAgent, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "REPLY_TIMEOUT_S", 0.2)
    agent.delay_s = 5
    with ControlClient(path) as client, pytest.raises(ControlError, match="did not answer in time"):
        client.status()


def test_too_long_an_answer_is_an_error(
    agent: SmallAgent, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_REPLY_BYTES", 500)
    agent.rows = [FlowRow(f"f{n}", 1, 2, "/bin/x", 0, "s", "db", "postgres") for n in range(100)]
    with ControlClient(path) as client:
        with pytest.raises(ControlError, match="too long"):
            client.flows()
        agent.rows = []
        assert client.flows() == []


def test_many_clients_at_once(path: Path) -> None:
    failures: list[Exception] = []

    def ask() -> None:
        try:
            with ControlClient(path) as client:
                for _ in range(10):
                    client.status()
        except ControlError as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures


def test_clients_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_CLIENTS", 2)
    with ControlClient(path) as one, ControlClient(path) as two:
        one.status()
        two.status()
        with ControlClient(path) as three, pytest.raises(ControlError):
            three.status()
    deadline = time.monotonic() + 10
    while True:
        try:
            with ControlClient(path) as again:
                again.status()
            return
        except ControlError:
            assert time.monotonic() < deadline


def test_no_agent() -> None:
    with pytest.raises(ControlError, match="no agent answers"):
        ControlClient(Path("/nonexistent/control.sock"))
