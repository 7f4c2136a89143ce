"""What crosses the control socket: shapes, framing, methods and bounds. No I/O.

A frame is a 4-byte big-endian length and that many bytes of msgpack. A client sends a `Request` and reads one
`Reply`, or, for a watching request, replies with `more` set until one without. Unknown fields are ignored on
both sides, so that a command and an agent of neighbouring versions understand each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from sidecar.approvals.grants import Decider
from sidecar.errors import ControlError
from sidecar.model.origin import Origin

RUN_DIRECTORY: Final = Path("/run/sidecar")
SOCKET_NAME: Final = "control.sock"

MAX_REQUEST_BYTES: Final = 65_536
"""A request holds an id and a sentence; anything longer is not ours."""
MAX_REPLY_BYTES: Final = 16 * 1024 * 1024
MAX_CLIENTS: Final = 64
MAX_CLIENTS_PER_UID: Final = 8
"""Of peers that are no operators, so that a job cannot keep the approver out."""
REQUEST_TIMEOUT_S: Final = 10.0
"""From accept, or the last reply, to a whole request."""
REPLY_TIMEOUT_S: Final = 10.0
"""For the agent to answer, and for the client to take a reply."""
WATCH_INTERVAL_S: Final = 1.0
MAX_NAME_CHARS: Final = 200


def socket_path(instance: str, directory: Path = RUN_DIRECTORY) -> Path:
    return directory / instance / SOCKET_NAME


@dataclass(frozen=True, slots=True)
class PolicyStatus:
    file: str | None = None
    """None: the built-in policy."""
    revision: str = ""
    loaded_ns: int = 0
    error: str | None = None
    """Why the file on disk is not in force (the older revision is)."""
    rules: int = 0
    """Rules that enforce."""
    observing: int = 0
    """Rules that only observe: never counted as enforced."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    pid: int
    flows: int = 0
    restarts: int = 0
    rss_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SpoolStatus:
    ok: bool = True
    blocked_reason: str | None = None
    dropping: bool = False
    """`audit.on_full: drop`: what blocks holds no request up, records are lost and counted."""
    used_bytes: int = 0
    unshipped_bytes: int = 0
    directory: str = ""


@dataclass(frozen=True, slots=True)
class ShippingStatus:
    url: str | None = None
    ok: bool = True
    error: str | None = None
    shipped_batches: int = 0
    last_receipt_ns: int = 0


@dataclass(frozen=True, slots=True)
class DriftStatus:
    """One change to our kernel state that somebody else made."""

    name: str
    detail: str
    repaired: bool
    ts_ns: int = 0


@dataclass(frozen=True, slots=True)
class SteeringStatus:
    ok: bool = True
    on_failure: str = "closed"
    listen_port: int = 0
    drifts: tuple[DriftStatus, ...] = ()
    """The newest ones."""
    drift_count: int = 0
    refused: int = 0
    """Connections that the kernel refused because the inspector was not there."""


@dataclass(frozen=True, slots=True)
class IdentityStatus:
    required: bool = False
    issuers: tuple[str, ...] = ()
    verified: int = 0
    failed: int = 0
    """Flows with a token that was not accepted."""
    error: str | None = None
    absent: int = 0
    """Flows without a token."""


@dataclass(frozen=True, slots=True)
class Status:
    """What `sidecar status` shows of one instance."""

    instance: str
    pid: int
    version: str
    mode: str
    """`run` or `exec`."""
    started_ns: int
    scope: tuple[str, ...] = ()
    """`all`, or cgroup paths."""
    ports: dict[int, str] = field(default_factory=dict)
    policy: PolicyStatus = field(default_factory=PolicyStatus)
    workers: tuple[WorkerStatus, ...] = ()
    spool: SpoolStatus = field(default_factory=SpoolStatus)
    shipping: ShippingStatus = field(default_factory=ShippingStatus)
    steering: SteeringStatus = field(default_factory=SteeringStatus)
    identity: IdentityStatus = field(default_factory=IdentityStatus)
    gaps: dict[str, int] = field(default_factory=dict)
    """Count by GapReason since the start."""
    limitations: tuple[str, ...] = ()
    """What this instance cannot cover on this host, in words."""
    flows: int = 0
    holds: int = 0
    command: tuple[str, ...] = ()
    """`exec`: what runs."""
    collector: str | None = None
    """Address of the embedded collector's page."""


