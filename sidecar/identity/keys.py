"""An issuer's public keys: a JWKS from a file, from a URL, or from where the issuer's discovery document says.

Fresh for as long as the issuer says (within bounds), refetched for an unknown `kid` at a bounded rate, kept
for a while when the issuer cannot be reached. A fetch runs in a thread of its own and whoever needs it waits
a bounded time: an issuer that hangs or dribbles costs a job two seconds once, and its next flows nothing.
Source: RFC 7517, RFC 8037; OpenID Connect Discovery 1.0, sections 3 and 4.

Only public keys for signatures are taken. Key addresses and keys in a token's header (`jku`, `jwk`, `x5u`,
`x5c`) are never used.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import jwt

from sidecar.errors import IdentityError
from sidecar.identity.bounded_http import ask

log = logging.getLogger(__name__)

DISCOVERY: Final = "/.well-known/openid-configuration"
MAX_JWKS_BYTES: Final = 1024 * 1024
MAX_KEYS: Final = 256
MAX_KID_CHARS: Final = 1024
MIN_RSA_BITS: Final = 2048
"""RFC 7518, section 3.3."""
WAIT_S: Final = 2.0
"""What a flow waits for keys at most. A fetch goes on after the first waiter gave up, so that the next one finds keys."""
FRESH_S: Final = 300.0
"""How long keys are used without asking again where the issuer does not say."""
MIN_FRESH_S: Final = 60.0
MAX_FRESH_S: Final = 3600.0
RETRY_S: Final = 5.0
"""After a failed fetch, the next one is tried no sooner: while an issuer hangs, flows are answered at
once."""
REFETCH_S: Final = 10.0
"""The least time between two fetches for an unknown `kid`: forged tokens must not become a flood."""
OFFLINE_GRACE_S: Final = 3600.0
"""How long keys are used past their freshness while the issuer cannot be reached."""

_MAX_AGE: Final = re.compile(r"(?i)(?:^|[\s,])max-age\s*=\s*\"?(\d{1,9})")


@dataclass(frozen=True, slots=True)
class PublicKey:
    """One verified-usable key. `algorithms` are those that it may be used with."""

    kid: str | None
    algorithms: frozenset[str]
    key: Any
    """A public key of `cryptography`."""


@dataclass(frozen=True, slots=True)
class _Fetched:
    keys: tuple[PublicKey, ...]
    fresh_s: float


class KeySet:
    """One issuer's keys. Thread-safe. Blocks up to `WAIT_S`: call it outside the event loop.

    `location` is a file or an address; None: what the discovery document of `issuer` names."""

    def __init__(
        self, location: str | None, issuer: str = "", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._discovers = location is None
        location = issuer if location is None else location
        self._is_url = location.startswith(("http://", "https://"))
        self._location = location if self._is_url else location.removeprefix("file://")
        self._clock = clock
        self._changed = threading.Condition()
        self._keys: tuple[PublicKey, ...] = ()
        self._fresh_until = -1e12
        self._usable_until = -1e12
        self._tried = -1e12
        self._failed = False
        self._error = "they were never fetched"
        self._fetching = False
        self._seen: tuple[int, ...] | None = None

    def candidates(self, kid: str | None, algorithm: str, wait_s: float = WAIT_S) -> tuple[PublicKey, ...]:
        """The keys that may have signed a token with this header: one, or, where the token names none, a few.

        Raises IdentityError: `keys_unavailable`, `unknown_key`, `algorithm_refused`.
        """
        deadline = time.monotonic() + wait_s
        self._ensure_fresh(deadline)
        named = self._named(kid)
        if not named and self._may_refetch():
            self._fetch_and_wait(deadline)
            named = self._named(kid)
        if not self._usable():
            raise IdentityError(
                f"the issuer's keys are not available: {self._error}", reason="keys_unavailable"
            )
        if not named:
            raise IdentityError("the token names a key that the issuer does not have", reason="unknown_key")
        fitting = tuple(key for key in named if algorithm in key.algorithms)
        if not fitting:
            raise IdentityError(
                "the token's algorithm does not fit the issuer's key", reason="algorithm_refused"
            )
        return fitting

    @property
    def error(self) -> str:
        """Why the keys could not be read last time; empty where they could, or were not needed yet."""
        return self._error if self._failed else ""

    def _named(self, kid: str | None) -> tuple[PublicKey, ...]:
        """A key set may leave `kid` out, and so may a token (RFC 7517, section 4.5): then every key is a
        candidate."""
        keys = self._keys
        if kid is None:
            return keys
        return tuple(key for key in keys if key.kid == kid) or tuple(key for key in keys if key.kid is None)

    def _usable(self) -> bool:
        return bool(self._keys) and self._clock() <= self._usable_until

    def _may_refetch(self) -> bool:
        if not self._is_url:
            return False  # `_ensure_fresh` looked at the file just now
        return self._clock() - self._tried >= (RETRY_S if self._failed else REFETCH_S)

    def _ensure_fresh(self, deadline: float) -> None:
        if not self._is_url:
            with self._changed:
                self._read_file()
            return
        now = self._clock()
        if now > self._fresh_until and (not self._failed or now - self._tried >= RETRY_S):
            self._fetch_and_wait(deadline)

    # -- files

    def _read_file(self) -> None:
        """Read again where the file is another one. A file that vanished or broke leaves the old keys in use,
        and says so."""
        try:
            facts = os.stat(self._location)
            identity = (facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_size)
            if identity != self._seen:
                self._seen = identity
                if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_JWKS_BYTES:
                    raise ValueError("it is no regular file of acceptable size")
                if facts.st_mode & stat.S_IWOTH:
                    raise ValueError("it can be written by everyone")
                self._accept(_Fetched(parse_jwks(Path(self._location).read_bytes()), 0.0))
        except OSError as error:
            self._refuse(f"{self._location}: {error.strerror}")
        except ValueError as error:
            self._refuse(f"{self._location}: {error}")
        self._usable_until = self._clock() + 1.0

    # -- URLs

    def _fetch_and_wait(self, deadline: float) -> None:
        """Start a fetch unless one runs, and wait for it until `deadline` (time.monotonic)."""
        with self._changed:
            if not self._fetching:
                self._fetching = True
                self._tried = self._clock()
                try:
                    threading.Thread(target=self._run_fetch, name="jwks", daemon=True).start()
                except RuntimeError as error:  # the process may start no more threads
                    self._fetching = False
                    self._refuse(str(error))
                    return
            while self._fetching:
                left = deadline - time.monotonic()
                if left <= 0:
                    if not self._keys:
                        self._error = "the issuer does not answer in time"
                    return
                self._changed.wait(left)

    def _run_fetch(self) -> None:
        fetched: _Fetched | None = None
        problem = ""
        try:
            url = discover(self._location) if self._discovers else self._location
            fetched = fetch_jwks(url)
        except (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL) as error:
            problem = f"{type(error).__name__}: {error}"[:200]
        finally:
            with self._changed:
                self._fetching = False
                if fetched is not None:
                    self._accept(fetched)
                else:
                    self._refuse(problem or "the fetch broke")
                self._changed.notify_all()

    def _accept(self, fetched: _Fetched) -> None:
        now = self._clock()
        self._keys = fetched.keys
        self._fresh_until = now + fetched.fresh_s
        self._usable_until = self._fresh_until + OFFLINE_GRACE_S
        self._failed = False
        self._error = ""

    def _refuse(self, problem: str) -> None:
        if not self._failed or problem != self._error:
            place = "" if problem.startswith(f"{self._location}: ") else f"{self._location}: "
            log.warning("keys of an issuer could not be read: %s%s", place, problem)
        self._failed = True
        self._error = problem


def discover(issuer: str) -> str:
    """Where the issuer says its key set is. Blocks up to about `bounded_http.FETCH_S`. Raises OSError, ValueError or httpx.HTTPError."""
    body, _ = ask("GET", issuer.rstrip("/") + DISCOVERY, max_bytes=MAX_JWKS_BYTES)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the discovery document is no JSON") from None
    if not isinstance(document, dict) or document.get("issuer") != issuer:
        raise ValueError("the discovery document is another issuer's")
    address = document.get("jwks_uri")
    if not isinstance(address, str):
        raise ValueError("the discovery document has no jwks_uri")
    parts = urlsplit(address)
    if parts.scheme != "https" and not (parts.scheme == "http" and issuer.startswith("http://")):
        raise ValueError("the discovery document's jwks_uri is no https address")
    return address


def fetch_jwks(url: str) -> _Fetched:
    """Blocks up to about `bounded_http.FETCH_S`. Raises OSError, ValueError or httpx.HTTPError."""
    body, headers = ask("GET", url, max_bytes=MAX_JWKS_BYTES)
    match = _MAX_AGE.search(headers.get("cache-control", ""))
    fresh_s = min(max(float(match[1]), MIN_FRESH_S), MAX_FRESH_S) if match else FRESH_S
    return _Fetched(parse_jwks(body), fresh_s)


def parse_jwks(raw: bytes) -> tuple[PublicKey, ...]:
    """The usable keys. Raises ValueError where it is no key set or none is usable. Keys of unknown kinds,
    keys for encryption, symmetric keys and RSA keys that are too short are passed over (RFC 7517, section
    5)."""
    try:
        document = json.loads(raw)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise ValueError("it is no JSON Web Key Set: there is no list `keys`")
    if len(listed) > MAX_KEYS:
        raise ValueError(f"more than {MAX_KEYS} keys")
    keys = tuple(key for key in map(_public_key, listed) if key is not None)
    if not keys:
        raise ValueError("it holds no usable public key for signatures")
    return keys


def _public_key(entry: Any) -> PublicKey | None:
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    operations = entry.get("key_ops")
    if isinstance(operations, list) and "verify" not in operations:
        return None
    kid = entry.get("kid")
    if kid is not None and not (isinstance(kid, str) and 0 < len(kid) <= MAX_KID_CHARS):
        return None
    # a file that holds the private half by mistake still serves: what is private is not even parsed
    public = {name: entry[name] for name in ("kty", "crv", "n", "e", "x", "y") if name in entry}
    algorithms = _algorithms(public)
    declared = entry.get("alg")
    if declared is not None:
        algorithms &= {declared} if isinstance(declared, str) else set()
    if not algorithms:
        return None
    try:
        key = jwt.PyJWK(public, algorithm=min(algorithms)).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    if public["kty"] == "RSA" and key.key_size < MIN_RSA_BITS:
        return None
    return PublicKey(kid, frozenset(algorithms), key)


def _algorithms(public: dict[str, Any]) -> set[str]:
    """What a key can be used with by its kind alone; symmetric keys with nothing."""
    match public.get("kty"), public.get("crv"):
        case "RSA", _:
            return {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
        case "EC", "P-256":
            return {"ES256"}
        case "EC", "P-384":
            return {"ES384"}
        case "EC", "P-521":
            return {"ES512"}
        case "OKP", "Ed25519" | "Ed448":
            return {"EdDSA"}
    return set()
