"""From a workload's context to a verified principal. Blocks (procfs, files, issuers) for a bounded time: run
it in a pool.

A verified token is remembered by its digest, until it expires or for `REMEMBER_S`, so that a job's second
connection costs a hash. Refusals are remembered for a moment, so that a job which hammers with a forged token
costs no signature checks; what may heal by itself (keys that could not be fetched, a token that is not valid
yet) is not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from dataclasses import dataclass
from typing import Final

from sidecar.config import Identity
from sidecar.errors import IdentityError
from sidecar.identity.keys import WAIT_S
from sidecar.identity.sources import TokenFinder, WorkloadContext
from sidecar.identity.verify import Verifier
from sidecar.model.principal import Principal
from sidecar.model.secret import Secret

MAX_REMEMBERED: Final = 4096
REMEMBER_S: Final = 60.0
"""A verified token is believed so long before its signature is checked again: a key that an issuer withdraws
takes effect."""
REMEMBER_REFUSAL_S: Final = 5.0
HEALING: Final = frozenset({"keys_unavailable", "unknown_key", "not_yet_valid", "issued_in_future"})
"""Refusals that time alone may undo."""


@dataclass(frozen=True, slots=True)
class Identified:
    """`error` is a word of verify.REASONS where there is no principal; `detail` is the sentence, and holds
    nothing secret."""

    principal: Principal | None
    token: Secret | None
    error: str | None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Verdict:
    until: float
    """Seconds since the epoch: a token expires by the wall clock."""
    principal: Principal | None
    error: str | None = None
    detail: str = ""


class IdentityService:
    """Thread-safe."""

    def __init__(self, config: Identity, *, wait_s: float = WAIT_S) -> None:
        self._config = config
        self._wait_s = wait_s
        self._finder = TokenFinder(config.sources)
        self._verifier = Verifier(config.issuers, max_age_s=config.max_age_s)
        self._lock = threading.Lock()
        self._remembered: dict[bytes, _Verdict] = {}

    def identify(self, context: WorkloadContext) -> Identified:
        """Never raises; takes `wait_s` at most where an issuer does not answer."""
        try:
            found = self._finder.find(context, self._wait_s)
        except IdentityError as error:
            return Identified(None, None, error.reason, error.message)
        if found is None:
            if context.exited and self._config.sources:
                return Identified(
                    None, None, "process_gone", "the process had exited before its token could be read"
                )
            return Identified(None, None, "no_token", "no source yielded a token")
        verdict = self._judge(found.token, found.source)
        if verdict.principal is None:
            return Identified(None, None, verdict.error, verdict.detail)
        principal = verdict.principal
        if principal.source != found.source:
            principal = dataclasses.replace(principal, source=found.source)
        return Identified(principal, found.token, None)

    def problems(self) -> tuple[str, ...]:
        """Of issuers whose keys could not be read or fetched last time: who, and why. For `status`."""
        return self._verifier.problems()

    def _judge(self, token: Secret, source: str) -> _Verdict:
        digest = hashlib.sha256(token.reveal().encode("utf-8", "surrogateescape")).digest()
        now = time.time()
        known = self._remembered.get(digest)
        if known is not None and now < known.until:
            return known
        try:
            principal = self._verifier.verify(token, source, self._wait_s)
        except IdentityError as error:
            verdict = _Verdict(now + REMEMBER_REFUSAL_S, None, error.reason, error.message)
            if error.reason not in HEALING:
                self._remember(digest, verdict)
            return verdict
        until = min(principal.expires_ns / 1e9, now + REMEMBER_S)
        if self._config.max_age_s is not None:
            until = min(until, principal.claims["iat"] + self._config.max_age_s)
        verdict = _Verdict(until, principal)
        self._remember(digest, verdict)
        return verdict

    def _remember(self, digest: bytes, verdict: _Verdict) -> None:
        with self._lock:
            self._remembered.pop(digest, None)
            while len(self._remembered) >= MAX_REMEMBERED:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[digest] = verdict