@dataclass(frozen=True, slots=True)
class FlowRow:
    """One open flow. `state`: `open`, `held`, `draining`, …"""

    flow: str
    opened_ns: int
    pid: int
    exe: str
    uid: int
    principal: str
    target: str
    protocol: str
    requests: int = 0
    denied: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    state: str = "open"


@dataclass(frozen=True, slots=True)
class HoldView:
    """One hold as approvers see it; statement and parameters are masked already."""

    id: str
    instance: str
    rule: str
    reason: str
    statement: str
    target: str
    principal: str
    process: str
    opened_ns: int
    expires_ns: int
    state: str
    parameters: tuple[str, ...] | None = None
    by: tuple[str, ...] = ()
    """Who may decide: users and groups; empty: root and the group `sidecar`."""
    flow: str = ""
    request: str = ""
    digest: str = ""
    decided_by: str | None = None
    decided_ns: int = 0
    decision_reason: str = ""


class Request(msgspec.Struct, frozen=True):
    method: str
    args: dict[str, Any] = {}


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """`error` None: `result` is the answer. `kind` is a word of `ErrorKind`."""

    result: Any = None
    error: str | None = None
    kind: str = ""
    hint: str | None = None
    more: bool = False


METHODS: Final[dict[str, bool]] = {
    # method -> needs an operator (root or group sidecar)
    "status": True,
    "flows": True,
    "watch_flows": True,
    "reload": True,
    "stop": True,
    "holds": False,  # others see only those they may decide
    "hold": False,
    "decide": False,
    "why": False,  # others see only records of their own uid
}


class ControlApi(Protocol):
    """What the agent answers. The server has checked who asks before it calls any of these.

    `decide` raises `GrantRefused` (a ControlError); others raise ControlError where they cannot answer.
    """

    async def status(self) -> Status: ...

    async def flows(self) -> list[FlowRow]: ...

    async def holds(self) -> list[HoldView]: ...

    async def hold(self, hold_id: str) -> HoldView | None:
        """By full id, or by its short form where that is unambiguous."""
        ...

    async def decide(self, hold_id: str, approve: bool, by: Decider, reason: str) -> HoldView: ...

    async def why(self, record_id: str, peer_uid: int) -> dict[str, Any] | None:
        """The record as a map, with `origin` (at least `uid`) joined in; `peer_uid` 0: an operator asks."""
        ...

    async def reload(self) -> None: ...

    async def stop(self) -> None:
        """Begin to stop; return without waiting for the end."""
        ...

    def is_steered(self, pid: int, cgroup: str) -> bool:
        """Whether the process is inside a job's own scope: an `exec` of any instance, or one of `scope:
        {cgroups: …}`. Not: the cgroup root, where `scope: all` steers the approver's shell as well."""
        ...

    def held_origin(self, hold_id: str) -> Origin | None:
        """Who opened the held flow; None where the hold is unknown or its origin is."""
        ...


def encode(message: Request | Reply) -> bytes:
    """A whole frame."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "big") + body


def decode_request(body: bytes) -> Request:
    try:
        return msgspec.msgpack.decode(body, type=Request)
    except msgspec.MsgspecError as error:
        raise ControlError(f"not a request: {error}") from error


def decode_reply(body: bytes) -> Reply:
    try:
        return msgspec.msgpack.decode(body, type=Reply)
    except msgspec.MsgspecError as error:
        raise ControlError(f"not a reply: {error}", hint="is the agent of another version?") from error
