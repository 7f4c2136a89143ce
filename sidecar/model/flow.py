"""A steered connection and the facts known about it when it opens."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from sidecar.model.origin import Origin
from sidecar.model.principal import Attachment, Principal
from sidecar.model.workload import Workload


class Side(enum.Enum):
    """Which end of a flow: the job's client, or the server it meant to reach."""

    CLIENT = "client"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class Address:
    """An IP address in text (no brackets, no v4-mapped form) and a TCP port (1..65535)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Target:
    """Where the flow goes, as far as it is known.

    `names` are all host names that may denote the destination (declared target, forward resolution,
    later SNI or Host); `host` is the best of them, or the address. `host_source` says where it is from:
    `target`, `resolved`, `sni`, `http_host`, `address`.
    `protocol` is the one configured for the port: `postgres`, `http`, `auto` or `opaque`.
    `tls_mode` is libpq's word for the upstream hop, or None where no target declares it.
    """

    address: Address
    host: str
    host_source: str
    protocol: str
    names: tuple[str, ...] = ()
    name: str | None = None
    """The declared target's name, None for a destination that nobody declared."""
    tls_mode: str | None = None
    tls_ca: str | None = None
    opens_tls: bool = False
    """The configuration wants TLS to this destination opened."""
    tls_name: str | None = None
    """The server name that the client asked for in TLS that we opened; nothing is sent to a server that is not verified for it."""
    claimed: tuple[str, ...] = ()
    """Names that only the client says, as in a hello that we do not open: enough for a denial, never for an allow."""
    pooler: str | None = None
    unresolved: tuple[str, ...] = ()
    """Names that rules or targets use and that do not resolve at the moment: they may be this address."""


@dataclass(frozen=True, slots=True)
class FlowFacts:
    """All that the policy may ask of a flow, fixed for its life except what the protocol reveals later."""

    flow: str
    """UUIDv7 of the flow."""
    opened_ns: int
    client: Address
    target: Target
    origin: Origin | None
    """None: the kernel could not say (recorded, never guessed)."""
    workload: Workload
    principal: Principal | None = None
    identity_error: str | None = None
    """Why there is no principal: the closed reason of `identity.verify`, or `no_token`."""
    identity_required: bool = False
    attachment: Attachment = field(default_factory=Attachment)
    client_wants_tls: bool = False
    """The client's environment or command line demands TLS (`sslmode=require` and stronger)."""
