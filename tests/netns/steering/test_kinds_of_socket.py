"""Every kind of connecting socket that a job may use: steered with the exact origin, or refused at once; never past the inspector."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sidecar.kernel import cgroups
from tests.netns.steering.conftest import OPEN_PORT, PORT, Dial, outcome
from tests.support import io_uring
from tests.support.far_end import FarEnd
from tests.support.far_host import FarHost
from tests.support.played_inspector import ROOT, PlayedInspector

pytestmark = pytest.mark.root
NOBODY = 65534

KINDS = {
    "IPv4": ("s = socket.create_connection(FAR4); say(s)", "far"),
    "IPv6": ("s = socket.create_connection(FAR6); say(s)", "far6"),
    "v4-mapped": (
        "s = socket.socket(socket.AF_INET6); s.connect(('::ffff:' + FAR4[0], FAR4[1])); say(s)",
        "far",
    ),
    "bound source port": ("s = socket.socket(); s.bind(('', 45001)); s.connect(FAR4); say(s)", "far"),
    "own mark, reset after connect": (
        "s = socket.socket(); s.setsockopt(1, 36, 7); s.connect(FAR4); s.setsockopt(1, 36, 0); say(s)",
        "far",
    ),
    "MPTCP": ("s = socket.socket(2, 1, 262); s.connect(FAR4); say(s)", "far"),
    "MPTCP over IPv6": ("s = socket.socket(10, 1, 262); s.connect(FAR6); say(s)", "far6"),
    "fast open, MSG_FASTOPEN": (
        "s = socket.socket(); s.setsockopt(6, 34, 1); s.sendto(b'x', 0x20000000, FAR4); say(s)",
        "far",
    ),
    "fast open, TCP_FASTOPEN_CONNECT": (
        "s = socket.socket(); s.setsockopt(6, 30, 1); s.connect(FAR4); s.send(b'x'); say(s)",
        "far",
    ),
    "not blocking": (
        "s = socket.socket(); s.setblocking(False); s.connect_ex(FAR4); time.sleep(.3); say(s)",
        "far",
    ),
    "0.0.0.0": ("s = socket.create_connection(('0.0.0.0', 15432)); say(s)", "127.0.0.1"),
    "::": ("s = socket.create_connection(('::', 15432)); say(s)", "::1"),
    "0.0.0.0 from a bound address": (
        "s = socket.socket(); s.bind(('127.0.0.5', 0)); s.connect(('0.0.0.0', 15432)); say(s)",
        "127.0.0.5",
    ),
    "loopback": ("s = socket.create_connection(('127.0.0.9', 15432)); say(s)", "127.0.0.9"),
    "bound to a device": (
        "s = socket.socket(); s.setsockopt(1, 25, DEVICE.encode()); s.connect(FAR4); say(s)",
        "far",
    ),
    "bound to a device, IPv6": (
        "s = socket.socket(10); s.setsockopt(1, 25, DEVICE.encode()); s.connect(FAR6); say(s)",
        "far6",
    ),
    "IP_UNICAST_IF": (
        "s = socket.socket(); s.setsockopt(0, 50, socket.htonl(socket.if_nametoindex(DEVICE))); s.connect(FAR4); say(s)",
        "far",
    ),
}

RING = f"sys.path.insert(0, {str(ROOT)!r}); from tests.support.io_uring import connect; s = socket.socket({{family}}); s.setsockopt(6, 7, 1); "  # TCP_SYNCNT: it knows no other time-out
for name, family, destination in (("", 2, "far"), (" over IPv6", 10, "far6")):
    target = "*FAR4" if family == 2 else "*FAR6"
    KINDS[f"io_uring{name}"] = (f"{RING.format(family=family)}connect(s, {target}); say(s)", destination)
    KINDS[f"io_uring{name}, by its worker thread"] = (
        f"{RING.format(family=family)}connect(s, {target}, asynchronous=True); say(s)",
        destination,
    )


@pytest.fixture(scope="module")
def inspector(host: FarHost) -> Iterator[PlayedInspector]:
    with PlayedInspector(
        host, ports=(PORT,), exclude=("10.99.0.0/16",), heartbeat_timeout_s=30.0
    ) as inspector:
        yield inspector


@pytest.mark.parametrize("kind", KINDS)
def test_is_steered(kind: str, inspector: PlayedInspector, dial: Dial, far: FarEnd, host: FarHost) -> None:
    code, destination = KINDS[kind]
    if "io_uring" in kind and not io_uring.is_available():
        pytest.skip("this kernel gives no ring: kernel.io_uring_disabled, or a seccomp filter")
    address = {"far": host.far_address, "far6": f"[{host.far_address6}]", "::1": "[::1]"}.get(
        destination, destination
    )
    client = dial(inspector.job, code)
    assert outcome(client) == inspector.instance
    (flow,) = inspector.ask("flows")
    assert flow["original"] == flow["conntrack"] == f"{address}:{PORT}"
    assert flow["tgid"] == client.pid
    assert f"tcp/{PORT}" not in far.packets()


def test_an_unprivileged_device_bound_socket_is_refused_at_once(
    inspector: PlayedInspector, dial: Dial, far: FarEnd
) -> None:
    """The hook may not unbind it (measured: bpf_setsockopt is refused with the caller's capabilities), and a redirect would time out."""
    inspector.ask("events")
    code, _ = KINDS["bound to a device"]
    assert outcome(dial(inspector.job, code, uid=NOBODY)) == "PermissionError"
    assert [event["reason"] for event in inspector.ask("events")] == ["refused_by_kernel"]
    assert f"tcp/{PORT}" not in far.packets()


def test_a_scoped_link_local_destination_is_refused_at_once(
    inspector: PlayedInspector, dial: Dial, far: FarEnd
) -> None:
    code = "s = socket.socket(10); s.connect(('fe80::1', 15432, 0, socket.if_nametoindex(DEVICE)))"
    assert outcome(dial(inspector.job, code)) == "PermissionError"
    assert f"tcp/{PORT}" not in far.packets()


def test_a_socket_that_was_steered_may_dial_elsewhere_and_back(
    inspector: PlayedInspector, dial: Dial, host: FarHost
) -> None:
    code = f"""
s = socket.create_connection(FAR4, 4); s.recv(16); s.send(b'x')
disconnect = lambda: ctypes.CDLL(None).connect(s.fileno(), bytes(16), 16)
disconnect(); s.connect((FAR4[0], {OPEN_PORT})); assert s.recv(16) == b'far'
disconnect(); s.connect(FAR4); say(s)
"""
    assert outcome(dial(inspector.job, code)) == inspector.instance
    assert [flow["original"] for flow in inspector.ask("flows")] == [f"{host.far_address}:{PORT}"] * 2


def test_exclusions_and_other_ports_go_their_own_way(
    inspector: PlayedInspector, dial: Dial, far: FarEnd
) -> None:
    far.packets()
    assert outcome(dial(inspector.job, f"say(socket.create_connection((FAR4[0], {OPEN_PORT}), 4))")) == "far"
    assert far.packets()[f"tcp/{OPEN_PORT}"] > 0
    assert (
        outcome(
            dial(
                inspector.job, "s = socket.socket(); s.settimeout(1); s.connect(('10.99.0.1', 15432)); say(s)"
            )
        )
        == "OSError"  # no route to it: it was tried directly
    )
    assert inspector.ask("flows") == []


def test_an_inherited_socket_of_another_cgroup_is_not_of_this_scope(
    inspector: PlayedInspector, dial: Dial, far: FarEnd, host: FarHost
) -> None:
    """Measured, and why an agent is attached at the root: hooks run by the cgroup in which a socket was made."""
    code = """
s = socket.socket()
open(f'{CGROUP}/cgroup.procs', 'w').write(str(os.getpid()))
s.connect(FAR4); say(s)
""".replace("{CGROUP}", str(inspector.job))
    assert outcome(dial(cgroups.cgroup2_mount(), code.replace("f'", "'"))) == "far"


@pytest.mark.parametrize("kind", ["IPv4", "IPv6", "MPTCP", "fast open, MSG_FASTOPEN", "loopback", "io_uring"])
def test_without_the_table_no_packet_passes(
    kind: str, inspector: PlayedInspector, dial: Dial, far: FarEnd
) -> None:
    """The last tests of this module: the guard alone stands."""
    inspector.ask("hold")
    try:
        inspector.ask("drop-table")
        far.packets()
        inspector.ask("events")
        assert outcome(dial(inspector.job, KINDS[kind][0])) == "TimeoutError"
        assert f"tcp/{PORT}" not in far.packets()
        assert {event["reason"] for event in inspector.ask("events")} == {"guard_dropped"}
    finally:
        inspector.ask("go")
    assert inspector.ask("flows") == []
