"""Verifies an OIDC token with PyJWT. Every refusal carries one word of a closed vocabulary, `REASONS`.

The order matters: nothing that a token says is used before its signature holds, except to choose the issuer
and the key among those that the configuration names. Source: RFC 7515, RFC 7519, RFC 8725 (best current
practices), OpenID Connect Core 1.0, section 3.1.3.7.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

import jwt

from sidecar.config import IssuerDocument
from sidecar.documents import parse_duration
from sidecar.errors import IdentityError
from sidecar.identity.compact import MAX_TOKEN_BYTES, peek
from sidecar.identity.keys import MAX_KID_CHARS, WAIT_S, KeySet, PublicKey
from sidecar.model.principal import Principal
from sidecar.model.secret import Secret

REASONS: Final[Mapping[str, str]] = {
    "no_token": "no source yielded a token",
    "process_gone": "the process had exited before its token could be read",
    "source_unsafe": "the token file is of a kind, owner or mode that is not trusted",
    "source_unavailable": "the token's source could not be asked, or did not answer in time",
    "too_large": "the token is larger than 64 KiB",
    "malformed": "it is no signed JWT, or a claim has the wrong type",
    "critical_header": "its header demands an extension that is not understood",
    "unknown_issuer": "its issuer is not in identity.issuers",
    "algorithm_refused": "its algorithm is not allowed for the issuer, or does not fit the issuer's key",
    "keys_unavailable": "the issuer's keys could not be read or fetched in time",
    "unknown_key": "it names a key that the issuer does not have",
    "bad_signature": "the signature does not hold",
    "missing_claim": "it lacks sub, aud, exp, or iat where identity.max_age asks for it",
    "wrong_audience": "it is for another audience",
    "expired": "it has expired",
    "not_yet_valid": "its nbf lies in the future",
    "issued_in_future": "its iat lies in the future",
    "too_old": "it was issued longer ago than identity.max_age",
}
"""The closed vocabulary and what each word means; docs/identity.md says what to do."""

MAX_SUBJECT_CHARS: Final = 1024
MAX_CLAIMS: Final = 256
MAX_CANDIDATES: Final = 8
"""Keys tried for a token that names none."""
MAX_TIME_S: Final = 253_402_300_800
"""The end of year 9999: a time claim past it is nonsense."""
NEVER: Final = frozenset({"NONE", "HS256", "HS384", "HS512"})
"""Refused whatever the configuration says: no signature at all, or one that every reader of the public key
could make."""

_TIMES: Final = ("exp", "nbf", "iat")


class Verifier:
    """Holds the issuers' keys. Thread-safe; blocks up to `WAIT_S` while keys are fetched."""

    def __init__(
        self,
        issuers: tuple[IssuerDocument, ...],
        *,
        max_age_s: float | None = None,
    ) -> None:
        self._issuers = {issuer.issuer: (issuer, KeySet(issuer.jwks, issuer.issuer)) for issuer in issuers}
        self._max_age_s = max_age_s

    def verify(self, token: Secret, source: str, wait_s: float = WAIT_S) -> Principal:
        """Raises IdentityError with a reason of `REASONS`."""
        text = token.reveal()
        if len(text) > MAX_TOKEN_BYTES:
            raise IdentityError(f"the token is larger than {MAX_TOKEN_BYTES} bytes", reason="too_large")
        header, claims = peek(text)
        issuer, keys = self._issuer(claims)
        algorithm = _algorithm(header, issuer)
        _check_types(claims)
        candidates = keys.candidates(_kid(header), algorithm, wait_s)
        verified = self._decode(text, algorithm, candidates, issuer, claims)
        return Principal(
            issuer=issuer.issuer,
            subject=verified["sub"],
            claims=verified,
            jti=str(verified.get("jti", "")),
            expires_ns=int(verified["exp"] * 1_000_000_000),
            source=source,
        )

    def problems(self) -> tuple[str, ...]:
        """Of issuers whose keys could not be read or fetched last time: who, and why. For `status`."""
        return tuple(f"{name}: {keys.error}" for name, (_, keys) in self._issuers.items() if keys.error)

    def _issuer(self, claims: dict[str, Any]) -> tuple[IssuerDocument, KeySet]:
        named = claims.get("iss")
        known = self._issuers.get(named) if isinstance(named, str) else None
        if known is None:
            raise IdentityError(
                "the token's issuer is none that the configuration names", reason="unknown_issuer"
            )
        return known

    def _decode(
        self,
        text: str,
        algorithm: str,
        candidates: tuple[PublicKey, ...],
        issuer: IssuerDocument,
        claims: dict[str, Any],
    ) -> dict[str, Any]:
        """The claims, signed by one of `candidates` and valid now. `claims` are the same, unverified: they
        only choose the word for a refusal that PyJWT has made."""
        required = ["exp", "iss", "aud", "sub"] + (["iat"] if self._max_age_s is not None else [])
        leeway_s = parse_duration(issuer.leeway)
        for candidate in candidates[:MAX_CANDIDATES]:
            try:
                verified: dict[str, Any] = jwt.decode(
                    text,
                    key=candidate.key,
                    algorithms=[algorithm],
                    audience=[issuer.audience] if isinstance(issuer.audience, str) else list(issuer.audience),
                    issuer=issuer.issuer,
                    leeway=leeway_s,
                    options={"require": required},
                )
            except jwt.InvalidSignatureError:
                continue
            except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as error:
                raise _refusal(error, claims, leeway_s) from error
            if self._max_age_s is not None and time.time() - verified["iat"] > self._max_age_s:
                raise IdentityError("the token is older than identity.max_age", reason="too_old")
            return verified
        raise IdentityError("the token's signature does not hold", reason="bad_signature")


