"""An issuer's keys: rotation, failures, and that a hanging issuer costs a bounded time."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.errors import IdentityError
from sidecar.identity import keys
from sidecar.identity.keys import KeySet, parse_jwks
from tests.support.key_server import KeyServer, key_server
from tests.support.tokens import Issuer, new_key


class Clock:
    """Monotonic seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def issuer() -> Issuer:
    return Issuer(keys=[new_key("first", "ES256")])


@pytest.fixture
def server(issuer: Issuer) -> Iterator[KeyServer]:
    with key_server(issuer.key_set()) as running:
        yield running


def reason_of(key_set: KeySet, kid: str | None = "first", wait_s: float = 2.0) -> str:
    with pytest.raises(IdentityError) as caught:
        key_set.candidates(kid, "ES256", wait_s)
    return caught.value.reason


def test_keys_are_fetched_once_and_kept(server: KeyServer) -> None:
    clock = Clock()
    key_set = KeySet(server.url, clock=clock)
    for _ in range(3):
        (found,) = key_set.candidates("first", "ES256")
        assert found.kid == "first"
    assert server.requests == 1
    clock.now += keys.FRESH_S + 1
    key_set.candidates("first", "ES256")
    assert server.requests == 2


def test_the_issuer_says_how_long(server: KeyServer) -> None:
    clock = Clock()
    server.cache_control = "public, max-age=1200"
    key_set = KeySet(server.url, clock=clock)
    key_set.candidates("first", "ES256")
    clock.now += 1100
    key_set.candidates("first", "ES256")
    assert server.requests == 1
    clock.now += 200
    key_set.candidates("first", "ES256")
    assert server.requests == 2


def test_a_rotated_key_is_found_at_once_and_the_old_one_is_gone(server: KeyServer, issuer: Issuer) -> None:
    clock = Clock()
    key_set = KeySet(server.url, clock=clock)
    key_set.candidates("first", "ES256")
    issuer.keys = [new_key("second", "ES256")]
    server.document = issuer.key_set()
    clock.now += keys.REFETCH_S
    (found,) = key_set.candidates("second", "ES256")
    assert found.kid == "second"
    assert reason_of(key_set, "first") == "unknown_key"


def test_unknown_key_names_do_not_become_a_flood(server: KeyServer) -> None:
    clock = Clock()
    key_set = KeySet(server.url, clock=clock)
    key_set.candidates("first", "ES256")
    for number in range(50):
        clock.now += 0.1
        assert reason_of(key_set, f"forged-{number}") == "unknown_key"
    assert server.requests == 1
    clock.now += keys.REFETCH_S
    assert reason_of(key_set, "forged") == "unknown_key"
    assert server.requests == 2


@pytest.mark.parametrize("mode", ["garbage", "huge", "error", "redirect"])
def test_a_broken_issuer(server: KeyServer, mode: str) -> None:
    server.mode = mode
    clock = Clock()
    key_set = KeySet(server.url, clock=clock)
    assert reason_of(key_set) == "keys_unavailable"
    assert key_set.error
    # not asked again with every flow, but asked again
    assert reason_of(key_set) == "keys_unavailable"
    assert server.requests == 1
    server.mode = "serve"
    clock.now += keys.RETRY_S
    assert key_set.candidates("first", "ES256")


def test_nobody_listens() -> None:
    key_set = KeySet("http://127.0.0.1:9/jwks")
    assert reason_of(key_set) == "keys_unavailable"


@pytest.mark.parametrize("mode", ["hang", "dribble"])
def test_a_hanging_issuer_costs_a_bounded_time(server: KeyServer, mode: str) -> None:
    server.mode = mode
    key_set = KeySet(server.url)
    started = time.monotonic()
    assert reason_of(key_set, wait_s=0.3) == "keys_unavailable"
    assert time.monotonic() - started < 1.0


