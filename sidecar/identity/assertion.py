"""What of an identity is attached to a connection: the token in a header, a signed assertion in a PostgreSQL
setting.

The setting never holds the token, which others could replay: it holds a short JWS by this host, bound to one
backend, flow, target and time. Only declared targets get any of it.
"""

from __future__ import annotations

import re
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sidecar.config import Identity, TargetConfig
from sidecar.model.principal import Attachment, Principal
from sidecar.model.secret import Secret
from sidecar.model.workload import Workload

ASSERTION_MAX_AGE_S: Final = 12 * 3600
APPLICATION_NAME_MAX_BYTES: Final = 63
"""NAMEDATALEN - 1: longer names are cut by the server."""
ALGORITHM: Final = "EdDSA"
TYPE: Final = "sidecar-assertion+jwt"
"""Explicit type (RFC 8725, section 3.11): an assertion passes for no other kind of token."""
TEMPLATE_NAMES: Final = (
    "subject",
    "issuer",
    "jti",
    "target",
    "job",
    "repository",
    "run",
    "step",
    "uid",
    "exe",
)
_NAME: Final = re.compile(r"\{([a-z_]+)\}")


class AssertionSigner:
    """Signs with the host's key. Thread-safe."""

    def __init__(self, key: Ed25519PrivateKey, host: str) -> None:
        self._key = key
        self._host = host

    def sign(
        self, principal: Principal, *, flow: str, backend_pid: int, target: str, now_s: float
    ) -> str | None:
        """A compact JWS: `iss` (this host), `sub`, `idp` (the token's issuer), `pid` (the server's backend),
        `flow`, `aud` (the target), `iat`, `exp` (never after the token's own). None where the token has
        expired by now.
        """
        expires_s = int(min(principal.expires_ns / 1e9, now_s + ASSERTION_MAX_AGE_S))
        if expires_s <= now_s:
            return None
        claims: dict[str, Any] = {
            "iss": self._host,
            "sub": principal.subject,
            "idp": principal.issuer,
            "pid": backend_pid,
            "flow": flow,
            "aud": target,
            "iat": int(now_s),
            "exp": expires_s,
        }
        return jwt.encode(claims, self._key, algorithm=ALGORITHM, headers={"typ": TYPE})


def verify_assertion(
    text: str, key: Ed25519PublicKey, *, target: str, backend_pid: int | None = None
) -> dict[str, Any]:
    """The claims; raises jwt.PyJWTError. With `backend_pid`, an assertion copied to another backend is
    refused too."""
    decoded = jwt.decode_complete(
        text,
        key,
        algorithms=[ALGORITHM],
        audience=target,
        options={"require": ["iss", "sub", "idp", "pid", "flow", "aud", "iat", "exp"]},
    )
    claims: dict[str, Any] = decoded["payload"]
    if decoded["header"].get("typ") != TYPE:
        raise jwt.InvalidTokenError("this is no assertion")
    if backend_pid is not None and claims["pid"] != backend_pid:
        raise jwt.InvalidTokenError("the assertion is for another backend")
    return claims


def application_name(
    template: str, principal: Principal, target: TargetConfig | None = None, workload: Workload | None = None
) -> str:
    """The template filled in once, left to right (a value that holds braces is not expanded again), as
    printable ASCII, at most 63 bytes. What is not known is empty; an unknown name stays as it is."""
    ci = workload.ci if workload else None
    values = {
        "subject": principal.subject,
        "issuer": principal.issuer,
        "jti": principal.jti,
        "target": target.name if target else "",
        "job": ci.job if ci else "",
        "repository": ci.repository if ci else "",
        "run": ci.run if ci else "",
        "step": ci.step if ci else "",
        "uid": str(workload.uid) if workload and workload.uid is not None else "",
        "exe": workload.exe if workload else "",
    }
    text = _NAME.sub(lambda match: values.get(match[1], match[0]), template)
    return "".join(char if " " <= char <= "~" else "?" for char in text)[:APPLICATION_NAME_MAX_BYTES]


def attachment_for(
    config: Identity,
    target: TargetConfig | None,
    principal: Principal | None,
    token: Secret | None,
    workload: Workload | None = None,
) -> Attachment:
    """What this flow's connection gets. The reserved names are set whatever the target is: clients may never
    set them. Behind a pooler a setting would leak into the next client's session: application_name only."""
    header, setting = config.attach.http.header, config.attach.postgres.setting
    if target is None or principal is None:
        return Attachment(reserved_header=header, reserved_setting=setting)
    template = config.attach.postgres.application_name
    return Attachment(
        http_header=header if token else None,
        http_token=token,
        reserved_header=header,
        postgres_setting=None if target.pooler else setting,
        postgres_application_name=application_name(template, principal, target, workload)
        if template
        else None,
        reserved_setting=setting,
    )
