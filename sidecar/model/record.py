"""The audit record: a msgpack map with stable field names (design, "A record").

msgspec structs instead of dataclasses: the same shape, but encoded in C on the path of every statement. Fields at their
default are omitted from the map. Times are integers in ns since the epoch, durations in ns.
`seq`, `stream` and `host` are filled in by the stream writer and by nobody else.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

RECORD_VERSION = 1

Value: TypeAlias = str | bytes | None
"""Text, or bytes where it is not UTF-8 (bin in msgpack)."""

KINDS = ("open", "request", "response", "hold", "decision", "close", "gap", "agent")


class TargetPart(msgspec.Struct, omit_defaults=True, gc=False):
    host: str
    port: int
    protocol: str
    address: str = ""
    host_source: str = ""
    name: str | None = None
    database: str | None = None
    user: str | None = None
    tls: str | None = None
    """How the upstream hop is protected: `none`, `tls`, `passthrough`."""


class ObjectPart(msgspec.Struct, gc=False):
    name: str
    access: str
    """`read`, `write`, `call`, `define`."""


class OperationPart(msgspec.Struct, omit_defaults=True, gc=False):
    """`text` is bin where it is not UTF-8. Where it was cut, `text_bytes` is the full size and `text_digest` covers all of it."""

    kind: str
    text: str | bytes | None = None
    text_bytes: int | None = None
    text_digest: str | None = None
    truncated: bool = False
    parameters: tuple[str | bytes | None, ...] | None = None
    objects: tuple[ObjectPart, ...] = ()
    statements: tuple[str, ...] = ()
    method: str | None = None
    path: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    body: str | bytes | None = None
    body_bytes: int | None = None
    body_digest: str | None = None
    prepared: tuple[str | bytes | None, ...] = ()
    """Of EXECUTE and FETCH: the texts of PREPARE and DECLARE that they stand for, as records show them."""


class VerdictPart(msgspec.Struct, omit_defaults=True, gc=False):
    action: str
    rule: str | None = None
    reason: str = ""
    policy: str = ""
    enforced: bool = True
    would: str | None = None
    severity: str | None = None
    owner: str | None = None
    tags: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()


class ColumnPart(msgspec.Struct, omit_defaults=True, gc=False):
    name: str
    type: int = 0
    """PostgreSQL type OID."""
    masked: str | None = None
    """The rule that masked it."""


class ResponsePart(msgspec.Struct, omit_defaults=True, gc=False):
    """`sample` holds at most `audit.responses.max_rows` rows, masked as the client saw them; `rows`, `bytes` and `digest`
    (SHA-256, hex, of the bytes the client got) always cover all of the response. Of COPY FROM STDIN, `bytes` is what the client sent."""

    status: str | int | None = None
    rows: int = 0
    bytes: int = 0
    columns: tuple[ColumnPart, ...] = ()
    sample: tuple[tuple[Value, ...], ...] = ()
    body: Value = None
    headers: tuple[tuple[str, str], ...] = ()
    truncated: bool = False
    digest: str | None = None
    error: dict[str, str] | None = None


class TimingPart(msgspec.Struct, omit_defaults=True, gc=False):
    held_ns: int = 0
    upstream_ns: int = 0
    inspector_ns: int = 0


class HoldPart(msgspec.Struct, omit_defaults=True, gc=False):
    id: str
    state: str = "pending"
    """`pending`, `approved`, `rejected`, `expired`, `withdrawn`."""
    by: str | None = None
    reason: str = ""
    expires_ns: int = 0
    digest: str = ""


class Record(msgspec.Struct, omit_defaults=True, gc=False, kw_only=True):
    """One fact. `origin`, `workload`, `principal` and `target` may be pre-encoded (msgspec.Raw), as they repeat."""

    v: int = 0
    id: str
    ts_ns: int
    host: str = ""
    stream: str = ""
    seq: int = -1
    kind: str
    flow: str = ""
    request: str | None = None
    """On `response`, `hold`, `decision`: the id of the request's record."""
    origin: Any = None
    workload: Any = None
    principal: Any = None
    identity_error: str | None = None
    target: Any = None
    operation: OperationPart | None = None
    verdict: VerdictPart | None = None
    response: ResponsePart | None = None
    hold: HoldPart | None = None
    timing: TimingPart | None = None
    reason: str | None = None
    """On `close`, `gap`, `agent`: one word of `model.reasons`."""
    detail: str | None = None
    bytes_client: int = 0
    bytes_server: int = 0
    via: str | None = None


class EncodedRecord(msgspec.Struct, gc=False):
    """A record that its maker has encoded already, but for what the stream writer fills in: `front` is the map's head, `v`, `id` and
    `ts_ns`; `rest` begins with `kind`. `host`, `stream` and `seq` go between."""

    kind: str
    id: str
    front: bytes
    rest: bytes
