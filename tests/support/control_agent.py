"""A small agent behind a real control socket: real grants, made-up flows and records; the server runs in a
thread."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sidecar.approvals.grants import Decider, Grant, Grants
from sidecar.control.protocol import FlowRow, HoldView, Status
from sidecar.control.server import ControlServer, Refusal
from sidecar.model.origin import Origin
from sidecar.model.verdict import ApproveTerms


def origin(pid: int, uid: int = 0, cgroup: str = "/") -> Origin:
    return Origin(
        pid=pid,
        tgid=pid,
        uid=uid,
        gid=uid,
        comm="job",
        exe="/usr/bin/job",
        cmdline=("job",),
        cgroup=cgroup,
        cgroup_id=1,
        netns=1,
    )


class SmallAgent:
    """Implements ControlApi."""

    def __init__(self, instance: str = "0a0a0a0a") -> None:
        self.instance = instance
        self.grants = Grants()
        self.origins: dict[str, Origin | None] = {}
        self.statements: dict[str, str] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.rows: list[FlowRow] = []
        self.steered_cgroups: tuple[str, ...] = ()
        self.refusals: list[Refusal] = []
        self.asked_uids: list[int] = []
        self.stopped = threading.Event()
        self.reloads = 0
        self.delay_s = 0.0
        self.state = Status(instance=instance, pid=1, version="0", mode="run", started_ns=time.time_ns())

    def park(
        self,
        hold_id: str,
        statement: str = "DELETE FROM t",
        *,
        by: tuple[str, ...] = (),
        held: Origin | None = None,
    ) -> None:
        self.statements[hold_id] = statement
        self.origins[hold_id] = held
        self.grants.open(hold_id, digest="d", terms=ApproveTerms(by=by), now_ns=time.time_ns())

    async def status(self) -> Status:
        await asyncio.sleep(self.delay_s)
        return self.state

    async def flows(self) -> list[FlowRow]:
        return self.rows

    async def holds(self) -> list[HoldView]:
        return [self._view(grant) for grant in self.grants]

    async def hold(self, hold_id: str) -> HoldView | None:
        grant = self.grants.get(hold_id)
        return self._view(grant) if grant else None

    async def decide(self, hold_id: str, approve: bool, by: Decider, reason: str) -> HoldView:
        return self._view(self.grants.decide(hold_id, approve, by, reason, time.time_ns()))

    async def why(self, record_id: str, peer_uid: int) -> dict[str, Any] | None:
        self.asked_uids.append(peer_uid)
        return self.records.get(record_id)

    async def reload(self) -> None:
        self.reloads += 1

    async def stop(self) -> None:
        self.stopped.set()

    def is_steered(self, pid: int, cgroup: str) -> bool:
        return cgroup in self.steered_cgroups

    def held_origin(self, hold_id: str) -> Origin | None:
        return self.origins.get(hold_id)

    def _view(self, grant: Grant) -> HoldView:
        return HoldView(
            id=grant.hold_id,
            instance=self.instance,
            rule="customer-deletes",
            reason="deletes of customers are decided by a person",
            statement=self.statements[grant.hold_id],
            target="orders:5432",
            principal="repo:acme/reports",
            process="/usr/bin/psql (pid 7, uid 0)",
            opened_ns=grant.opened_ns,
            expires_ns=grant.expires_ns,
            state=grant.state.value,
            parameters=("42",),
            by=grant.by,
            digest=grant.digest,
            decided_by=grant.decided_by,
            decided_ns=grant.decided_ns,
            decision_reason=grant.reason,
        )


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    """Like /run/sidecar: every user gets to the sockets in it. (pytest's own directories are closed to
    others.)"""
    directory = Path(tempfile.mkdtemp(prefix="sidecar-control-"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextlib.contextmanager
def serving(agent: SmallAgent, directory: Path, *, relay_parent: int = 0) -> Iterator[Path]:
    """The agent's socket, served until the end of the block. `relay_parent` 0: nobody is the page."""
    path = directory / agent.instance / "control.sock"
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="control-server")
    thread.start()
    server = ControlServer(path, agent, on_refusal=agent.refusals.append, relay_parent=relay_parent)
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        yield path
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
