"""Steering in the real kernel: what is steered, who is named, and that nothing gets past when something is wrong."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcome() -> Iterator[dict[str, Any]]:
    space = f"sct{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", space], check=True)
    try:
        subprocess.run(["ip", "-n", space, "link", "set", "lo", "up"], check=True)
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{space}", sys.executable, str(ROOT / "tests" / "support" / "steering_probe.py")],
            capture_output=True, text=True, timeout=110, check=False, cwd=ROOT, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout.splitlines()[-1])
    finally:
        subprocess.run(["ip", "netns", "del", space], check=False)


@pytest.mark.parametrize(
    ("name", "where"), [("v4", "127.0.0.2:5432"), ("v6", "[::1]:5432"), ("mapped", "127.0.0.2:5432")]
)
def test_steered_with_origin_and_original_destination(outcome: dict[str, Any], name: str, where: str) -> None:
    assert outcome[name] == {"said": "b'hello'", "pid": True, "original": where, "conntrack": where}


def test_origin_is_exact_when_source_ports_collide(outcome: dict[str, Any]) -> None:
    found = outcome["collisions"]
    assert (found["right"], found["wrong"]) == (120, 0)
    assert found["moved"] > 0  # else nothing collided and this showed nothing


def test_the_port_is_ours_and_quic_is_refused(outcome: dict[str, Any]) -> None:
    assert outcome["bind"] == "PermissionError"
    assert outcome["quic_connected"] == "PermissionError"
    assert outcome["quic_sendto"] == "PermissionError"
    assert outcome["events"] == ["quic_refused", "refused_by_kernel"]


def test_the_listener_accepts_only_steered_connections(outcome: dict[str, Any]) -> None:
    assert outcome["unsteered"] == "ConnectionRefusedError"


def test_a_deleted_table_drops_and_is_repaired(outcome: dict[str, Any]) -> None:
    assert outcome["table_deleted"] == ["TimeoutError", False, ["guard_dropped"]]
    assert outcome["repaired"] == ["table"]


@pytest.mark.parametrize("name", ["notrack", "foreign_dnat"])
def test_conntrack_bypasses_do_not_get_through(outcome: dict[str, Any], name: str) -> None:
    assert outcome[name] == ["TimeoutError", False]


def test_another_network_namespace_is_refused_and_told(outcome: dict[str, Any]) -> None:
    assert outcome["foreign_netns"] == "PermissionError"
    assert outcome["foreign_netns_events"] == ["foreign_netns"]


def test_without_listener_or_heartbeat_connections_are_refused_at_once(outcome: dict[str, Any]) -> None:
    assert outcome["no_listener"] == ["ConnectionRefusedError", False]
    assert outcome["stale"] == ["PermissionError", False, ["refused_by_kernel"]]


def test_nothing_is_left(outcome: dict[str, Any]) -> None:
    assert outcome["traces"] > 0
    assert outcome["left"] == []
    assert outcome["hooks_gone"]
