"""Where a job's token is: in its own environment or file system, or at a service that gives it to whoever may ask for this job.

Never in the agent's environment. The supervisor reads as root what a job chose to put somewhere, so that a file
source is a confused deputy waiting to happen; `token_file` explains what is accepted and why, `requested` the same of
addresses. Nothing here judges a token: that is `verify`.

Sources: the pages on OpenID Connect of GitHub Actions, GitLab (ID tokens), Buildkite (`buildkite-agent oidc`), CircleCI and
Jenkins (OpenID Connect Provider plugin); Kubernetes, projected volumes; Google Cloud, verifying the identity of instances; Azure,
Instance Metadata Service.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from sidecar.attribution import procfs
from sidecar.config_document import (
    AzureSource,
    BuildkiteSource,
    CircleciSource,
    CommandSource,
    EnvSource,
    FileSource,
    GithubActionsSource,
    GitlabSource,
    GoogleSource,
    JenkinsSource,
    KubernetesSource,
    SourceDocument,
    TokenSource,
)
from sidecar.errors import IdentityError
from sidecar.identity.command import CommandQuestion
from sidecar.identity.compact import MAX_TOKEN_BYTES
from sidecar.identity.requested import TokenRequest, TokenRequests, permitted, with_query
from sidecar.identity.token_file import Reader, read_token_file
from sidecar.model.secret import Secret
from sidecar.model.workload import WorkloadContext

MAX_STATUS_BYTES: Final = 1024 * 1024
"""65,536 supplementary groups fit in it."""
_PLACEHOLDER: Final = re.compile(r"\{([a-z]+)\}")
PLACEHOLDERS: Final = ("uid", "gid", "pid", "user")
_SAFE_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?")
_JOB_ID: Final = re.compile(r"[0-9A-Za-z-]{1,64}")
_HEADER_VALUE: Final = re.compile(r"[\x21-\x7e]+")
AZURE_API_VERSION: Final = "2018-02-01"
BUILDKITE_ENDPOINT: Final = "https://agent.buildkite.com/v3"
"""What its agent takes where the job names none."""


@dataclass(frozen=True, slots=True)
class FoundToken:
    """`source` is the kind of source that yielded it."""

    token: Secret
    source: str


class TokenFinder:
    """Looks through the configured sources. Thread-safe; blocks up to `wait_s` where one has to be asked."""

    def __init__(self, sources: tuple[SourceDocument, ...]) -> None:
        self._sources = tuple(chosen for source in sources for chosen in source.chosen())
        self._requests = TokenRequests()

    def find(self, context: WorkloadContext, wait_s: float) -> FoundToken | None:
        """The first source that yields a token wins; within a source the process itself, then its ancestors,
        nearest first.

        Raises IdentityError: `too_large`, `source_unsafe`, `source_unavailable`.
        """
        for kind, source in self._sources:
            token = self._look(source, context, wait_s)
            if token:
                return FoundToken(_checked(token), kind)
        return None

    def _look(self, source: TokenSource, context: WorkloadContext, wait_s: float) -> Secret | None:
        match source:
            case EnvSource():
                return _variable(context, source.name)
            case FileSource() | KubernetesSource():
                return _from_file(source.path, context)
            case GitlabSource():
                return _variable(context, source.name, "GITLAB_CI")
            case JenkinsSource():
                return _variable(context, source.name, "JENKINS_URL")
            case CircleciSource():
                return _variable(context, "CIRCLE_OIDC_TOKEN_V2", "CIRCLECI") or _variable(
                    context, "CIRCLE_OIDC_TOKEN", "CIRCLECI"
                )
            case CommandSource():
                question = CommandQuestion.of(source, context)
                return self._requests.obtain(question, wait_s) if question else None
        request = _request(source, context)
        return self._requests.obtain(request, wait_s) if request else None


def _checked(token: Secret) -> Secret:
    if len(token.reveal()) > MAX_TOKEN_BYTES:
        raise IdentityError(f"the token is larger than {MAX_TOKEN_BYTES} bytes", reason="too_large")
    return token


# -- asking


def _request(
    source: GithubActionsSource | BuildkiteSource | GoogleSource | AzureSource, context: WorkloadContext
) -> TokenRequest | None:
    match source:
        case GithubActionsSource():
            return _github_actions(source, context)
        case BuildkiteSource():
            return _buildkite(source, context)
        case GoogleSource():
            url = with_query(
                source.endpoint.rstrip("/")
                + "/computeMetadata/v1/instance/service-accounts/default/identity",
                audience=source.audience,
                format="full",
            )
            return TokenRequest("GET", url, {"metadata-flavor": "Google"}, answer="")
        case AzureSource():
            named = {"client_id": source.client_id} if source.client_id else {}
            url = with_query(
                source.endpoint.rstrip("/") + "/metadata/identity/oauth2/token",
                **{"api-version": AZURE_API_VERSION, "resource": source.audience, **named},
            )
            return TokenRequest("GET", url, {"metadata": "true"}, answer="access_token")


def _github_actions(source: GithubActionsSource, context: WorkloadContext) -> TokenRequest | None:
    url_name, token_name = "ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"
    environ = next(_environments(context, url_name, token_name), None)
    if environ is None:
        return None
    url = _permitted(environ[url_name].strip(), source.hosts, url_name)
    bearer = _header_value(environ[token_name], token_name)
    return TokenRequest(
        "GET",
        with_query(url, audience=source.audience),
        {"authorization": f"bearer {bearer}"},
        answer="value",
    )


def _buildkite(source: BuildkiteSource, context: WorkloadContext) -> TokenRequest | None:
    token_name, job_name, url_name = (
        "BUILDKITE_AGENT_ACCESS_TOKEN",
        "BUILDKITE_JOB_ID",
        "BUILDKITE_AGENT_ENDPOINT",
    )
    environ = next(_environments(context, token_name, job_name), None)
    if environ is None:
        return None
    job = environ[job_name].strip()
    if not _JOB_ID.fullmatch(job):
        raise IdentityError(f"the job's {job_name} is no id", reason="source_unsafe")
    url = _permitted(environ.get(url_name, "").strip() or BUILDKITE_ENDPOINT, source.hosts, url_name)
    token = _header_value(environ[token_name], token_name)
    return TokenRequest(
        "POST",
        f"{url.rstrip('/')}/jobs/{job}/oidc/tokens",
        {"authorization": f"Token {token}"},
        answer="token",
        body={"audience": source.audience},
    )


def _permitted(url: str, hosts: tuple[str, ...], variable: str) -> str:
    if not permitted(url, hosts):
        raise IdentityError(
            f"the job's {variable} is no https address of a host that identity.sources names under hosts",
            reason="source_unsafe",
        )
    return url


def _header_value(text: str, variable: str) -> str:
    value = text.strip()
    if not _HEADER_VALUE.fullmatch(value) or len(value) > MAX_TOKEN_BYTES:
        raise IdentityError(f"the job's {variable} is no token", reason="source_unsafe")
    return value


# -- the environment


def _environments(context: WorkloadContext, *needed: str) -> Iterator[Mapping[str, str]]:
    """The environments of the process and of its job's ancestors in which all of these variables stand, nearest first."""
    if all(context.environ.get(name, "").strip() for name in needed):
        yield context.environ
    for index, pid in enumerate(context.pids[1:], 1):
        raw = procfs.raw_environ(pid)
        if any(f"{name}=".encode() not in raw for name in needed) or not _unchanged(context, index):
            continue
        environ = procfs.parse_environ(raw)
        if all(environ.get(name, "").strip() for name in needed):
            yield environ


