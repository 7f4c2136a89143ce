"""Rules that somebody else has: before ours, after ours, inside our table, past conntrack. What is covered is steered or does not leave;
where it does not leave, that is told.

Measured where steering loses: the kernel lets the first NAT chain decide, and takes none with a priority at or before conntrack's.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import pytest

from sidecar.kernel import nft
from tests.netns.steering.conftest import OPEN_PORT, PORT, Dial, outcome
from tests.support.far_end import FarEnd
from tests.support.far_host import FarHost
from tests.support.played_inspector import ROOT, PlayedInspector

pytestmark = pytest.mark.root

FAMILIES = {"IPv4": "FAR4, 2, ('', {port})", "IPv6": "FAR6, 2, ('::', {port})"}
SOURCE_PORTS = itertools.count(20_000)
"""Each once: what was dropped stays in conntrack for two minutes as a connection without NAT, and would drop who comes from there."""
STEERED, DROPPED = "steered", "dropped"

FOREIGN = {
    # DNAT to another port of the far host, and to the dialled one, so that "it arrived" would show.
    "DNAT after ours, -101": (
        "type nat hook output priority -101",
        "tcp dport 15432 dnat {to}:15999",
        STEERED,
    ),
    "DNAT after ours, -100": (
        "type nat hook output priority -100",
        "tcp dport 15432 dnat {to}:15999",
        STEERED,
    ),
    "DNAT before ours, -111": (
        "type nat hook output priority -111",
        "tcp dport 15432 dnat {to}:15999",
        DROPPED,
    ),
    "DNAT before ours, -150": (
        "type nat hook output priority -150",
        "tcp dport 15432 dnat {to}:15999",
        DROPPED,
    ),
    "DNAT before ours, -199": (
        "type nat hook output priority -199",
        "tcp dport 15432 dnat {to}:15432",
        DROPPED,
    ),
    "redirect before ours": (
        "type nat hook output priority -150",
        "tcp dport 15432 redirect to :15999",
        DROPPED,
    ),
    "notrack in raw": ("type filter hook output priority -300", "tcp dport 15432 notrack", DROPPED),
    "mark cleared by a route chain": ("type route hook output priority -150", "meta mark set 0", DROPPED),
    "mark changed in raw": ("type filter hook output priority -300", "meta mark set 7", DROPPED),
    "accept before ours": ("type filter hook output priority -150", "accept", STEERED),
    "NAT accept before ours": ("type nat hook output priority -150", "accept", STEERED),
}


@pytest.fixture(scope="module")
def inspector(host: FarHost) -> Iterator[PlayedInspector]:
    with PlayedInspector(host, ports=(PORT,)) as inspector:
        yield inspector


@pytest.fixture(autouse=True)
def quiet(inspector: PlayedInspector, far: FarEnd) -> None:
    for word in ("events", "flows", "drifts"):
        inspector.ask(word)
    far.packets()


def connect(family: str) -> str:
    return f"say(socket.create_connection({FAMILIES[family].format(port=next(SOURCE_PORTS))}))"


def chain(hook: str) -> str:
    return f"add table inet foreign; add chain inet foreign c {{ {hook}; }}"


def rules(host: FarHost, text: str) -> None:
    done = host.run(host.near, ["nft", text])
    assert done.returncode == 0, done.stderr


def dropped_and_told(inspector: PlayedInspector, dial: Dial, far: FarEnd, code: str, to: str) -> None:
    client = dial(inspector.job, code)
    assert outcome(client) == "TimeoutError"
    assert far.packets().keys() & {f"tcp/{PORT}", f"tcp/{OPEN_PORT}"} == set()
    events = inspector.ask("events")
    assert {(event["reason"], event["refused"], event["tgid"], event["to"]) for event in events} == {
        ("guard_dropped", True, client.pid, to)
    }
    assert inspector.ask("flows") == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_chain(
    name: str, family: str, inspector: PlayedInspector, host: FarHost, dial: Dial, far: FarEnd
) -> None:
    hook, rule, wanted = FOREIGN[name]
    address = host.far_address if family == "IPv4" else f"[{host.far_address6}]"
    to = f"ip to {address}" if family == "IPv4" else f"ip6 to {address}"
    rules(host, chain(hook) + f"; add rule inet foreign c {rule.format(to=to)}")
    try:
        if wanted == DROPPED:
            dropped_and_told(inspector, dial, far, connect(family), f"{address}:{PORT}")
        else:
            assert outcome(dial(inspector.job, connect(family))) == inspector.instance
            assert [flow["original"] for flow in inspector.ask("flows")] == [f"{address}:{PORT}"]
            assert far.packets().keys() & {f"tcp/{PORT}", f"tcp/{OPEN_PORT}"} == set()
    finally:
        rules(host, "delete table inet foreign")
    assert outcome(dial(inspector.job, connect(family))) == inspector.instance  # and all is well again
    assert inspector.ask("drifts") == []


def test_no_nat_chain_comes_before_conntrack(host: FarHost) -> None:
    """Which is why -199 is the first that there can be."""
    for priority in (-200, -300):
        done = host.run(host.near, ["nft", chain(f"type nat hook output priority {priority}")])
        assert done.returncode != 0
        assert "Operation not supported" in done.stderr


OURS = {
    "a rule before ours": "insert rule inet {table} steer accept",
    "our rule is gone": "flush chain inet {table} steer",
    "our chain is gone": "flush chain inet {table} steer; delete chain inet {table} steer",
    "the table is gone": "delete table inet {table}",
    "all is flushed": "flush ruleset",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OURS)
def test_our_own_table_is_changed(
    name: str, family: str, inspector: PlayedInspector, host: FarHost, dial: Dial, far: FarEnd
) -> None:
    """Before the change is noticed nothing passes; then it is put back."""
    address = host.far_address if family == "IPv4" else f"[{host.far_address6}]"
    inspector.ask("hold")
    try:
        rules(host, OURS[name].format(table=nft.table_name(inspector.instance)))
        dropped_and_told(inspector, dial, far, connect(family), f"{address}:{PORT}")
    finally:
        inspector.ask("go")
    (drift,) = inspector.ask("drifts")
    assert drift.startswith("table: ")
    assert outcome(dial(inspector.job, connect(family))) == inspector.instance


WATCH = """
import socket, subprocess
from sidecar.kernel.nft_watch import TableWatch
watch = TableWatch("sidecar_00000001")
def nft(text): subprocess.run(["nft", text], check=True)
def tell(): print(watch.touched())
tell()
nft("add table inet foreign"); nft("add chain inet foreign c"); nft("add table inet sidecar_000000011"); tell()
nft("add table inet sidecar_00000001"); tell()
tell()
nft("add chain inet sidecar_00000001 steer"); tell()
nft("add rule inet sidecar_00000001 steer accept"); tell()
nft("flush ruleset"); tell()
watch._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
for number in range(60): nft(f"add table inet foreign{number}")
tell()
tell()
"""


def test_the_watch_tells_of_our_table_and_of_what_it_lost(host: FarHost) -> None:
    with FarHost() as apart:  # it flushes
        done = apart.run(apart.near, [sys.executable, "-c", WATCH], env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False", "True", "False", "True", "True", "True", "True", "False"]
