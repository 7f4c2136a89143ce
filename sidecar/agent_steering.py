"""The supervisor's part of steering: one thread for all that touches the kernel, the heartbeat, what drifted, and what the hooks tell.

Belongs to the agent's loop. What is steered and how, `kernel.steering` knows; what becomes a record, `gap` takes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from sidecar.control.protocol import DriftStatus
from sidecar.errors import SidecarError
from sidecar.kernel.steering import Drift, KernelEvent, Steering, SteeringPlan
from sidecar.model.reasons import GapReason
from sidecar.proxy import limits

log = logging.getLogger("sidecar")

MAX_DRIFTS_SHOWN: Final = 32
LOOK_PAUSE_S: Final = 0.02
"""Between two looks at the kernel's state: somebody who changes our table again and again costs no more than fifty a second."""


class Gap(Protocol):
    """Records a gap."""

    def __call__(self, reason: GapReason, detail: str, *, event: KernelEvent | None = None) -> None: ...


class SteeringWatch:
    """`start`, `beat_forever` as a task, `take_events` once more, `close`. `heard` says when a worker last spoke."""

    def __init__(self, plan: SteeringPlan, *, heard: Callable[[], float | None], gap: Gap) -> None:
        self.steering = Steering(plan)
        self.drifts: deque[DriftStatus] = deque(maxlen=MAX_DRIFTS_SHOWN)
        self.drift_count = 0
        self.refused = 0
        self._heard = heard
        self._gap = gap
        self._look = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "kernel")

    async def start(self) -> None:
        """Raises PrerequisiteError or SteeringError; nothing stands in the kernel then."""
        await self._call(self._start)
        assert self.steering.changes is not None
        asyncio.get_running_loop().add_reader(self.steering.changes.fileno(), self._table_changed)

    def _start(self) -> None:
        self.steering.start()
        self.steering.beat()

    async def _call(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    async def beat_forever(self) -> None:
        """The heartbeat that lets covered connections through: written only after the kernel state was verified, and with
        the time at which a worker last spoke: one that hangs is refused as soon as one that is gone."""
        while True:
            self._look.clear()
            heard = self._heard()
            if heard is not None:
                try:
                    for drift in await self._call(self.steering.beat, heard):
                        self._drifted(drift)
                except (SidecarError, OSError) as error:
                    log.error("steering could not be verified; new connections are refused: %s", error)
            await self.take_events()
            await asyncio.sleep(LOOK_PAUSE_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limits.BEAT_INTERVAL_S - LOOK_PAUSE_S):
                    await self._look.wait()

    def _table_changed(self) -> None:
        """Looked at now and not with the next beat: until it is repaired the guard drops what we would have steered."""
        changes = self.steering.changes
        assert changes is not None
        try:
            if changes.touched():
                self._look.set()
        except OSError as error:
            log.error("changes of nftables are only noticed with the next beat: %s", error)
            asyncio.get_running_loop().remove_reader(changes.fileno())

    def _drifted(self, drift: Drift) -> None:
        self.drift_count += 1
        self.drifts.append(DriftStatus(drift.name, drift.detail, drift.repaired, time.time_ns()))
        reason = GapReason.HOOK_DETACHED if "hook" in drift.name else GapReason.TABLE_CHANGED
        self._gap(reason, f"{drift.name}: {drift.detail}" + ("; repaired" if drift.repaired else ""))

    async def take_events(self) -> None:
        """What the hooks have told since the last time becomes gaps."""
        for event in await self._call(self.steering.drain_events):
            self.refused += 1 if event.refused else 0
            self._gap(GapReason(event.reason), event.detail, event=event)

    def cover_bridges(self, bridges: frozenset[str]) -> None:
        """Container networks have come or gone. Returns at once; from any thread."""
        try:
            self._thread.submit(self._cover_bridges, bridges)
        except RuntimeError:  # closed meanwhile
            return

    def _cover_bridges(self, bridges: frozenset[str]) -> None:
        try:
            self.steering.cover_bridges(bridges)
        except (SidecarError, OSError) as error:
            log.error("container networks cannot be steered: %s", error)

    async def close(self) -> None:
        """Steer nothing any more. Also after a failed `start`."""
        if self.steering.changes is not None:
            asyncio.get_running_loop().remove_reader(self.steering.changes.fileno())
        try:
            await self._call(self.steering.close)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)