def _variable(context: WorkloadContext, name: str, *markers: str) -> Secret | None:
    """Its value in the nearest environment that has it, and every marker."""
    environ = next(_environments(context, name, *markers), None)
    return Secret(environ[name].strip()) if environ else None


def _unchanged(context: WorkloadContext, index: int) -> bool:
    """Whether `pids[index]` is still the process that it was."""
    if index >= len(context.starts):
        return True
    stat = procfs.read_stat(context.pids[index])
    return stat is not None and stat.start_ticks == context.starts[index]


# -- files


def _from_file(template: str, context: WorkloadContext) -> Secret | None:
    tried: set[tuple[str, Reader, tuple[int, int]]] = set()
    for index, pid in enumerate(context.pids):
        reader = _reader(pid)
        if reader is None:
            continue
        if index == 0:
            # the kernel's word on who connected stands above what the process became since
            reader = Reader(context.uid, context.gid, reader.groups)
        path = expand_path(template, pid, reader.uid, reader.gid)
        place = _root_of(pid)
        if path is None or place is None or (path, reader, place) in tried:
            continue
        tried.add((path, reader, place))
        text = read_token_file(pid, path, reader, MAX_TOKEN_BYTES)
        if text and _unchanged(context, index):
            return Secret(text)
    return None


def _root_of(pid: int) -> tuple[int, int] | None:
    """What a path means to a process: its mount namespace and root directory, as inodes."""
    try:
        return os.stat(f"/proc/{pid}/ns/mnt").st_ino, os.stat(f"/proc/{pid}/root/").st_ino
    except OSError:
        return None


def _reader(pid: int) -> Reader | None:
    """Effective user, group and supplementary groups of a process, from /proc/<pid>/status; None where it is
    gone."""
    uid = gid = None
    groups: tuple[int, ...] = ()
    for line in procfs.read_bounded(f"/proc/{pid}/status", MAX_STATUS_BYTES).split(b"\n"):
        if line.startswith(b"Uid:"):
            uid = int(line.split()[2])
        elif line.startswith(b"Gid:"):
            gid = int(line.split()[2])
        elif line.startswith(b"Groups:"):
            groups = tuple(int(group) for group in line.split()[1:])
            break
    return Reader(uid, gid, groups) if uid is not None and gid is not None else None


def expand_path(template: str, pid: int, uid: int, gid: int) -> str | None:
    """`{uid}`, `{gid}`, `{pid}` and `{user}` filled in. None where the user has no name that is safe in a
    path.

    The values are digits, or a name that is checked: none can hold a separator, so that a path stays below
    its template.
    """
    values = {"uid": str(uid), "gid": str(gid), "pid": str(pid)}
    if "{user}" in template:
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError:
            return None
        if not _SAFE_USER.fullmatch(name):
            return None
        values["user"] = name
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


__all__ = ["MAX_TOKEN_BYTES", "FoundToken", "TokenFinder", "WorkloadContext", "expand_path"]
