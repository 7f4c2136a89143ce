"""From a real process's context to a principal: remembered, bounded, and with the right word when it
fails."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from sidecar.attribution.resolver import Resolver
from sidecar.config import AttachDocument, EnvSource, Identity, IssuerDocument, SourceDocument
from sidecar.identity import service
from sidecar.identity.service import IdentityService
from sidecar.identity.sources import WorkloadContext
from sidecar.identity.verify import REASONS
from tests.support.job_process import job, seen
from tests.support.key_server import key_server
from tests.support.tokens import AUDIENCE, ISSUER, SUBJECT, Issuer, new_key

ISSUED = Issuer(keys=[new_key("key-1", "ES256")])


def configuration(jwks: Path | str, *, max_age_s: float | None = None) -> Identity:
    return Identity(
        required=False,
        sources=(SourceDocument(env=EnvSource("SIDECAR_ID_TOKEN")),),
        issuers=(IssuerDocument(ISSUER, AUDIENCE, str(jwks)),),
        attach=AttachDocument(),
        max_age_s=max_age_s,
    )


def context(token: str | None) -> WorkloadContext:
    return WorkloadContext((), 0, {} if token is None else {"SIDECAR_ID_TOKEN": token})


@pytest.fixture
def identity(tmp_path: Path) -> IdentityService:
    return IdentityService(configuration(ISSUED.jwks(tmp_path)))


def test_a_real_process(identity: IdentityService) -> None:
    token = ISSUED.token()
    with job(env={"SIDECAR_ID_TOKEN": token}) as pid:
        found = identity.identify(Resolver().resolve(seen(pid)).context)
    assert found.principal is not None
    assert found.principal.subject == SUBJECT
    assert found.token is not None
    assert found.token.reveal() == token
    assert found.error is None
    assert token not in repr(found)


def test_no_token(identity: IdentityService) -> None:
    found = identity.identify(context(None))
    assert (found.principal, found.token, found.error) == (None, None, "no_token")


def test_a_process_that_had_gone(identity: IdentityService) -> None:
    gone = WorkloadContext((), 0, {}, exited=True)
    assert identity.identify(gone).error == "process_gone"


def test_nothing_is_configured() -> None:
    nothing = Identity(required=False, sources=(), issuers=(), attach=AttachDocument(), max_age_s=None)
    assert IdentityService(nothing).identify(context("x")).error == "no_token"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"exp": 1}, "expired"),
        ({"aud": "x"}, "wrong_audience"),
        ({"iss": "https://x.test"}, "unknown_issuer"),
    ],
)
def test_a_refusal_has_its_word_and_no_token(
    identity: IdentityService, changed: dict[str, object], reason: str
) -> None:
    token = ISSUED.token(**changed)
    found = identity.identify(context(token))
    assert (found.principal, found.token, found.error) == (None, None, reason)
    assert found.detail
    assert token not in found.detail
    assert reason in REASONS


def test_a_token_is_remembered_but_not_past_its_expiry(identity: IdentityService) -> None:
    # 30 s of leeway: valid for one more second
    token = ISSUED.token(exp=time.time() - 29)
    assert identity.identify(context(token)).principal is not None
    time.sleep(1.2)
    assert identity.identify(context(token)).error == "expired"


def test_a_remembered_token_costs_little(identity: IdentityService) -> None:
    known = context(ISSUED.token())
    identity.identify(known)
    started = time.perf_counter()
    for _ in range(1000):
        assert identity.identify(known).principal is not None
    assert (time.perf_counter() - started) / 1000 < 100e-6


def test_a_withdrawn_key_takes_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "REMEMBER_S", 0.0)
    issuer = Issuer(keys=[new_key("old", "ES256")])
    identity = IdentityService(configuration(issuer.jwks(tmp_path)))
    token = issuer.token()
    assert identity.identify(context(token)).principal is not None
    issuer.keys = [new_key("new", "ES256")]
    issuer.jwks(tmp_path)
    assert identity.identify(context(token)).error == "unknown_key"


def test_what_heals_is_asked_again(tmp_path: Path) -> None:
    identity = IdentityService(configuration(tmp_path / "jwks.json"))
    token = ISSUED.token()
    assert identity.problems() == ()
    assert identity.identify(context(token)).error == "keys_unavailable"
    (problem,) = identity.problems()
    assert problem.startswith(f"{ISSUER}: ")
    assert "jwks.json" in problem
    ISSUED.jwks(tmp_path)
    assert identity.identify(context(token)).principal is not None
    assert identity.problems() == ()


def test_maximum_age(tmp_path: Path) -> None:
    identity = IdentityService(configuration(ISSUED.jwks(tmp_path), max_age_s=60))
    assert identity.identify(context(ISSUED.token(iat=int(time.time()) - 61))).error == "too_old"
    assert identity.identify(context(ISSUED.token())).principal is not None


def test_memory_is_bounded(identity: IdentityService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_REMEMBERED", 8)
    for number in range(40):
        identity.identify(context(f"forged.{number}.x"))
    assert len(identity._remembered) == 8


def test_a_hanging_issuer_is_a_bounded_wait_for_all_flows() -> None:
    with key_server(ISSUED.key_set()) as server:
        server.mode = "hang"
        identity = IdentityService(configuration(server.url), wait_s=0.4)
        errors: list[str | None] = []
        token = ISSUED.token()
        threads = [
            threading.Thread(target=lambda: errors.append(identity.identify(context(token)).error))
            for _ in range(12)
        ]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - started < 1.5
        assert errors == ["keys_unavailable"] * 12
