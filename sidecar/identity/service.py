"""From a workload's context to a verified principal, remembered by the token's digest until it expires. Blocks: run it in a pool."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from typing import Final

from sidecar.config import Identity
from sidecar.errors import IdentityError
from sidecar.identity.sources import WorkloadContext, find_token
from sidecar.identity.verify import Verifier
from sidecar.model.principal import Principal
from sidecar.model.secret import Secret

MAX_REMEMBERED: Final = 4096
REMEMBER_S: Final = 300.0
"""A verdict on a token is used so long at most, so that keys that are withdrawn take effect."""


@dataclass(frozen=True, slots=True)
class Identified:
    """`error` is a word of verify.REASONS where there is no principal; `detail` the sentence."""

    principal: Principal | None
    token: Secret | None
    error: str | None
    detail: str = ""


class IdentityService:
    """Thread-safe."""

    def __init__(self, config: Identity) -> None:
        self._config = config
        self._verifier = Verifier(config.issuers)
        self._lock = threading.Lock()
        self._remembered: dict[bytes, tuple[float, Principal]] = {}

    def identify(self, context: WorkloadContext) -> Identified:
        try:
            found = find_token(self._config.sources, context)
            if found is None:
                return Identified(None, None, "no_token", "no source yielded a token")
            principal = self._verified(found.token, found.source)
        except IdentityError as error:
            return Identified(None, None, error.reason, error.message)
        return Identified(principal, found.token, None)

    def _verified(self, token: Secret, source: str) -> Principal:
        digest = hashlib.sha256(token.reveal().encode()).digest()
        now = time.time()
        with self._lock:
            known = self._remembered.get(digest)
        if known is not None and now < known[0]:
            return known[1]
        principal = self._verifier.verify(token, source)
        issued = principal.claims.get("iat")
        max_age = self._config.max_age_s
        if max_age is not None and isinstance(issued, int | float) and now - issued > max_age:
            raise IdentityError("the token is older than identity.max_age", reason="expired")
        with self._lock:
            if len(self._remembered) >= MAX_REMEMBERED:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[digest] = (min(principal.expires_ns / 1e9, now + REMEMBER_S), principal)
        return principal
