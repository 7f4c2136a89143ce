"""From an accepted connection to `FlowFacts`: who opened it, whose job that is, which target it means.

Runs in the supervisor. Fails closed: a connection whose origin the kernel cannot name, or whose original destination
differs between kernel hook and conntrack, is refused and recorded, never guessed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from dataclasses import dataclass
from typing import Any, Protocol

from sidecar.config import Config, TargetConfig
from sidecar.identity.assertion import attachment_for
from sidecar.identity.service import IdentityService
from sidecar.model.flow import Address, FlowFacts, Target
from sidecar.model.ids import IdSource
from sidecar.model.reasons import CloseReason
from sidecar.proxy.link import Resolve
from sidecar.proxy.targets import NameBook

log = logging.getLogger(__name__)

MAX_TLS_MEMORY = 4096
"""Workloads remembered because they left after our answer `N`: oldest forgotten."""


class SocketOrigin(Protocol):
    """What the kernel recorded at connect (kernel.steering.SocketOrigin)."""

    @property
    def original(self) -> Address: ...


class OriginSource(Protocol):
    def take_origin(self, peer: Address, local: Address, original: Address) -> Any: ...


class Attributor(Protocol):
    def resolve(self, socket_origin: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a connection is not opened; recorded by the agent."""

    reason: CloseReason
    detail: str
    original: Address
    origin: Any = None


class FlowResolver:
    """Thread-safe where it has to be: attribution and identity run in a pool, because procfs and issuers may hang."""

    def __init__(
        self,
        config: Config,
        steering: OriginSource,
        attributor: Attributor,
        identity: IdentityService,
        names: NameBook,
    ) -> None:
        self._config = config
        self._steering = steering
        self._attributor = attributor
        self._identity = identity
        self._names = names
        self._ids = IdSource()
        self._pool = concurrent.futures.ThreadPoolExecutor(16, "resolve")
        self._wants_tls: dict[tuple[int, str, Address], None] = {}

    async def resolve(self, message: Resolve) -> FlowFacts | Refusal:
        peer = Address(message.peer_host, message.peer_port)
        local = Address(message.local_host, message.local_port)
        original = Address(message.original_host, message.original_port)
        found = self._steering.take_origin(peer, local, original)
        if found is None:
            return Refusal(
                CloseReason.ORIGIN_UNKNOWN, f"{peer} reached the listener without a steered connect", original
            )
        if found.original != original:
            return Refusal(
                CloseReason.NOT_STEERED,
                f"the kernel hook saw {found.original}, conntrack says {original}",
                original,
                found,
            )
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, self._facts, peer, original, found
        )

    def _facts(self, peer: Address, original: Address, found: Any) -> FlowFacts:
        attributed = self._attributor.resolve(found)
        identified = self._identity.identify(attributed.context)
        names = self._names.names_of(original.host)
        declared = self._config.target_for(original.host, original.port, names)
        target = self._target(original, names, declared)
        wants_tls = (
            attributed.client_wants_tls or self._tls_key(attributed.origin, original) in self._wants_tls
        )
        now_ns = time.time_ns()
        return FlowFacts(
            flow=self._ids.new(now_ns),
            opened_ns=now_ns,
            client=peer,
            target=target,
            origin=attributed.origin,
            workload=attributed.workload,
            principal=identified.principal,
            identity_error=identified.error,
            identity_required=self._config.identity.required,
            attachment=attachment_for(
                self._config.identity,
                declared,
                identified.principal,
                identified.token,
                attributed.workload,
            ),
            client_wants_tls=wants_tls,
        )

    def _target(self, original: Address, names: tuple[str, ...], declared: TargetConfig | None) -> Target:
        protocol = self._config.steering.ports.get(original.port, "auto")
        if declared is None:
            return Target(
                address=original,
                host=names[0] if names else original.host,
                host_source="resolved" if names else "address",
                protocol=protocol,
                names=names,
                unresolved=self._names.unresolved(),
                opens_tls=self._config.opens(None, protocol),
            )
        exact = declared.host if declared.host in names else names[0] if names else original.host
        return Target(
            address=original,
            host=exact,
            host_source="target" if exact in names else "address",
            protocol=declared.protocol or protocol,
            names=names,
            name=declared.name,
            tls_mode=declared.tls.mode if declared.tls else None,
            tls_ca=str(declared.tls.ca) if declared.tls and declared.tls.ca else None,
            pooler=declared.pooler,
            unresolved=self._names.unresolved(),
            opens_tls=self._config.opens(declared, declared.protocol or protocol),
        )

    def _tls_key(self, origin: Any, original: Address) -> tuple[int, str, Address]:
        return origin.uid, origin.exe or origin.comm, original

    def remember_tls(self, facts: FlowFacts) -> None:
        """This workload's client left after our answer `N`: its next connection there is relayed opaque, and recorded."""
        if facts.origin is None:
            return
        key = self._tls_key(facts.origin, facts.target.address)
        self._wants_tls.pop(key, None)
        self._wants_tls[key] = None
        while len(self._wants_tls) > MAX_TLS_MEMORY:
            del self._wants_tls[next(iter(self._wants_tls))]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