def _refusal(error: Exception, claims: dict[str, Any], leeway_s: float) -> IdentityError:
    """PyJWT's exception as a word of `REASONS`."""
    match error:
        case jwt.ExpiredSignatureError():
            return IdentityError("the token has expired", reason="expired")
        case jwt.InvalidAudienceError():
            return IdentityError("the token is for another audience", reason="wrong_audience")
        case jwt.ImmatureSignatureError():
            if claims.get("nbf", 0) > time.time() + leeway_s:
                return IdentityError("the token is not valid yet", reason="not_yet_valid")
            return IdentityError("the token says that it was issued in the future", reason="issued_in_future")
        case jwt.MissingRequiredClaimError():
            return IdentityError(f"the token lacks {error.claim}", reason="missing_claim")
        case jwt.InvalidAlgorithmError() | jwt.InvalidKeyError():
            return IdentityError(
                "the token's algorithm does not fit the issuer's key", reason="algorithm_refused"
            )
    return IdentityError("the token is malformed", reason="malformed")


def _check_types(claims: dict[str, Any]) -> None:
    """What PyJWT leaves open: booleans and absurd numbers as times, a subject that is empty or endless."""
    for name in _TIMES:
        value = claims.get(name)
        if value is None:
            claims.pop(name, None)
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_TIME_S:
            raise IdentityError(f"the token's {name} is no time", reason="malformed")
    subject = claims.get("sub", "")
    if not isinstance(subject, str):
        raise IdentityError("the token's sub is no text", reason="malformed")
    if not subject:
        raise IdentityError("the token lacks sub", reason="missing_claim")
    if len(subject) > MAX_SUBJECT_CHARS or len(claims) > MAX_CLAIMS:
        raise IdentityError("the token's sub is too long, or it has too many claims", reason="too_large")


def _algorithm(header: dict[str, Any], issuer: IssuerDocument) -> str:
    algorithm = header.get("alg")
    if not isinstance(algorithm, str):
        raise IdentityError("the token's header has no alg", reason="malformed")
    if algorithm.upper() in NEVER or algorithm not in issuer.algorithms:
        raise IdentityError("the token's algorithm is not allowed for its issuer", reason="algorithm_refused")
    return algorithm


def _kid(header: dict[str, Any]) -> str | None:
    kid = header.get("kid")
    if kid is not None and not (isinstance(kid, str) and 0 < len(kid) <= MAX_KID_CHARS):
        raise IdentityError("the token's kid is no short text", reason="malformed")
    return kid
