"""Protocol name → session."""

from __future__ import annotations

from collections.abc import Callable

from sidecar.session.auto import AutoSession
from sidecar.session.commands import Session
from sidecar.session.context import SessionContext
from sidecar.session.http import HttpSession
from sidecar.session.opaque import OpaqueSession
from sidecar.session.postgres import PostgresSession

SESSIONS: dict[str, Callable[[SessionContext], Session]] = {
    "postgres": PostgresSession,
    "http": lambda context: AutoSession(context, HttpSession),
    "auto": AutoSession,
    "opaque": OpaqueSession,
}


def make_session(context: SessionContext) -> Session:
    """By the protocol that the configuration names for the destination; `auto` looks at the first bytes."""
    return SESSIONS[context.facts.target.protocol](context)
