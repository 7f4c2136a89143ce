"""Run inside a network namespace of its own by tests/netns/test_steering.py: steers a cgroup into a plain listener of its own and
prints, as JSON, what became of each attempt. The kernel is the real one; only the inspector is played."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from sidecar.kernel import cgroups, run_state, steering
from sidecar.kernel.original_destination import original_destination
from sidecar.model.flow import Address

instance = os.urandom(4).hex()
run_state.save(instance)
inspector, job = cgroups.create(instance)
cgroups.move(os.getpid(), inspector)
ROOT = cgroups.cgroup2_mount()

v4 = socket.socket()
v4.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
v4.bind(("127.0.0.1", 0))
PORT = v4.getsockname()[1]
v6 = socket.socket(socket.AF_INET6)
v6.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
v6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
v6.bind(("::1", PORT))
for listener in (v4, v6):
    listener.settimeout(5)
    listener.listen(512)

# The real destination: whoever reaches it has got past the inspector.
real = socket.socket()
real.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
real.bind(("127.0.0.2", 5432))
real.listen(16)
real.setblocking(False)

steer = steering.Steering(
    steering.SteeringPlan(
        instance, (job,), inspector, True, (5432, 443), ("169.254.0.0/16",), PORT, "closed", "refuse", 2.0
    )
)


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "import socket, sys, time\n" + code],
        preexec_fn=lambda: (job / "cgroup.procs").write_text(str(os.getpid())) and None,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ask(code: str) -> str:
    return start(code).communicate(timeout=30)[0].strip()


def reached() -> bool:
    try:
        real.accept()[0].close()
    except BlockingIOError:
        return False
    return True


CONNECT = "s = socket.socket(); s.settimeout(1.5)\ntry: s.connect(('127.0.0.2', 5432)); print('connected')\nexcept OSError as e: print(type(e).__name__)\n"
found: dict[str, object] = {}


def reasons() -> list[str]:
    return [event.reason for event in steer.drain_events()]


def steered(family: str, host: str, listener: socket.socket) -> dict[str, object]:
    child = start(
        f"s = socket.socket(socket.{family}); s.settimeout(5); s.connect(({host!r}, 5432)); print(s.recv(5))"
    )
    connection, peer = listener.accept()
    original = original_destination(connection)
    origin = steer.take_origin(Address(peer[0], peer[1]), Address(*connection.getsockname()[:2]), original)
    connection.sendall(b"hello")
    connection.close()
    said = child.communicate(timeout=10)[0].strip()
    assert origin is not None
    return {
        "said": said,
        "pid": origin.tgid == child.pid,
        "original": str(origin.original),
        "conntrack": str(original),
    }


def collisions() -> dict[str, int]:
    """Two destinations from one source port each: after the redirect they collide, and the kernel moves one."""
    code = """
found = []
for number in range(60):
    port = 42000 + number
    for host in ('127.0.0.2', '127.0.0.3'):
        s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.settimeout(5)
        s.bind(('127.0.0.1', port)); s.connect((host, 5432)); found.append(s)
print('up', flush=True); sys.stdin.read(1)
"""
    child = start(code)
    right = wrong = moved = 0
    for _ in range(120):
        connection, peer = v4.accept()
        original = original_destination(connection)
        origin = steer.take_origin(
            Address(peer[0], peer[1]), Address(*connection.getsockname()[:2]), original
        )
        if origin is not None and origin.original == original and origin.tgid == child.pid:
            right += 1
        else:
            wrong += 1
        moved += peer[1] >= 42060 or peer[1] < 42000
        connection.close()
    child.kill()
    child.communicate()
    return {"right": right, "wrong": wrong, "moved": moved}


try:
    steer.start()
    steer.beat()
    found["v4"] = steered("AF_INET", "127.0.0.2", v4)
    found["v6"] = steered("AF_INET6", "::1", v6)
    found["mapped"] = steered("AF_INET6", "::ffff:127.0.0.2", v4)
    steer.beat()
    found["collisions"] = collisions()
    steer.beat()
    reasons()
    found["bind"] = ask(
        f"s = socket.socket()\ntry: s.bind(('127.0.0.1', {PORT})); print('bound')\nexcept OSError as e: print(type(e).__name__)"
    )
    found["quic_connected"] = ask(
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('127.0.0.1', 443))\ntry: s.send(b'x'); print('sent')\nexcept OSError as e: print(type(e).__name__)"
    )
    found["quic_sendto"] = ask(
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ntry: s.sendto(b'x', ('127.0.0.1', 443)); print('sent')\nexcept OSError as e: print(type(e).__name__)"
    )
    found["events"] = sorted(set(reasons()))
    direct = socket.socket()
    try:
        direct.connect(("127.0.0.1", PORT))
        found["unsteered"] = "connected"
    except OSError as error:
        found["unsteered"] = type(error).__name__
    direct.close()
    steer.beat()
    subprocess.run(["nft", "delete", "table", "inet", f"sidecar_{instance}"], check=True)
    found["table_deleted"] = [ask(CONNECT), reached(), reasons()[:1]]
    found["repaired"] = [drift.name for drift in steer.beat()]
    subprocess.run(
        ["nft", "-f", "-"],
        input="table inet evil {\nchain raw {\ntype filter hook output priority -300;\ntcp dport 5432 notrack\n}\n}\n",
        text=True,
        check=True,
    )
    found["notrack"] = [ask(CONNECT), reached()]
    subprocess.run(["nft", "delete", "table", "inet", "evil"], check=True)
    steer.beat()
    subprocess.run(
        ["nft", "-f", "-"],
        input="table inet evil {\nchain nat {\ntype nat hook output priority -150;\ntcp dport 5432 dnat ip to 127.0.0.2:5432;\n}\n}\n",
        text=True,
        check=True,
    )
    found["foreign_dnat"] = [ask(CONNECT), reached()]
    subprocess.run(["nft", "delete", "table", "inet", "evil"], check=True)
    steer.beat()
    reasons()
    found["foreign_netns"] = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", "import socket\ns = socket.socket()\ntry: s.connect(('127.0.0.2', 5432))\nexcept OSError as e: print(type(e).__name__)"],
        preexec_fn=lambda: (job / "cgroup.procs").write_text(str(os.getpid())) and None, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    found["foreign_netns_events"] = reasons()
    steer.beat()
    v4.close()
    v6.close()
    found["no_listener"] = [ask(CONNECT), reached()]
    time.sleep(2.2)
    found["stale"] = [ask(CONNECT), reached(), reasons()[:1]]
    found["traces"] = len(steering.traces(instance))
finally:
    steer.close()
    cgroups.remove(instance)
    run_state.end(instance)
found["left"] = steering.traces(instance)
found["hooks_gone"] = not any(Path(ROOT / "sidecar" / instance).glob("*"))
print(json.dumps(found))
