"""The short way: what nearly every driver sends for one statement, and what nearly every server answers, from bytes to bytes.

    client   Query                                                                        a chunk of its own
             [Parse] Bind [Describe] Execute Sync, of the unnamed portal
    server   [ParseComplete] [BindComplete] [RowDescription | NoData] DataRow… CommandComplete ReadyForQuery

Owns nothing that is decided: which statements may pass here, and how their rows are treated, the session says (postgres_cycle).
Where any byte is not just so, the lane answers None and has done nothing; the session then takes over what is under way and goes
the long way. Records are put together from pieces that were encoded once, so that they hold what the long way's hold.

The lane itself is compiled (`_lane.pyx`). Where it was not built, COMPILED is False and every message goes the long way: the same
decisions and the same records, at a lower speed. `sidecar doctor` says which it is.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sidecar.model.record import ColumnPart, Record, ResponsePart, TimingPart

try:
    from sidecar.session._lane import CHUNK_MAX_BYTES, SLOT, Answer, Cycle, Known, Lane, shape
except ImportError:  # not built: no compiler at installation
    COMPILED = False
else:
    COMPILED = True


def make_answer(flow: str, columns: tuple[ColumnPart, ...]) -> Answer:
    """How answers of these columns are recorded on this flow."""
    slot: Any = SLOT
    rows = ResponsePart(status=slot, rows=slot, bytes=slot, columns=columns, sample=slot, digest=slot)
    empty = ResponsePart(status=slot, columns=columns)
    return Answer(*(_response(flow, part) for part in (rows, empty)))


def _response(flow: str, part: ResponsePart) -> Record:
    slot: Any = SLOT
    timing = TimingPart(upstream_ns=slot)
    return Record(id="", ts_ns=0, kind="response", flow=flow, request=slot, response=part, timing=timing)


def make_known(
    decision: object, raw: bytes, request: Record, bare: Answer, *, query: bool, bare_rows: bool
) -> Known:
    """A statement with its request's record: of a query the text differs from time to time, else the parameters."""
    assert request.operation is not None
    changed: dict[str, Any] = {"text": SLOT} if query else {"parameters": SLOT}
    request.operation = msgspec.structs.replace(request.operation, **changed)
    return Known(decision, raw, request, bare, query=query, bare_rows=bare_rows)


__all__ = [
    "CHUNK_MAX_BYTES",
    "COMPILED",
    "Answer",
    "Cycle",
    "Known",
    "Lane",
    "make_answer",
    "make_known",
    "shape",
]
