"""An issuer's keys: a JWKS from a file or a URL, cached, refetched for an unknown `kid` at a bounded rate, kept while offline.

Blocks (files, HTTP): call it outside the event loop. Source: RFC 7517.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any, Final

import httpx
import jwt

from sidecar.errors import IdentityError

MAX_JWKS_BYTES: Final = 1024 * 1024
MAX_KEYS: Final = 256
FETCH_TIMEOUT_S: Final = 2.0
FRESH_S: Final = 300.0
"""How long keys are used without asking again."""
REFETCH_S: Final = 10.0
"""The least time between two fetches: an unknown `kid` in a forged token must not become a flood."""
OFFLINE_GRACE_S: Final = 24 * 3600.0
"""How long keys are used while the issuer cannot be reached."""


class KeySet:
    """One issuer's keys. Thread-safe: one fetch at a time, others use what is there."""

    def __init__(self, location: str) -> None:
        self._location = location.removeprefix("file://")
        self._is_url = location.startswith(("http://", "https://"))
        self._lock = threading.Lock()
        self._keys: dict[str | None, Any] = {}
        self._fetched = -1e12
        self._tried = -1e12
        self._error = ""
        self._seen: tuple[int, int] | None = None

    def key(self, kid: str | None) -> Any:
        """A PyJWK. Raises IdentityError: `keys_unavailable` or `unknown_key`."""
        with self._lock:
            now = time.monotonic()
            if now - self._fetched > FRESH_S or self._changed():
                self._refresh(now)
            found = self._find(kid)
            if found is None:
                self._refresh(now)
                found = self._find(kid)
            if found is not None and now - self._fetched <= OFFLINE_GRACE_S:
                return found
            if not self._keys or now - self._fetched > OFFLINE_GRACE_S:
                raise IdentityError(f"the issuer's keys are not available: {self._error}", reason="keys_unavailable")
            raise IdentityError("the token names a key that the issuer does not have", reason="unknown_key")

    def _find(self, kid: str | None) -> Any:
        if kid is not None:
            return self._keys.get(kid)
        return next(iter(self._keys.values())) if len(self._keys) == 1 else None

    def _changed(self) -> bool:
        if self._is_url:
            return False
        try:
            facts = Path(self._location).stat()
        except OSError:
            return False
        return (facts.st_mtime_ns, facts.st_size) != self._seen

    def _refresh(self, now: float) -> None:
        if self._is_url and now - self._tried < REFETCH_S:
            return
        self._tried = now
        try:
            text = self._fetch() if self._is_url else self._read()
            keys = jwt.PyJWKSet.from_dict(json.loads(text)).keys
        except (OSError, ValueError, httpx.HTTPError, jwt.PyJWTError, TypeError, AttributeError) as error:
            self._error = f"{type(error).__name__}: {error}"[:200]
            return
        self._keys = {key.key_id: key for key in keys[:MAX_KEYS]}
        self._fetched = now
        self._error = ""

    def _read(self) -> str:
        path = Path(self._location)
        facts = path.stat()
        if facts.st_size > MAX_JWKS_BYTES:
            raise ValueError("the JWKS is too large")
        self._seen = (facts.st_mtime_ns, facts.st_size)
        return path.read_text()

    def _fetch(self) -> str:
        deadline = time.monotonic() + FETCH_TIMEOUT_S
        with httpx.stream("GET", self._location, timeout=FETCH_TIMEOUT_S, follow_redirects=False) as response:
            response.raise_for_status()
            body = bytearray()
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > MAX_JWKS_BYTES or time.monotonic() > deadline:
                    raise ValueError("the JWKS is too large or too slow")
        return body.decode()
