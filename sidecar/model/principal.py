"""The authenticated identity behind a workload, and what of it is attached to a connection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sidecar.model.secret import Secret


@dataclass(frozen=True, slots=True)
class Principal:
    """A verified token's identity. `expires_ns` is `exp` in ns since the epoch. `claims` holds verified claims,
    values as JSON gives them; the token itself is not here."""

    issuer: str
    subject: str
    claims: dict[str, Any] = field(default_factory=dict, hash=False)
    jti: str = ""
    expires_ns: int = 0
    source: str = ""
    """Which configured source yielded it: `env`, `file`, …"""


@dataclass(frozen=True, slots=True)
class Attachment:
    """What to attach to this flow's connection. All empty unless the target is declared.

    `reserved_header` is stripped from every client's request whatever the target is: only we may set it.
    """

    http_header: str | None = None
    http_token: Secret | None = None
    reserved_header: str | None = None
    postgres_setting: str | None = None
    """Name of the setting that carries the signed assertion; set only when there is a principal and a target."""
    postgres_application_name: str | None = None
    """Already expanded, printable ASCII, at most 63 bytes."""
    reserved_setting: str | None = None
    """Clients may never SET, RESET or set_config this one, whatever the target is."""
