"""A test's own OIDC issuer: keys, key set, tokens that verify and tokens that must not."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

ISSUER = "https://issuer.test"
AUDIENCE = "sidecar"
SUBJECT = "repo:acme/reports:ref:refs/heads/main"


@cache
def rsa_key(name: str = "", bits: int = 2048) -> rsa.RSAPrivateKey:
    """One key a name for the whole test run: making them is slow. (The arguments are the cache's key.)"""
    del name
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def b64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def part(value: object) -> str:
    """A JWS part of any JSON value; text is taken as it is, so that it may be no JSON at all."""
    return b64url((value if isinstance(value, str) else json.dumps(value)).encode())


@dataclass
class SigningKey:
    """A private key with the name and algorithm that it signs under."""

    kid: str
    algorithm: str
    key: Any

    def public_jwk(self, **extra: object) -> dict[str, Any]:
        """The public half as a key set lists it."""
        kind = type(jwt.get_algorithm_by_name(self.algorithm))
        listed: dict[str, Any] = kind.to_jwk(self.key.public_key(), as_dict=True)  # type: ignore[attr-defined]
        listed.pop("key_ops", None)
        return {**listed, "kid": self.kid, "alg": self.algorithm, "use": "sig", **extra}


def new_key(kid: str = "key-1", algorithm: str = "RS256") -> SigningKey:
    """RS*, PS*, ES256, ES384, ES512 or EdDSA."""
    if algorithm[:2] in ("RS", "PS"):
        return SigningKey(kid, algorithm, rsa_key(kid))
    if algorithm.startswith("ES"):
        curve = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}[algorithm]
        return SigningKey(kid, algorithm, ec.generate_private_key(curve))
    return SigningKey(kid, algorithm, ed25519.Ed25519PrivateKey.generate())


@dataclass
class Issuer:
    """`jwks` writes its key set into a file; `token` makes a valid token, changed by what is given."""

    issuer: str = ISSUER
    audience: str = AUDIENCE
    keys: list[SigningKey] = field(default_factory=lambda: [new_key()])

    def key_set(self) -> dict[str, Any]:
        return {"keys": [key.public_jwk() for key in self.keys]}

    def jwks(self, directory: Path, name: str = "jwks.json") -> Path:
        path = directory / name
        path.write_text(json.dumps(self.key_set()))
        path.chmod(0o644)
        return path

    def claims(self, **changed: Any) -> dict[str, Any]:
        """Claims of a valid token; a claim given as None is left out."""
        now = int(time.time())
        claims = {
            "iss": self.issuer,
            "sub": SUBJECT,
            "aud": self.audience,
            "iat": now - 5,
            "nbf": now - 5,
            "exp": now + 600,
            "jti": "token-1",
            **changed,
        }
        return {name: value for name, value in claims.items() if value is not None}

    def token(
        self, *, key: SigningKey | None = None, headers: dict[str, Any] | None = None, **changed: Any
    ) -> str:
        """A signed token. `headers` are added to its header; `kid: None` leaves the key's name out."""
        key = key or self.keys[0]
        header = {"kid": key.kid, **(headers or {})}
        return jwt.encode(
            self.claims(**changed),
            key.key,
            algorithm=key.algorithm,
            headers={name: value for name, value in header.items() if value is not None},
        )

    def configuration(self, jwks: Path | str) -> str:
        """The `identity:` section of a sidecar.yaml that trusts this issuer."""
        return (
            "identity:\n"
            "  sources:\n"
            "    - env: {name: SIDECAR_ID_TOKEN}\n"
            "  issuers:\n"
            f"    - {{issuer: {self.issuer!r}, audience: {self.audience}, jwks: {str(jwks)!r}}}\n"
        )


def hand_made(header: object, claims: object, signature: bytes = b"x") -> str:
    """A token that nobody signed."""
    return f"{part(header)}.{part(claims)}.{b64url(signature)}"
