"""Tokens that are asked for: with a real job's variables, at servers that speak the documented protocols; and what a job cannot make
the supervisor ask."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from sidecar.attribution.resolver import Resolver
from sidecar.config import AttachDocument, Identity, IssuerDocument, SourceDocument
from sidecar.config_document import (
    AzureSource,
    BuildkiteSource,
    CircleciSource,
    CommandSource,
    GithubActionsSource,
    GitlabSource,
    GoogleSource,
    JenkinsSource,
    KubernetesSource,
)
from sidecar.errors import IdentityError
from sidecar.identity import requested
from sidecar.identity.requested import permitted, with_query
from sidecar.identity.service import IdentityService
from sidecar.identity.sources import TokenFinder
from sidecar.identity.verify import REASONS
from sidecar.model.workload import WorkloadContext
from tests.support.job_process import job, job_below, scratch, seen
from tests.support.token_service import RIGHT_TO_ASK, TokenService, token_service
from tests.support.tokens import ISSUER, SUBJECT, Issuer, new_key

ISSUED = Issuer(keys=[new_key("key-1", "ES256")])
HOSTS = ("127.0.0.1",)
GITHUB = SourceDocument(github_actions=GithubActionsSource("sidecar", HOSTS))
BUILDKITE = SourceDocument(buildkite=BuildkiteSource("sidecar", HOSTS))


@pytest.fixture
def service() -> Iterator[TokenService]:
    with token_service(lambda audience: ISSUED.token(aud=audience)) as running:
        yield running


def identity(tmp_path: Path, *sources: SourceDocument, audience: str = "sidecar") -> IdentityService:
    issuer = IssuerDocument(ISSUER, audience, str(ISSUED.jwks(tmp_path)))
    return IdentityService(Identity(False, sources, (issuer,), AttachDocument(), None), wait_s=0.5)


def context(environ: Mapping[str, str]) -> WorkloadContext:
    return WorkloadContext((), 0, environ)


def refused(source: SourceDocument, environ: Mapping[str, str]) -> str:
    with pytest.raises(IdentityError) as caught:
        TokenFinder((source,)).find(context(environ), 0.5)
    assert caught.value.reason in REASONS
    assert RIGHT_TO_ASK not in str(caught.value)
    return caught.value.reason


# -- each source, with a real process


def test_github_actions(service: TokenService, tmp_path: Path) -> None:
    with job(env=service.github()) as pid:
        found = identity(tmp_path, GITHUB).identify(Resolver().resolve(seen(pid)).context)
    assert found.principal is not None, found.detail
    assert (found.principal.subject, found.principal.source) == (SUBJECT, "github_actions")
    assert service.asked == ["sidecar"]


def test_github_actions_of_an_ancestor(service: TokenService, tmp_path: Path) -> None:
    """A step's child that was started with an empty environment is still of that job."""
    with job_below(env=service.github()) as (child, _):
        found = identity(tmp_path, GITHUB).identify(Resolver().resolve(seen(child)).context)
    assert found.principal is not None, found.detail


def test_buildkite(service: TokenService, tmp_path: Path) -> None:
    with job(env=service.buildkite()) as pid:
        found = identity(tmp_path, BUILDKITE).identify(Resolver().resolve(seen(pid)).context)
    assert found.principal is not None, found.detail
    assert found.principal.source == "buildkite"


def test_the_host_itself(service: TokenService, tmp_path: Path) -> None:
    for kind, source in (
        ("google", SourceDocument(google=GoogleSource("sidecar", service.origin))),
        ("azure", SourceDocument(azure=AzureSource("sidecar", "some-client", service.origin + "/"))),
    ):
        found = identity(tmp_path, source).identify(context({}))
        assert found.principal is not None, found.detail
        assert found.principal.source == kind


@pytest.mark.parametrize(
    ("source", "environ"),
    [
        (SourceDocument(gitlab=GitlabSource()), {"GITLAB_CI": "true", "SIDECAR_ID_TOKEN": "TOKEN"}),
        (SourceDocument(jenkins=JenkinsSource("ID")), {"JENKINS_URL": "https://ci.test/", "ID": "TOKEN"}),
        (SourceDocument(circleci=CircleciSource()), {"CIRCLECI": "true", "CIRCLE_OIDC_TOKEN_V2": "TOKEN", "CIRCLE_OIDC_TOKEN": "old"}),
        (SourceDocument(circleci=CircleciSource()), {"CIRCLECI": "true", "CIRCLE_OIDC_TOKEN": "TOKEN"}),
    ],
    ids=["gitlab", "jenkins", "circleci", "circleci, first version"],
)  # fmt: skip
def test_variables_of_a_ci_system(source: SourceDocument, environ: dict[str, str]) -> None:
    finder = TokenFinder((source,))
    with job(env=environ) as pid:
        found = finder.find(Resolver().resolve(seen(pid)).context, 0.5)
    assert found is not None
    assert found.token.reveal() == "TOKEN"
    marker = next(iter(environ))
    rest = {name: value for name, value in environ.items() if name != marker}
    assert finder.find(context(rest), 0.5) is None, "not of that system"


