"""What is attached to a connection: only to declared targets, bound to one backend, never the token in a
setting."""

from __future__ import annotations

import time
from dataclasses import replace

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sidecar.config import AttachDocument, Identity, TargetConfig
from sidecar.identity.assertion import (
    ASSERTION_MAX_AGE_S,
    AssertionSigner,
    application_name,
    attachment_for,
    verify_assertion,
)
from sidecar.model.principal import Principal
from sidecar.model.secret import Secret
from sidecar.model.workload import CiJob, Workload

NOW = time.time()
PRINCIPAL = Principal(
    "https://issuer.test", "repo:acme/reports", {}, jti="j-1", expires_ns=int((NOW + 600) * 1e9), source="env"
)
KEY = Ed25519PrivateKey.generate()
SIGNER = AssertionSigner(KEY, "host-1")
CONFIG = Identity(required=False, sources=(), issuers=(), attach=AttachDocument(), max_age_s=None)
TARGET = TargetConfig("orders", "orders.internal", 5432, "postgres")
TOKEN = Secret("a.b.c")


def signed(principal: Principal = PRINCIPAL) -> str:
    found = SIGNER.sign(principal, flow="flow-1", backend_pid=4711, target="orders", now_s=NOW)
    assert found is not None
    return found


def test_an_assertion_says_who_where_and_until_when() -> None:
    claims = verify_assertion(signed(), KEY.public_key(), target="orders", backend_pid=4711)
    assert claims == {
        "iss": "host-1",
        "sub": "repo:acme/reports",
        "idp": "https://issuer.test",
        "pid": 4711,
        "flow": "flow-1",
        "aud": "orders",
        "iat": int(NOW),
        "exp": int(NOW + 600),
    }


def test_it_never_outlives_the_token_nor_twelve_hours() -> None:
    long = replace(PRINCIPAL, expires_ns=int((NOW + 7 * 86_400) * 1e9))
    claims = verify_assertion(signed(long), KEY.public_key(), target="orders")
    assert claims["exp"] == int(NOW + ASSERTION_MAX_AGE_S)
    expired = replace(PRINCIPAL, expires_ns=int((NOW - 1) * 1e9))
    assert SIGNER.sign(expired, flow="f", backend_pid=1, target="orders", now_s=NOW) is None


def test_it_is_of_no_use_elsewhere() -> None:
    public = KEY.public_key()
    with pytest.raises(jwt.InvalidAudienceError):
        verify_assertion(signed(), public, target="billing")
    with pytest.raises(jwt.InvalidTokenError):
        verify_assertion(signed(), public, target="orders", backend_pid=4712)
    with pytest.raises(jwt.InvalidSignatureError):
        verify_assertion(signed(), Ed25519PrivateKey.generate().public_key(), target="orders")
    untyped = jwt.encode(jwt.decode(signed(), options={"verify_signature": False}), KEY, algorithm="EdDSA")
    with pytest.raises(jwt.InvalidTokenError, match="no assertion"):
        verify_assertion(untyped, public, target="orders")


def test_a_declared_target_gets_it() -> None:
    found = attachment_for(CONFIG, TARGET, PRINCIPAL, TOKEN)
    assert found.http_header == "X-Workload-Identity"
    assert found.http_token == TOKEN
    assert found.postgres_setting == "workload.identity"
    assert found.postgres_application_name == "repo:acme/reports"
    assert found.reserved_header == "X-Workload-Identity"
    assert found.reserved_setting == "workload.identity"
    assert "a.b.c" not in repr(found)


@pytest.mark.parametrize(("target", "principal"), [(None, PRINCIPAL), (TARGET, None), (None, None)])
def test_others_get_nothing_and_the_names_stay_reserved(
    target: TargetConfig | None, principal: Principal | None
) -> None:
    found = attachment_for(CONFIG, target, principal, TOKEN)
    assert (found.http_header, found.http_token, found.postgres_setting, found.postgres_application_name) == (
        None,
        None,
        None,
        None,
    )
    assert found.reserved_header == "X-Workload-Identity"
    assert found.reserved_setting == "workload.identity"


def test_behind_a_pooler_only_the_application_name() -> None:
    pooled = TargetConfig("orders", "orders.internal", 6432, "postgres", pooler="transaction")
    found = attachment_for(CONFIG, pooled, PRINCIPAL, TOKEN)
    assert found.postgres_setting is None
    assert found.postgres_application_name == "repo:acme/reports"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{subject}", "repo:acme/reports"),
        ("sidecar {issuer}", "sidecar https://issuer.test"),
        ("{target}/{job}/{step}/{uid}", "orders/nightly/export/1000"),
        ("{other} {jti}", "{other} j-1"),
        ("{", "{"),
        ("", ""),
    ],
)
def test_application_name(template: str, expected: str) -> None:
    workload = Workload(kind="ci", uid=1000, ci=CiJob("github", job="nightly", step="export"))
    assert application_name(template, PRINCIPAL, TARGET, workload) == expected


def test_application_name_is_short_printable_and_expanded_once() -> None:
    hostile = replace(PRINCIPAL, subject="{issuer}\n\x00é'" + "x" * 100)
    found = application_name("{subject}", hostile)
    assert found.startswith("{issuer}???'x")
    assert len(found.encode()) == 63
