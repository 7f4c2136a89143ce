"""What of an identity is attached to a connection: the token in a header, a signed assertion in a PostgreSQL setting.

The setting never holds the token, which others could replay: it holds a short JWS by this host, bound to one backend and flow.
Only declared targets get any of it.
"""

from __future__ import annotations

from typing import Final

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sidecar.config import Identity, TargetConfig
from sidecar.model.principal import Attachment, Principal
from sidecar.model.secret import Secret

ASSERTION_MAX_AGE_S: Final = 12 * 3600
APPLICATION_NAME_MAX: Final = 63
"""NAMEDATALEN - 1: longer names are cut by the server."""
ALGORITHM: Final = "EdDSA"


class AssertionSigner:
    """Signs with the host's key."""

    def __init__(self, key: Ed25519PrivateKey, host: str) -> None:
        self._key = key
        self._host = host

    def sign(self, principal: Principal, *, flow: str, backend_pid: int, target: str, now_s: float) -> str:
        """A compact JWS: iss (host), sub, idp (the token's issuer), pid, flow, aud (target), iat, exp."""
        expires = min(principal.expires_ns / 1e9, now_s + ASSERTION_MAX_AGE_S)
        claims = {
            "iss": self._host,
            "sub": principal.subject,
            "idp": principal.issuer,
            "pid": backend_pid,
            "flow": flow,
            "aud": target,
            "iat": int(now_s),
            "exp": int(expires),
        }
        return jwt.encode(claims, self._key, algorithm=ALGORITHM)


def verify_assertion(text: str, key: Ed25519PublicKey, *, target: str) -> dict[str, object]:
    """The claims. Raises jwt.PyJWTError."""
    return dict(jwt.decode(text, key, algorithms=[ALGORITHM], audience=target))


def application_name(template: str, principal: Principal) -> str:
    """`{subject}` and `{issuer}` filled in, as printable ASCII, at most 63 bytes."""
    text = template.replace("{subject}", principal.subject).replace("{issuer}", principal.issuer)
    return "".join(char if " " <= char <= "~" else "?" for char in text)[:APPLICATION_NAME_MAX]


def attachment_for(
    config: Identity, target: TargetConfig | None, principal: Principal | None, token: Secret | None
) -> Attachment:
    """What this flow's connection gets. The reserved names are set whatever the target is: clients may never set them."""
    header, setting = config.attach.http.header, config.attach.postgres.setting
    if target is None or principal is None:
        return Attachment(reserved_header=header, reserved_setting=setting)
    template = config.attach.postgres.application_name
    return Attachment(
        http_header=header,
        http_token=token,
        reserved_header=header,
        postgres_setting=None if target.pooler else setting,
        postgres_application_name=application_name(template, principal) if template else None,
        reserved_setting=setting,
    )