def test_many_flows_wait_together_and_ask_once(server: KeyServer) -> None:
    server.mode = "hang"
    key_set = KeySet(server.url)
    started = time.monotonic()
    threads = [threading.Thread(target=lambda: reason_of(key_set, wait_s=0.4)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 1.5
    assert server.requests == 1


def test_keys_are_used_while_the_issuer_is_away_but_not_for_ever(server: KeyServer) -> None:
    clock = Clock()
    key_set = KeySet(server.url, clock=clock)
    key_set.candidates("first", "ES256")
    server.mode = "error"
    clock.now += keys.FRESH_S + 10
    assert key_set.candidates("first", "ES256")
    assert "500" in key_set.error
    clock.now += keys.OFFLINE_GRACE_S
    assert reason_of(key_set) == "keys_unavailable"


def test_a_file_is_read_again_when_it_changes(tmp_path: Path, issuer: Issuer) -> None:
    path = issuer.jwks(tmp_path)
    key_set = KeySet(str(path))
    assert key_set.candidates("first", "ES256")
    issuer.keys = [new_key("second", "ES256")]
    issuer.jwks(tmp_path)
    assert key_set.candidates("second", "ES256")
    assert reason_of(key_set, "first") == "unknown_key"


def test_a_file_that_breaks_keeps_the_old_keys(tmp_path: Path, issuer: Issuer) -> None:
    path = issuer.jwks(tmp_path)
    key_set = KeySet(f"file://{path}")
    assert key_set.candidates("first", "ES256")
    path.write_text("{")
    assert key_set.candidates("first", "ES256")
    assert key_set.error
    path.unlink()
    assert key_set.candidates("first", "ES256")


def test_a_file_that_is_not_there_yet(tmp_path: Path, issuer: Issuer) -> None:
    key_set = KeySet(str(tmp_path / "jwks.json"))
    assert reason_of(key_set) == "keys_unavailable"
    issuer.jwks(tmp_path)
    assert key_set.candidates("first", "ES256")


def test_a_file_that_everyone_may_write_is_refused(tmp_path: Path, issuer: Issuer) -> None:
    path = issuer.jwks(tmp_path)
    path.chmod(0o666)
    assert reason_of(KeySet(str(path))) == "keys_unavailable"


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    os.mkfifo(path)
    assert reason_of(KeySet(str(path))) == "keys_unavailable"


EC = new_key("ec", "ES256").public_jwk()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"keys": {}}',
        b'{"keys": []}',
        b'{"keys": [1, null, "x", []]}',
        b'{"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "hmac"}]}',
        b'{"keys": [{"kty": "RSA", "kid": "no-modulus"}]}',
        b'{"keys": [{"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "off-curve"}]}',
        b'{"keys": ' + b"[" * 50_000,
        json.dumps({"keys": [{**EC, "use": "enc"}]}).encode(),
        json.dumps({"keys": [{**EC, "key_ops": ["encrypt"]}]}).encode(),
        json.dumps({"keys": [{**EC, "alg": "HS256"}]}).encode(),
        json.dumps({"keys": [{**EC, "alg": ["ES256"]}]}).encode(),
        json.dumps({"keys": [{**EC, "kid": 7}]}).encode(),
        json.dumps({"keys": [EC] * 300}).encode(),
    ],
)
def test_what_is_no_key_set(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_jwks(text)


def test_unknown_kinds_are_passed_over() -> None:
    text = json.dumps({"keys": [{"kty": "AKP", "kid": "new"}, EC, {"kty": "oct", "k": "c2VjcmV0"}]}).encode()
    assert [key.kid for key in parse_jwks(text)] == ["ec"]


def test_a_private_half_is_never_taken() -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    (found,) = parse_jwks(json.dumps({"keys": [{**EC, "d": "AAAA"}]}).encode())
    assert isinstance(found.key, EllipticCurvePublicKey)


# -- discovery


@pytest.fixture
def issuing() -> Iterator[KeyServer]:
    with key_server({"keys": [EC]}) as running:
        running.issuer = running.url.removesuffix("/jwks")
        running.discovery = {"issuer": running.issuer, "jwks_uri": running.url}
        yield running


def test_discovery(issuing: KeyServer) -> None:
    (found,) = KeySet(None, issuing.issuer).candidates("ec", "ES256")
    assert found.kid == "ec"
    assert issuing.paths == ["/.well-known/openid-configuration", "/jwks"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"issuer": "https://another.test"}, "another issuer's"),
        ({"issuer": None}, "another issuer's"),
        ({"jwks_uri": None}, "no jwks_uri"),
        ({"jwks_uri": "file:///etc/passwd"}, "no https address"),
        ({"jwks_uri": "ftp://127.0.0.1/x"}, "no https address"),
    ],
)
def test_discovery_that_is_refused(issuing: KeyServer, changed: dict[str, Any], words: str) -> None:
    issuing.discovery |= changed
    with pytest.raises(IdentityError, match=words) as caught:
        KeySet(None, issuing.issuer).candidates("ec", "ES256")
    assert caught.value.reason == "keys_unavailable"


def test_a_rotation_behind_discovery(issuing: KeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that nobody knows makes both documents be read again; the key set may have moved as well."""
    key_set = KeySet(None, issuing.issuer)
    assert key_set.candidates("ec", "ES256")
    issuing.document = {"keys": [new_key("next", "ES256").public_jwk()]}
    monkeypatch.setattr(keys, "REFETCH_S", 0.0)
    (found,) = key_set.candidates("next", "ES256")
    assert found.kid == "next"
