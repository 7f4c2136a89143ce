"""The supervisor's side of its workers: start, configure, watch, kill when hung, restart when dead.

A worker that dies takes its flows with it (the kernel closes their sockets): nothing is let through unseen. Its stream is
closed by the owner, its listening sockets stay bound here and are handed to its successor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from sidecar.errors import PrerequisiteError
from sidecar.proxy import limits, link
from sidecar.proxy.link import FlowStat, Link, Message

log = logging.getLogger(__name__)


class Owner(Protocol):
    """What the pool needs of the agent."""

    def worker_started(self, worker: WorkerHandle) -> None:
        """The worker said Hello: send it Configure, PolicyText and Segment."""
        ...

    def worker_message(self, worker: WorkerHandle, message: Any) -> None: ...

    def worker_died(self, worker: WorkerHandle, detail: str) -> None:
        """Close its stream, record the end of its flows."""
        ...


@dataclass(eq=False)
class WorkerHandle:
    """One worker slot; survives the restarts of its process."""

    number: int
    listeners: tuple[socket.socket, ...]
    process: subprocess.Popen[bytes] | None = None
    link: Link | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    stream: str = ""
    flows: dict[str, FlowStat | None] = field(default_factory=dict)
    open_flows: int = 0
    restarts: int = 0
    last_beat: float = 0.0
    started: float = 0.0
    failures: int = 0

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    def send(self, message: Message, descriptors: tuple[int, ...] = (), sent: Any = None) -> None:
        if self.link is not None:
            self.link.send(message, descriptors, sent)

    def rss_bytes(self) -> int:
        """Resident memory of the process, 0 where it is gone."""
        try:
            with open(f"/proc/{self.pid}/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            return 0


class WorkerPool:
    """Runs on the supervisor's loop."""

    def __init__(
        self, owner: Owner, listeners: tuple[tuple[socket.socket, ...], ...], uid: int, gid: int
    ) -> None:
        self._owner = owner
        self._uid = uid
        self._gid = gid
        self.workers = [WorkerHandle(number, row) for number, row in enumerate(listeners)]
        self._stopping = False
        self._awake_since = 0.0
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start all workers and wait until each accepts. Raises PrerequisiteError where one does not come up."""
        for worker in self.workers:
            self._spawn(worker)
        for worker in self.workers:
            try:
                async with asyncio.timeout(limits.WORKER_START_S):
                    await worker.ready.wait()
            except TimeoutError:
                raise PrerequisiteError(
                    f"worker {worker.number} did not start within {limits.WORKER_START_S:.0f} s",
                    hint="see the log above for what it said",
                ) from None
        self._watch = asyncio.create_task(self._watch_beats())

    def _spawn(self, worker: WorkerHandle) -> None:
        ours, theirs = link.link_pair()
        descriptors = [theirs.fileno(), *(sock.fileno() for sock in worker.listeners)]
        command = [sys.executable, "-m", "sidecar.proxy.worker", "--link", str(theirs.fileno())]
        for sock in worker.listeners:
            command += ["--listen", str(sock.fileno())]
        command += ["--uid", str(self._uid), "--gid", str(self._gid)]
        environment = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if "PYTHONPATH" in os.environ:
            environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
        worker.ready.clear()
        worker.process = subprocess.Popen(
            command,
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            env=environment,
            cwd="/",
        )
        theirs.close()
        worker.started = worker.last_beat = time.monotonic()
        worker.link = link.Link(
            ours,
            link.FromWorker,
            lambda message, descriptors: self._message(worker, message, descriptors),
            lambda: self._gone(worker),
        )

    def _message(self, worker: WorkerHandle, message: Any, descriptors: list[int]) -> None:
        for descriptor in descriptors:  # a worker has nothing to give us
            os.close(descriptor)
        worker.last_beat = time.monotonic()
        match message:
            case link.Hello():
                self._owner.worker_started(worker)
            case link.Ready():
                worker.failures = 0
                worker.ready.set()
            case link.Beat():
                worker.open_flows = message.flows
                for stat in message.stats:
                    if stat.flow in worker.flows:
                        worker.flows[stat.flow] = stat
            case _:
                self._owner.worker_message(worker, message)

    def _gone(self, worker: WorkerHandle) -> None:
        worker.link = None
        asyncio.get_running_loop().create_task(self._bury(worker))

    async def _bury(self, worker: WorkerHandle) -> None:
        process = worker.process
        assert process is not None
        if process.poll() is None:
            await asyncio.sleep(0.2)
            if process.poll() is None:
                process.kill()
        status = await asyncio.get_running_loop().run_in_executor(None, process.wait)
        detail = f"signal {-status}" if status < 0 else f"status {status}"
        self._owner.worker_died(worker, detail)
        worker.flows.clear()
        worker.open_flows = 0
        if self._stopping:
            return
        log.error("worker %d (pid %d) died: %s; restarting", worker.number, process.pid, detail)
        worker.restarts += 1
        backoff = limits.RESTART_BACKOFF_S[min(worker.failures, len(limits.RESTART_BACKOFF_S) - 1)]
        worker.failures += 1
        await asyncio.sleep(backoff)
        if not self._stopping:
            self._spawn(worker)

    async def _watch_beats(self) -> None:
        looked = time.monotonic()
        while True:
            await asyncio.sleep(limits.BEAT_INTERVAL_S)
            now = time.monotonic()
            if now - looked > limits.BEAT_INTERVAL_S + limits.OVERSLEPT_S:
                self._awake_since = (
                    now  # it was us who hung: what the workers have said meanwhile is not read yet
                )
            looked = now
            for worker in self.workers:
                allowed = limits.WORKER_SILENCE_S if worker.ready.is_set() else limits.WORKER_START_S
                if (
                    worker.link is not None
                    and worker.process is not None
                    and now - max(worker.last_beat, self._awake_since) > allowed
                ):
                    log.error("worker %d (pid %d) is hung; killed", worker.number, worker.pid)
                    worker.last_beat = now
                    worker.process.send_signal(signal.SIGKILL)

    def broadcast(self, message: Message) -> None:
        for worker in self.workers:
            worker.send(message)

    def heard(self) -> float | None:
        """When the worker that spoke last did so (monotonic); None while none accepts. It is the moment up to which somebody is known
        to look at what is steered: the heartbeat carries it to the hooks."""
        return max(
            (worker.last_beat for worker in self.workers if worker.ready.is_set() and worker.link),
            default=None,
        )

    @property
    def healthy(self) -> bool:
        """Whether new connections are let to us: a worker accepts, and has spoken lately."""
        heard = self.heard()
        return heard is not None and time.monotonic() - heard < limits.HEARTBEAT_TIMEOUT_S

    async def stop(self, grace_s: float) -> None:
        """Drain, then kill what is left. Streams are closed through `worker_died`."""
        self._stopping = True
        if self._watch is not None:
            self._watch.cancel()
        self.broadcast(link.Drain(grace_s))
        deadline = time.monotonic() + grace_s + 2.0
        while any(w.process is not None and w.process.poll() is None for w in self.workers):
            if time.monotonic() > deadline:
                for worker in self.workers:
                    if worker.process is not None and worker.process.poll() is None:
                        worker.process.kill()
                break
            await asyncio.sleep(0.02)
        for _ in range(100):
            if all(worker.link is None for worker in self.workers):
                break
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.05)
