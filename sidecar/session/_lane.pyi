from collections import deque
from typing import Protocol

from sidecar.model.record import EncodedRecord, Record

CHUNK_MAX_BYTES: int
SLOT: object

class Answer:
    def __init__(self, rows: Record, empty: Record) -> None: ...

class Known:
    decision: object
    raw: bytes
    query: bool
    def __init__(
        self, decision: object, raw: bytes, request: Record, bare: Answer, *, query: bool, bare_rows: bool
    ) -> None: ...

class Cycle:
    chunk: bytes
    known: Known
    record_id: str
    started_ns: int
    parsed: bool
    described: bool

class Owner(Protocol):
    """What only the session can say. None each time: the long way."""

    def known_query(self, raw: bytes) -> Known | None: ...
    def known_shape(self, raw: bytes) -> bool: ...
    def known_parse(self, raw: bytes) -> Known | None: ...
    def known_statement(self, name: bytes) -> Known | None: ...
    def answer_for(self, known: Known, description: bytes) -> Answer | None: ...

class Lane:
    owner: Owner | None
    armed: bool
    until_ns: int
    """From this time on it takes nothing from the client."""
    cycles: deque[Cycle]
    status: bytes
    sent: int
    bytes_client: int
    bytes_server: int
    confirmed: Known | None
    executed: Cycle | None
    def __init__(self, owner: Owner, max_rows: int, max_bytes: int) -> None: ...
    def arm(self, status: bytes) -> None: ...
    def client(self, data: bytes, now_ns: int) -> EncodedRecord | None: ...
    def server(self, data: bytes, now_ns: int) -> EncodedRecord | None: ...

def shape(raw: bytes) -> bytes | None: ...
