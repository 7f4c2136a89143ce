"""A CI system's token issuer, made on the spot: a key, its JWKS file, and one signed token."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

ISSUER = "https://ci.shop.example"
AUDIENCE = "sidecar"
SUBJECT = "repo:shop/reports:ref:refs/heads/main"
LIFETIME_S = 900


def issue_token(jwks_file: Path) -> str:
    """Write the public key to `jwks_file` and return a token. The private key is forgotten here."""
    key = ec.generate_private_key(ec.SECP256R1())
    key_id = uuid.uuid4().hex[:8]
    public = json.loads(ECAlgorithm.to_jwk(key.public_key()))
    jwks_file.write_text(json.dumps({"keys": [{**public, "kid": key_id, "alg": "ES256", "use": "sig"}]}))
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": SUBJECT,
        "jti": uuid.uuid4().hex,
        "iat": now,
        "nbf": now,
        "exp": now + LIFETIME_S,
        "repository": "shop/reports",
        "workflow": "nightly",
        "run_id": "4711",
    }
    return jwt.encode(claims, key, algorithm="ES256", headers={"kid": key_id})
