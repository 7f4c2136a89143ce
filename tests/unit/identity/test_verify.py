"""Tokens that verify, and a table of those that must not, each with its word."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from sidecar.config import IssuerDocument
from sidecar.errors import IdentityError
from sidecar.identity.verify import REASONS, Verifier
from sidecar.model.secret import Secret
from tests.support.tokens import AUDIENCE, ISSUER, SUBJECT, Issuer, b64url, hand_made, new_key, part

ISSUED = Issuer(keys=[new_key("key-1"), new_key("key-2", "ES256"), new_key("key-3", "EdDSA")])
STRANGER = new_key("stranger")


@pytest.fixture
def verifier(tmp_path: Path) -> Verifier:
    return Verifier((IssuerDocument(ISSUER, AUDIENCE, str(ISSUED.jwks(tmp_path))),))


@pytest.mark.parametrize("index", range(3))
def test_a_valid_token_yields_its_principal(verifier: Verifier, index: int) -> None:
    token = ISSUED.token(key=ISSUED.keys[index], repository="acme/reports")
    principal = verifier.verify(Secret(token), "env")
    assert principal.issuer == ISSUER
    assert principal.subject == SUBJECT
    assert principal.claims["repository"] == "acme/reports"
    assert principal.jti == "token-1"
    assert principal.source == "env"
    assert principal.expires_ns == principal.claims["exp"] * 1_000_000_000


@pytest.mark.parametrize(
    "changed",
    [
        {"aud": ["others", AUDIENCE]},
        {"nbf": None, "iat": None, "jti": None},
        {"nbf": int(time.time()) + 10},  # within the leeway
        {"exp": time.time() + 36_000.5},  # collected long before it runs
    ],
)
def test_valid_variations(verifier: Verifier, changed: dict[str, Any]) -> None:
    assert verifier.verify(Secret(ISSUED.token(**changed)), "env").subject == SUBJECT


def test_a_token_without_kid_is_tried_against_the_keys_that_fit(verifier: Verifier) -> None:
    token = ISSUED.token(key=ISSUED.keys[1], headers={"kid": None})
    assert verifier.verify(Secret(token), "env").subject == SUBJECT


def _pem() -> bytes:
    return (
        ISSUED.keys[0]
        .key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def _hmac_with_public_key(secret: bytes, algorithm: str = "HS256") -> str:
    """The classic confusion: the public key as HMAC secret. PyJWT refuses to make it, so that it is made
    here."""
    import hashlib
    import hmac

    signed = f"{part({'alg': algorithm, 'typ': 'JWT', 'kid': 'key-1'})}.{part(ISSUED.claims())}"
    return f"{signed}.{b64url(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"


def _tampered() -> str:
    header, _, signature = ISSUED.token().split(".")
    return f"{header}.{part(ISSUED.claims(sub='repo:acme/other'))}.{signature}"


def _swapped_header() -> str:
    _, claims, signature = ISSUED.token().split(".")
    return f"{part({'alg': 'PS256', 'kid': 'key-1'})}.{claims}.{signature}"


def _flipped_signature() -> str:
    signed, _, signature = ISSUED.token().rpartition(".")
    raw = bytearray(base64.urlsafe_b64decode(signature + "=="))
    raw[7] ^= 1
    return f"{signed}.{b64url(bytes(raw))}"


def _raw(claims: str) -> str:
    """Signed claims that are exactly this text."""
    return jwt.api_jws.encode(
        claims.encode(), ISSUED.keys[0].key, algorithm="RS256", headers={"kid": "key-1"}
    )


def _claims_text(**changed: Any) -> str:
    return json.dumps(ISSUED.claims(**changed))


def _embedded_key() -> str:
    """The attacker's own key in the header."""
    own = STRANGER
    return jwt.encode(
        ISSUED.claims(),
        own.key,
        algorithm="RS256",
        headers={"kid": "key-1", "jwk": own.public_jwk(), "jku": "https://attacker.test/jwks"},
    )


NOW = int(time.time())

