"""A normalised act: what the policy judges, whatever the protocol."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SqlOperation:
    """One statement text as the client sent it (it may hold several statements).

    `kind`: `query` (simple), `parse`, `execute` or `function_call`. `parameters` are bound values in text where their
    wire format was text, bytes where it was binary, None for NULL; None as a whole where none are known yet.
    """

    kind: str
    text: str
    database: str | None
    user: str | None
    parameters: tuple[str | bytes | None, ...] | None = None
    standard_conforming_strings: bool = True
    bodies_known: bool = False
    """The caller has the bodies of the users' own functions, and judges by them what these may read."""


@dataclass(frozen=True, slots=True)
class HttpOperation:
    """One request's head. `host` is from Host or the absolute target, without port, lower case; `path` is decoded for
    matching once and normalised (dot segments removed), `raw_path` as sent; header names are lower case."""

    method: str
    host: str | None
    path: str
    raw_path: str
    query: tuple[tuple[str, str], ...]
    headers: tuple[tuple[str, str], ...]
    body_json: object | None = None
    """The parsed body, only where a rule asks for `request_json` and it fits the limit; else None."""
    body_known: bool = False
    """True once `body_json` is final (so that None means: no JSON)."""
    path_readings: tuple[str, ...] = ()
    """What else servers may take `path` for: `%2F` that is no slash, dot segments that are not followed, and the like."""


@dataclass(frozen=True, slots=True)
class ConnectOperation:
    """The opening of a flow; `protocol` is what is known by then: `postgres`, `http` or `opaque` (`unknown` while the
    first bytes are awaited)."""

    protocol: str


Operation = SqlOperation | HttpOperation | ConnectOperation
