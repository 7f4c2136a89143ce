from collections.abc import Callable
from typing import Any

from sidecar.audit.writer import StreamWriter
from sidecar.model.record import EncodedRecord
from sidecar.proxy.driver import FlowDriver
from sidecar.session.postgres_lane import Lane

class Gate:
    open: bool
    full: int
    writer: StreamWriter | None
    waiting: list[EncodedRecord]
    def __init__(
        self, full: int, soon: Callable[[Callable[[], None]], object], failed: Callable[[], None]
    ) -> None: ...
    def set(self, writer: StreamWriter | None, is_open: bool) -> None: ...
    def take(self) -> list[EncodedRecord]: ...
    def flush(self) -> None: ...

class Receiver:
    gate: Gate
    from_client: bool
    lost: bool
    flow: FlowDriver | None
    lane: Lane | None
    peer: Any
    transport: Any
    early: list[bytes]
    def __init__(self, gate: Gate, from_client: bool) -> None: ...
    def data_received(self, data: bytes) -> None: ...
