"""The closed vocabulary of why a flow ended, or could not be inspected. Every word here is documented in docs/operations.md."""

from __future__ import annotations

import enum


class CloseReason(enum.StrEnum):
    """Why a flow ended."""

    CLIENT_CLOSED = "client_closed"
    SERVER_CLOSED = "server_closed"
    DENIED = "denied"
    IDENTITY_REQUIRED = "identity_required"
    ORIGIN_UNKNOWN = "origin_unknown"
    NOT_STEERED = "not_steered"
    PROTOCOL_ERROR = "protocol_error"
    LIMIT = "limit"
    UPSTREAM_UNREACHABLE = "upstream_unreachable"
    UPSTREAM_TLS = "upstream_tls"
    AUDIT_BLOCKED = "audit_blocked"
    INTERNAL_ERROR = "internal_error"
    DRAINED = "drained"
    WORKER_DIED = "worker_died"
    RESET = "reset"


class GapReason(enum.StrEnum):
    """What was let through, or lost, without inspection. Each becomes a `gap` record."""

    CLIENT_REQUIRES_TLS = "client_requires_tls"
    ENCRYPTED = "encrypted"
    LEAF_REJECTED = "leaf_rejected"
    UNKNOWN_PROTOCOL = "unknown_protocol"
    FOREIGN_NETNS = "foreign_netns"
    REFUSED_BY_KERNEL = "refused_by_kernel"
    QUIC_REFUSED = "quic_refused"
    GUARD_DROPPED = "guard_dropped"
    EVENTS_LOST = "events_lost"
    TABLE_CHANGED = "table_changed"
    HOOK_DETACHED = "hook_detached"
    SPOOL_DROPPED = "spool_dropped"
    TORN_TAIL = "torn_tail"
    FAIL_OPEN = "fail_open"
