"""Verifies an OIDC token with PyJWT. Every refusal carries one word of a closed vocabulary:

`no_token` `malformed` `too_large` `unknown_issuer` `algorithm_refused` `unknown_key` `keys_unavailable` `bad_signature`
`wrong_audience` `expired` `not_yet_valid` `issued_in_future` `missing_claim` `critical_header`

Source: RFC 7519, RFC 8725 (best current practices), OpenID Connect Core 3.1.3.7.
"""

from __future__ import annotations

from typing import Any, Final

import jwt

from sidecar.config import IssuerDocument
from sidecar.documents import parse_duration
from sidecar.errors import IdentityError
from sidecar.identity.keys import KeySet
from sidecar.identity.sources import MAX_TOKEN_BYTES
from sidecar.model.principal import Principal
from sidecar.model.secret import Secret

REASONS: Final = (
    "no_token",
    "malformed",
    "too_large",
    "unknown_issuer",
    "algorithm_refused",
    "unknown_key",
    "keys_unavailable",
    "bad_signature",
    "wrong_audience",
    "expired",
    "not_yet_valid",
    "issued_in_future",
    "missing_claim",
    "critical_header",
)
MAX_SUBJECT_CHARS: Final = 1024
_KEY_TYPES: Final = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}


class Verifier:
    """Holds the issuers' keys. Thread-safe; blocks while keys are fetched."""

    def __init__(self, issuers: tuple[IssuerDocument, ...]) -> None:
        self._issuers = {issuer.issuer: (issuer, KeySet(issuer.jwks)) for issuer in issuers}

    def verify(self, token: Secret, source: str) -> Principal:
        """Raises IdentityError."""
        text = token.reveal()
        if len(text) > MAX_TOKEN_BYTES:
            raise IdentityError("the token is too large", reason="too_large")
        header, claims = self._peek(text)
        if "crit" in header:
            raise IdentityError("the token demands an extension that is not understood", reason="critical_header")
        known = self._issuers.get(claims["iss"]) if isinstance(claims.get("iss"), str) else None
        if known is None:
            raise IdentityError("the token is of an issuer that the configuration does not name", reason="unknown_issuer")
        issuer, keys = known
        algorithm = header.get("alg")
        if not isinstance(algorithm, str) or algorithm not in issuer.algorithms:
            raise IdentityError("the token's algorithm is not allowed for its issuer", reason="algorithm_refused")
        kid = header.get("kid")
        if kid is not None and not isinstance(kid, str):
            raise IdentityError("the token's kid is no text", reason="malformed")
        key = keys.key(kid)
        if key.key_type != _KEY_TYPES.get(algorithm[:2]) or (key.algorithm_name and key.algorithm_name != algorithm):
            raise IdentityError("the token's algorithm does not fit the issuer's key", reason="algorithm_refused")
        verified = self._decode(text, key, algorithm, issuer)
        subject = verified["sub"]
        if not isinstance(subject, str) or not subject or len(subject) > MAX_SUBJECT_CHARS:
            raise IdentityError("the token's subject is empty or too long", reason="missing_claim")
        return Principal(
            issuer=issuer.issuer,
            subject=subject,
            claims=verified,
            jti=str(verified.get("jti", "")),
            expires_ns=int(verified["exp"]) * 1_000_000_000,
            source=source,
        )

    @staticmethod
    def _peek(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            unverified = jwt.decode_complete(text, options={"verify_signature": False})
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise IdentityError("the token is no JWT", reason="malformed") from error
        header, claims = unverified["header"], unverified["payload"]
        if not isinstance(claims, dict):
            raise IdentityError("the token's claims are no object", reason="malformed")
        return header, claims

    @staticmethod
    def _decode(text: str, key: Any, algorithm: str, issuer: IssuerDocument) -> dict[str, Any]:
        audience = [issuer.audience] if isinstance(issuer.audience, str) else list(issuer.audience)
        try:
            return dict(
                jwt.decode(
                    text,
                    key=key.key,
                    algorithms=[algorithm],
                    audience=audience,
                    issuer=issuer.issuer,
                    leeway=parse_duration(issuer.leeway),
                    options={"require": ["exp", "iat", "sub", "aud", "iss"]},
                )
            )
        except jwt.ExpiredSignatureError as error:
            raise IdentityError("the token has expired", reason="expired") from error
        except jwt.InvalidAudienceError as error:
            raise IdentityError("the token is for another audience", reason="wrong_audience") from error
        except jwt.ImmatureSignatureError as error:
            future = "iat" in str(error)
            raise IdentityError("the token is not valid yet", reason="issued_in_future" if future else "not_yet_valid") from error
        except jwt.MissingRequiredClaimError as error:
            raise IdentityError(f"the token lacks {error.claim}", reason="missing_claim") from error
        except jwt.InvalidSignatureError as error:
            raise IdentityError("the token's signature does not hold", reason="bad_signature") from error
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as error:
            raise IdentityError("the token is malformed", reason="malformed") from error
