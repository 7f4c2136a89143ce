"""What a session tells its driver to do, and the interface of a session itself.

A session is a pure state machine: the driver calls one of its event methods and carries out the returned commands *in
order*. It never blocks, never reads a clock (`now_ns` is passed in, ns since the epoch) and never touches a socket.
Order is the contract of the audit: a `WriteRecord` that stands before a `Send` is in the spool file before those bytes
leave. The driver may join adjacent sends to one side into one write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from sidecar.model.flow import Side
from sidecar.model.reasons import CloseReason
from sidecar.model.record import EncodedRecord, Record
from sidecar.model.verdict import ApproveTerms, Engine


@dataclass(slots=True)
class Send:
    """Write `data` to the connection of `side`. The driver does not copy it; the session never changes it afterwards."""

    side: Side
    data: bytes | bytearray | memoryview


@dataclass(slots=True)
class WriteRecord:
    """Append a record to the worker's stream before any later command is carried out."""

    record: Record | EncodedRecord


@dataclass(frozen=True, slots=True)
class OpenUpstream:
    """Connect to the flow's original destination; answered by `upstream_connected`, or by `abort(UPSTREAM_UNREACHABLE)`."""


@dataclass(frozen=True, slots=True)
class StartTls:
    """Begin a TLS client handshake on the upstream connection. The driver answers with `tls_started` or ends the flow with
    `upstream_tls`. `verify` is libpq's word: `require`, `verify-ca` or `verify-full`; None means opportunistic (no verification)."""

    server_name: str | None
    verify: str | None
    ca_file: str | None


@dataclass(frozen=True, slots=True)
class MintLeaf:
    """Ask for a certificate of the local authority for these names; answered by `leaf_minted`, with what serves TLS under it."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SignAssertion:
    """Ask the supervisor for an identity assertion bound to this backend; answered by `assertion_signed`."""

    backend_pid: int


@dataclass(frozen=True, slots=True)
class OpenHold:
    """Park: ask the supervisor for a decision; answered by `hold_decided`. `summary` and `parameters` are what approvers
    see (already masked); `digest` (SHA-256, hex) covers exact text, parameters, target and principal."""

    hold_id: str
    request_id: str
    rule: str
    reason: str
    terms: ApproveTerms
    summary: str
    parameters: tuple[str | bytes | None, ...] | None
    digest: str


@dataclass(frozen=True, slots=True)
class WithdrawHold:
    """The client is gone or the session ended: the hold is no longer wanted."""

    hold_id: str


@dataclass(frozen=True, slots=True)
class PauseReading:
    """Stop (or resume) reading from `side`. Hang-ups of a paused client are still reported as `eof`.
    Back-pressure of slow peers is the driver's own affair and needs no command."""

    side: Side
    paused: bool


@dataclass(frozen=True, slots=True)
class HalfClose:
    """Shut down the sending direction towards `side` after all earlier sends."""

    side: Side


@dataclass(frozen=True, slots=True)
class CloseFlow:
    """Flush what was sent, close both sides. The session has emitted its `close` record already; nothing follows."""

    reason: CloseReason


Command: TypeAlias = (
    Send
    | WriteRecord
    | OpenUpstream
    | StartTls
    | MintLeaf
    | SignAssertion
    | OpenHold
    | WithdrawHold
    | PauseReading
    | HalfClose
    | CloseFlow
)


class Session(Protocol):
    """One flow. Every method returns the commands to carry out, in order; after a `CloseFlow` no method may be called."""

    def start(self, now_ns: int) -> list[Command]:
        """The client is accepted. Writes the `open` record with the verdict on connecting, and emits `OpenUpstream` at once
        unless connecting is denied: then the session goes on without upstream, to tell the client in its own protocol."""
        ...

    def upstream_connected(self, now_ns: int) -> list[Command]: ...

    def receive(self, side: Side, data: bytes, now_ns: int) -> list[Command]:
        """Bytes arrived from `side`; `data` is never empty and not reused by the driver."""
        ...

    def eof(self, side: Side, now_ns: int) -> list[Command]:
        """`side` sent its last byte (or reset the connection)."""
        ...

    def tls_started(self, now_ns: int) -> list[Command]: ...

    def assertion_signed(self, assertion: str | None, now_ns: int) -> list[Command]:
        """None: the supervisor could not sign; the session goes on without the setting and says so in a record."""
        ...

    def hold_decided(
        self, hold_id: str, outcome: str, by: str | None, reason: str, now_ns: int
    ) -> list[Command]:
        """`outcome`: `approved`, `rejected` or `expired`. Judged again by the current policy before anything is released."""
        ...

    def engine_changed(self, engine: Engine, now_ns: int) -> list[Command]:
        """A new policy revision is in force for every later statement."""
        ...

    def abort(self, reason: CloseReason, detail: str, now_ns: int) -> list[Command]:
        """The driver has to end the flow (drain, upstream lost, spool full): tell the client in its own protocol
        (PostgreSQL `58000`, HTTP `503`), write the `close` record, end with `CloseFlow`. For `UPSTREAM_UNREACHABLE` nothing is
        sent: the driver resets the client's connection, as near to the server's own refusal as can be."""
        ...


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Bounds, in bytes unless said; each is documented in docs/operations.md."""

    record_text_max_bytes: int = 65_536
    record_body_max_bytes: int = 65_536
    response_max_rows: int = 100
    response_max_bytes: int = 65_536
    startup_max_bytes: int = 10_000
    """libpq's MAX_STARTUP_PACKET_LENGTH."""
    statement_max_bytes: int = 64 * 1024 * 1024
    """A statement has to be whole to be judged; longer ones are refused (named limit)."""
    held_max_bytes: int = 1024 * 1024
    """What is read ahead from a client whose statement is held."""
    head_max_bytes: int = 65_536
    """HTTP request or response head."""
    masked_body_max_bytes: int = 16 * 1024 * 1024
    """A body that a mask has to understand as a whole; longer ones are refused."""
    masked_row_max_bytes: int = 1024 * 1024 * 1024


__all__ = [
    "CloseFlow",
    "Command",
    "HalfClose",
    "MintLeaf",
    "OpenHold",
    "OpenUpstream",
    "PauseReading",
    "Send",
    "Session",
    "SessionLimits",
    "SignAssertion",
    "StartTls",
    "WithdrawHold",
    "WriteRecord",
]