FORGED: list[tuple[str, str, Callable[[], str]]] = [
    ("empty", "malformed", lambda: ""),
    ("not a token", "malformed", lambda: "hunter2"),
    ("two parts", "malformed", lambda: ISSUED.token().rpartition(".")[0]),
    ("five parts: encrypted", "malformed", lambda: "eyJhbGciOiJkaXIifQ.a.b.c.d"),
    ("white space inside", "malformed", lambda: ISSUED.token().replace(".", ". ", 1)),
    ("base64 with padding", "malformed", lambda: ISSUED.token() + "=="),
    ("not ASCII", "malformed", lambda: "é" + ISSUED.token()),
    ("header is no JSON", "malformed", lambda: hand_made("{", ISSUED.claims())),
    ("header is a list", "malformed", lambda: hand_made([], ISSUED.claims())),
    ("claims are no object", "malformed", lambda: hand_made({"alg": "RS256"}, ["x"])),
    ("claims nested to death", "malformed", lambda: hand_made({"alg": "RS256"}, "[" * 20_000)),
    ("no alg", "malformed", lambda: hand_made({"kid": "key-1"}, ISSUED.claims())),
    ("alg is a number", "malformed", lambda: hand_made({"alg": 1}, ISSUED.claims())),
    ("kid is an object", "malformed", lambda: hand_made({"alg": "RS256", "kid": {}}, ISSUED.claims())),
    ("kid is endless", "malformed", lambda: hand_made({"alg": "RS256", "kid": "k" * 5000}, ISSUED.claims())),
    ("a claim twice", "malformed", lambda: _raw('{"iss":"https://issuer.test",' + _claims_text()[1:])),
    ("exp is NaN", "malformed", lambda: _raw(_claims_text(exp=0).replace('"exp": 0', '"exp": NaN'))),
    ("exp is Infinity", "malformed", lambda: _raw(_claims_text(exp=0).replace('"exp": 0', '"exp": 1e999'))),
    ("exp is text", "malformed", lambda: ISSUED.token(exp="tomorrow")),
    ("exp is true", "malformed", lambda: ISSUED.token(exp=True)),
    ("exp is after the end of time", "malformed", lambda: ISSUED.token(exp=10**15)),
    ("nbf is a list", "malformed", lambda: ISSUED.token(nbf=[1])),
    ("sub is a number", "malformed", lambda: _raw(_claims_text(sub=7))),
    ("too large", "too_large", lambda: ISSUED.token(padding="x" * 70_000)),
    ("sub is endless", "too_large", lambda: ISSUED.token(sub="s" * 2000)),
    ("crit", "critical_header", lambda: ISSUED.token(headers={"crit": ["exp"], "exp": 1})),
    (
        "unencoded payload",
        "critical_header",
        lambda: hand_made({"alg": "RS256", "b64": False}, ISSUED.claims()),
    ),
    ("another issuer", "unknown_issuer", lambda: ISSUED.token(iss="https://attacker.test")),
    ("issuer with a slash more", "unknown_issuer", lambda: ISSUED.token(iss=ISSUER + "/")),
    ("issuer in capitals", "unknown_issuer", lambda: ISSUED.token(iss=ISSUER.upper())),
    ("no issuer", "unknown_issuer", lambda: ISSUED.token(iss=None)),
    ("issuer is a list", "unknown_issuer", lambda: _raw(_claims_text(iss=[ISSUER]))),
    ("alg none", "algorithm_refused", lambda: hand_made({"alg": "none"}, ISSUED.claims(), b"")),
    ("alg None", "algorithm_refused", lambda: hand_made({"alg": "None"}, ISSUED.claims(), b"")),
    (
        "alg nOnE with kid",
        "algorithm_refused",
        lambda: hand_made({"alg": "nOnE", "kid": "key-1"}, ISSUED.claims()),
    ),
    ("HS256 with the public key", "algorithm_refused", lambda: _hmac_with_public_key(_pem())),
    (
        "HS256 with the key set",
        "algorithm_refused",
        lambda: _hmac_with_public_key(json.dumps(ISSUED.key_set()).encode()),
    ),
    ("HS256 with nothing", "algorithm_refused", lambda: _hmac_with_public_key(b"")),
    ("hs256 in small letters", "algorithm_refused", lambda: _hmac_with_public_key(_pem(), "hs256")),
    (
        "alg that nobody knows",
        "algorithm_refused",
        lambda: hand_made({"alg": "RS1", "kid": "key-1"}, ISSUED.claims()),
    ),
    ("PS256 for a key declared RS256", "algorithm_refused", _swapped_header),
    ("RS256 naming an EC key", "algorithm_refused", lambda: ISSUED.token(headers={"kid": "key-2"})),
    ("unknown kid", "unknown_key", lambda: ISSUED.token(headers={"kid": "key-9"})),
    ("empty kid", "malformed", lambda: ISSUED.token(headers={"kid": ""})),
    (
        "a stranger's key under our kid",
        "bad_signature",
        lambda: ISSUED.token(key=STRANGER, headers={"kid": "key-1"}),
    ),
    (
        "a stranger's key without kid",
        "bad_signature",
        lambda: ISSUED.token(key=STRANGER, headers={"kid": None}),
    ),
    ("key in the header", "bad_signature", _embedded_key),
    ("changed claims", "bad_signature", _tampered),
    ("one bit of the signature", "bad_signature", _flipped_signature),
    ("no signature", "bad_signature", lambda: ISSUED.token().rpartition(".")[0] + "."),
    ("expired", "expired", lambda: ISSUED.token(exp=NOW - 120)),
    ("expired long ago", "expired", lambda: ISSUED.token(exp=1)),
    ("no exp", "missing_claim", lambda: ISSUED.token(exp=None)),
    ("no aud", "missing_claim", lambda: ISSUED.token(aud=None)),
    ("no sub", "missing_claim", lambda: ISSUED.token(sub=None)),
    ("empty sub", "missing_claim", lambda: ISSUED.token(sub="")),
    ("wrong audience", "wrong_audience", lambda: ISSUED.token(aud="https://vault.test")),
    ("audience as prefix", "wrong_audience", lambda: ISSUED.token(aud=AUDIENCE + "-dev")),
    ("no audience in the list", "missing_claim", lambda: ISSUED.token(aud=[])),
    ("audience is an object", "wrong_audience", lambda: _raw(_claims_text(aud={AUDIENCE: 1}))),
    ("not valid yet", "not_yet_valid", lambda: ISSUED.token(nbf=NOW + 3600)),
    ("issued in the future", "issued_in_future", lambda: ISSUED.token(iat=NOW + 3600, nbf=None)),
]


