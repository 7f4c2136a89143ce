"""A supervisor for tests of steering: the kernel side is the real one, the listener only greets with its instance's name.

Runs in the network namespace and cgroup that its starter chose; takes one word a line on stdin and answers each with one line
of JSON. Until told to `hold` it beats as the supervisor does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sidecar.kernel import cgroups, nft, run_state
from sidecar.kernel.original_destination import original_destination
from sidecar.kernel.steering import Steering, SteeringPlan
from sidecar.model.flow import Address
from tests.support.far_host import FarHost

ROOT = Path(__file__).parents[2]
BEAT_S = 0.2


class PlayedInspector:
    """Context manager: one instance in the near namespace of `host`. `scope` is None for the instance's own job (as `exec`
    has it), or a cgroup (as `run` has it)."""

    def __init__(self, host: FarHost, *, scope: Path | None = None, **plan: Any) -> None:
        self.instance = os.urandom(4).hex()
        self.job = cgroups.instance_directory(self.instance) / "job"
        options = {"instance": self.instance, "scope": str(scope) if scope else None, **plan}
        self.process = host.popen(
            host.near,
            [sys.executable, "-m", "tests.support.played_inspector", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        self.port = 0

    def __enter__(self) -> PlayedInspector:
        self.port = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(BrokenPipeError, json.JSONDecodeError):
                self.ask("close")
        self.process.communicate(timeout=20)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, word: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)


class _Played:
    def __init__(self, options: dict[str, Any]) -> None:
        self.instance = options["instance"]
        run_state.save(self.instance)
        inspector, job = cgroups.create(self.instance)
        cgroups.move(os.getpid(), inspector)
        self.v4 = self._bind(socket.AF_INET, "127.0.0.1", 0)
        self.port = self.v4.getsockname()[1]
        self.v6 = self._bind(socket.AF_INET6, "::1", self.port)
        scope = options["scope"]
        self.steering = Steering(
            SteeringPlan(
                instance=self.instance,
                scope_cgroups=(Path(scope) if scope else job,),
                inspector_cgroup=inspector,
                exclusive=scope is None,
                ports=tuple(options["ports"]),
                exclude=tuple(options.get("exclude", ())),
                listen_port=self.port,
                on_failure=options.get("on_failure", "closed"),
                foreign_netns=options.get("foreign_netns", "record"),
                heartbeat_timeout_s=options.get("heartbeat_timeout_s", 2.0),
            )
        )
        self.flows: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.drifts: list[str] = []
        self.held = False

    def _bind(self, family: int, host: str, port: int) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # its closed connections do not keep the port
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(512)
        return sock

    def listen(self, sock: socket.socket) -> None:
        while True:
            try:
                connection, peer = sock.accept()
            except OSError:
                return
            with connection:
                origin = self.steering.take_origin(
                    Address(*peer[:2]),
                    Address(*connection.getsockname()[:2]),
                    original_destination(connection),
                )
                self.flows.append(
                    {
                        "tgid": origin.tgid if origin else None,
                        "uid": origin.uid if origin else None,
                        "original": str(origin.original) if origin else None,
                        "conntrack": str(original_destination(connection)),
                        "peer_port": peer[1],
                    }
                )
                connection.settimeout(5)
                with contextlib.suppress(OSError):
                    connection.sendall(self.instance.encode())
                    connection.recv(16)

    def beat(self) -> None:
        if not self.held:
            self.drifts += [f"{drift.name}: {drift.detail}" for drift in self.steering.beat()]

    def answer(self, word: str, argument: str) -> Any:
        if word == "flows":
            flows, self.flows = self.flows, []
            return flows
        if word == "events":
            return [
                {"reason": e.reason, "refused": e.refused, "tgid": e.tgid, "to": str(e.destination), "cgroup": e.cgroup_id}
                for e in self.steering.drain_events()
            ]  # fmt: skip
        if word == "drifts":
            drifts, self.drifts = self.drifts, []
            return drifts
        if word == "hold":
            self.held = True
        elif word == "go":
            self.held = False
            self.beat()
        elif word == "deaf":
            for sock in (self.v4, self.v6):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        elif word == "drop-table":
            return nft.delete(nft.table_name(self.instance))
        elif word == "dial":  # as the inspector dials upstream
            host, port = argument.split(",")
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                return connection.recv(16).decode()
        elif word == "close":
            self.steering.close()
        return None

    def run(self) -> None:
        words: queue.Queue[str] = queue.Queue()
        try:
            self.steering.start()
            self.steering.beat()
            for sock in (self.v4, self.v6):
                threading.Thread(target=self.listen, args=(sock,), daemon=True).start()
            threading.Thread(target=lambda: [words.put(line) for line in sys.stdin], daemon=True).start()
            print(json.dumps(self.port), flush=True)
            due = time.monotonic() + BEAT_S
            while True:
                try:
                    word, _, argument = words.get(timeout=max(0.01, due - time.monotonic())).strip().partition(" ")  # fmt: skip
                except queue.Empty:
                    self.beat()
                    due = time.monotonic() + BEAT_S
                    continue
                print(json.dumps(self.answer(word, argument)), flush=True)
                if word == "close":
                    return
        finally:
            self.steering.close()
            cgroups.remove(self.instance)
            run_state.end(self.instance)


if __name__ == "__main__":
    _Played(json.loads(sys.argv[1])).run()