@pytest.mark.root
def test_a_projected_token_of_a_pod() -> None:
    """Kubernetes writes `..data -> ..<time>`, and `token -> ..data/token`, and swaps the middle one."""
    with scratch(Path("/run")) as directory:
        (directory / "..2026").mkdir()
        (directory / "..2026" / "token").write_text("TOKEN")
        (directory / "..2026" / "token").chmod(0o644)
        (directory / "..data").symlink_to("..2026")
        (directory / "token").symlink_to("..data/token")
        source = SourceDocument(kubernetes=KubernetesSource(f"{directory}/token"))
        with job(uid=61001) as pid:
            found = TokenFinder((source,)).find(
                Resolver().resolve(seen(pid, uid=61001, gid=61001)).context, 0.5
            )
    assert found is not None
    assert (found.token.reveal(), found.source) == ("TOKEN", "kubernetes")


# -- a job cannot make the supervisor its tool


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://run.actions.githubusercontent.com/x?y=z", True),
        ("https://RUN.actions.githubusercontent.com./x", True),
        ("http://run.actions.githubusercontent.com/x", False),
        ("https://actions.githubusercontent.com/x", False),
        ("https://evilactions.githubusercontent.com/x", False),
        ("https://run.actions.githubusercontent.com.evil.test/x", False),
        ("https://evil.test/run.actions.githubusercontent.com", False),
        ("https://run.actions.githubusercontent.com@evil.test/x", False),
        ("https://user:pw@run.actions.githubusercontent.com/x", False),
        ("https://evil.test#.actions.githubusercontent.com", False),
        ("https://evil.test\\.actions.githubusercontent.com/", False),
        ("https://run.actions.githubusercontent.com:99999/x", False),
        ("https://run.actions.githubusercontent.com/\r\nhost: evil.test", False),
        ("ftp://run.actions.githubusercontent.com/x", False),
        ("file:///etc/shadow", False),
        ("http://127.0.0.1:1/x", True),
        ("http://127.1:1/x", False),
        ("http://169.254.169.254/latest/meta-data", False),
        ("https://[::1]/x", False),
        ("https://", False),
        ("", False),
        ("https://run.actions.githubusercontent.com/" + "x" * 5000, False),
    ],
)
def test_who_may_be_asked(url: str, allowed: bool) -> None:
    assert permitted(url, ("*.actions.githubusercontent.com", "127.0.0.1")) is allowed