@pytest.mark.parametrize(("reason", "make"), [row[1:] for row in FORGED], ids=[row[0] for row in FORGED])
def test_forged_tokens(verifier: Verifier, reason: str, make: Callable[[], str]) -> None:
    token = make()
    with pytest.raises(IdentityError) as caught:
        verifier.verify(Secret(token), "env")
    assert caught.value.reason == reason
    assert caught.value.reason in REASONS
    if token:
        assert token not in str(caught.value)


def test_a_token_for_one_issuer_is_not_accepted_for_another(tmp_path: Path) -> None:
    """Two trusted issuers: a key of the one never signs for the other (issuer mix-up)."""
    other = Issuer("https://other.test", keys=[new_key("key-1-other", "ES256")])
    verifier = Verifier(
        (
            IssuerDocument(ISSUER, AUDIENCE, str(ISSUED.jwks(tmp_path))),
            IssuerDocument(other.issuer, AUDIENCE, str(other.jwks(tmp_path, "other.json"))),
        )
    )
    assert verifier.verify(Secret(other.token()), "env").issuer == other.issuer
    with pytest.raises(IdentityError) as caught:
        verifier.verify(Secret(other.token(iss=ISSUER)), "env")
    assert caught.value.reason == "unknown_key"


def test_the_algorithm_list_of_an_issuer_holds(tmp_path: Path) -> None:
    verifier = Verifier(
        (IssuerDocument(ISSUER, AUDIENCE, str(ISSUED.jwks(tmp_path)), algorithms=("ES256",)),)
    )
    assert verifier.verify(Secret(ISSUED.token(key=ISSUED.keys[1])), "env").subject == SUBJECT
    with pytest.raises(IdentityError) as caught:
        verifier.verify(Secret(ISSUED.token()), "env")
    assert caught.value.reason == "algorithm_refused"


@pytest.mark.parametrize("algorithm", ["HS256", "none"])
def test_a_list_that_names_a_forbidden_algorithm_changes_nothing(tmp_path: Path, algorithm: str) -> None:
    """The configuration refuses such a list; the verifier does not rely on that."""
    verifier = Verifier(
        (IssuerDocument(ISSUER, AUDIENCE, str(ISSUED.jwks(tmp_path)), algorithms=(algorithm,)),)
    )
    token = (
        _hmac_with_public_key(_pem())
        if algorithm == "HS256"
        else hand_made({"alg": "none"}, ISSUED.claims(), b"")
    )
    with pytest.raises(IdentityError) as caught:
        verifier.verify(Secret(token), "env")
    assert caught.value.reason == "algorithm_refused"


def test_maximum_age(tmp_path: Path) -> None:
    verifier = Verifier((IssuerDocument(ISSUER, AUDIENCE, str(ISSUED.jwks(tmp_path))),), max_age_s=300)
    assert verifier.verify(Secret(ISSUED.token()), "env").subject == SUBJECT
    for changed, reason in (({"iat": NOW - 900}, "too_old"), ({"iat": None}, "missing_claim")):
        with pytest.raises(IdentityError) as caught:
            verifier.verify(Secret(ISSUED.token(**changed)), "env")
        assert caught.value.reason == reason


def test_a_short_rsa_key_is_not_used(tmp_path: Path) -> None:
    short = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    listed = jwt.algorithms.RSAAlgorithm.to_jwk(short.public_key(), as_dict=True)
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [{**listed, "kid": "short"}, ISSUED.keys[1].public_jwk()]}))
    verifier = Verifier((IssuerDocument(ISSUER, AUDIENCE, str(path)),))
    signed = f"{part({'alg': 'RS256', 'kid': 'short'})}.{part(ISSUED.claims())}"
    signature = jwt.get_algorithm_by_name("RS256").sign(signed.encode(), short)
    with pytest.raises(IdentityError) as caught:
        verifier.verify(Secret(f"{signed}.{b64url(signature)}"), "env")
    assert caught.value.reason == "unknown_key"


def test_every_word_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "identity.md").read_text()
    for reason in REASONS:
        assert f"`{reason}`" in page