def test_an_address_elsewhere_is_refused_and_not_asked(service: TokenService) -> None:
    source = SourceDocument(github_actions=GithubActionsSource("sidecar", ("ci.test",)))
    assert refused(source, service.github()) == "source_unsafe"
    assert refused(BUILDKITE, {**service.buildkite(), "BUILDKITE_JOB_ID": "../../x"}) == "source_unsafe"
    assert (
        refused(GITHUB, {**service.github(), "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "a\nb: c"}) == "source_unsafe"
    )
    assert service.asked == []


def test_the_configured_audience_stands_against_the_jobs(service: TokenService) -> None:
    environ = service.github()
    environ["ACTIONS_ID_TOKEN_REQUEST_URL"] += "&audience=sts.example"
    assert TokenFinder((GITHUB,)).find(context(environ), 0.5) is not None
    assert service.asked == ["sidecar"]
    assert (
        with_query("https://a.test/x?audience=1&b=#f", audience="é&c=d")
        == "https://a.test/x?b=&audience=%C3%A9%26c%3Dd"
    )


# -- failures


@pytest.mark.parametrize("mode", ["error", "redirect", "garbage", "huge", "nothing"])
def test_a_service_that_fails(service: TokenService, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    service.mode = mode
    with caplog.at_level(logging.DEBUG):
        assert refused(GITHUB, service.github()) == "source_unavailable"
    assert service.asked == ["sidecar"], "asked once, and not followed"
    assert RIGHT_TO_ASK not in caplog.text


def test_a_failure_is_not_asked_again_at_once_and_heals(
    service: TokenService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requested, "RETRY_S", 0.2)
    finder = TokenFinder((GITHUB,))
    service.mode = "error"
    for _ in range(20):
        with pytest.raises(IdentityError, match="status 500"):
            finder.find(context(service.github()), 0.5)
    assert len(service.asked) == 1
    service.mode = "serve"
    time.sleep(0.25)
    assert finder.find(context(service.github()), 0.5) is not None


def test_a_service_that_hangs_delays_nobody_twice(service: TokenService) -> None:
    service.mode = "hang"
    finder = TokenFinder((GITHUB,))
    began = time.monotonic()
    with pytest.raises(IdentityError, match="in time"):
        finder.find(context(service.github()), 0.2)
    with pytest.raises(IdentityError, match="in time"):
        finder.find(context(service.github()), 0.0)
    assert time.monotonic() - began < 1.0
    assert len(service.asked) == 1


def test_no_weaker_source_instead(service: TokenService, tmp_path: Path) -> None:
    """A job that breaks its own request variables does not become what the host is."""
    service.mode = "error"
    host = SourceDocument(google=GoogleSource("sidecar", service.origin))
    found = identity(tmp_path, GITHUB, host).identify(context(service.github()))
    assert (found.principal, found.error) == (None, "source_unavailable")


def test_a_job_that_does_not_have_the_right_to_ask(service: TokenService, tmp_path: Path) -> None:
    environ = {**service.github(), "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "of-somebody-else"}
    found = identity(tmp_path, GITHUB).identify(context(environ))
    assert (found.principal, found.error) == (None, "source_unavailable")
    assert "status 401" in found.detail


def test_a_token_for_another_audience_is_refused(service: TokenService, tmp_path: Path) -> None:
    found = identity(tmp_path, GITHUB, audience="another").identify(context(service.github()))
    assert found.error == "wrong_audience"


# -- kept


def test_one_question_for_many_flows(service: TokenService) -> None:
    finder = TokenFinder((GITHUB,))
    environ = service.github()
    threads = [threading.Thread(target=finder.find, args=(context(environ), 2.0)) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert service.asked == ["sidecar"]
    finder.find(
        context(
            {**environ, "ACTIONS_ID_TOKEN_REQUEST_URL": environ["ACTIONS_ID_TOKEN_REQUEST_URL"] + "&job=2"}
        ),
        2.0,
    )
    assert len(service.asked) == 2, "another job's token is another one"


def test_a_token_is_asked_for_anew_before_it_expires(
    service: TokenService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requested, "RETRY_S", 0.1)
    service.give = lambda audience: ISSUED.token(aud=audience, exp=int(time.time()) + 30)
    finder = TokenFinder((GITHUB,))
    assert finder.find(context(service.github()), 0.5) is not None
    time.sleep(0.15)
    assert finder.find(context(service.github()), 0.5) is not None
    assert len(service.asked) == 2


# -- a command


def program(directory: Path, text: str, *, mode: int = 0o755) -> SourceDocument:
    path = directory / "token"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(mode)
    return SourceDocument(command=CommandSource((str(path), "an argument"), "1s"))


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch(Path("/run")) as directory:
        yield directory


@pytest.mark.root
def test_a_command(place: Path) -> None:
    source = program(
        place, 'echo "$1,$SIDECAR_PID,$SIDECAR_UID,$SIDECAR_START,$HOME,$(env | grep -c SECRET)"; echo x >&2'
    )
    with job(env={"SECRET": "x"}, uid=61001) as pid:
        seen_as = Resolver().resolve(seen(pid, uid=61001, gid=61001)).context
        found = TokenFinder((source,)).find(seen_as, 2.0)
    assert found is not None
    assert found.token.reveal() == f"an argument,{pid},61001,{seen_as.starts[0]},,0"


@pytest.mark.root
def test_a_command_that_knows_no_token(place: Path) -> None:
    with job() as pid:
        assert (
            TokenFinder((program(place, "exit 0"),)).find(Resolver().resolve(seen(pid)).context, 2.0) is None
        )


@pytest.mark.root
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo hunter2; exit 3", "exit status 3"),
        ("sleep 60", "in time"),
        ("exec >&-; sleep 60", "goes on"),
        ("yes", "more than"),
        ("printf '\\377'", "no token"),
    ],
)  # fmt: skip
def test_a_command_that_fails(place: Path, text: str, words: str) -> None:
    with job() as pid:
        here = Resolver().resolve(seen(pid)).context
        with pytest.raises(IdentityError, match=words) as caught:
            TokenFinder((program(place, text),)).find(here, 5.0)
    assert caught.value.reason == "source_unavailable"
    assert "hunter2" not in str(caught.value)


@pytest.mark.root
def test_a_command_that_others_can_change(place: Path) -> None:
    with job() as pid:
        here = Resolver().resolve(seen(pid)).context
        for source in (program(place, "echo x", mode=0o757), program(place, "echo x", mode=0o775)):
            with pytest.raises(IdentityError, match="others than root") as caught:
                TokenFinder((source,)).find(here, 2.0)
            assert caught.value.reason == "source_unsafe"
        with pytest.raises(IdentityError, match="cannot be run"):
            TokenFinder((SourceDocument(command=CommandSource(("/nowhere/x",))),)).find(here, 2.0)


@pytest.mark.root
def test_a_command_is_not_run_for_who_is_gone(place: Path) -> None:
    gone = dataclasses.replace(context({}), exited=True)
    assert TokenFinder((program(place, "echo x"),)).find(gone, 2.0) is None
