"""What a CI system's own variables say about the job. They are claims of the environment, not proof: the
token is.

Sources: the pages of predefined variables of GitHub Actions, GitLab, Buildkite, Jenkins, CircleCI and Azure
Pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sidecar.attribution.procfs import parse_environ
from sidecar.attribution.redaction import redact_text
from sidecar.model.workload import CiJob

MAX_VALUE_CHARS: Final = 512


@dataclass(frozen=True, slots=True)
class _Provider:
    """`marker` must be set, to `value` where one is given. Each field takes the first variable that is not
    empty; several joined by `/` are one value."""

    marker: str
    value: str | None
    repository: tuple[str, ...]
    workflow: tuple[str, ...]
    run: tuple[str, ...]
    job: tuple[str, ...]
    step: tuple[str, ...] = ()


PROVIDERS: Final[Mapping[str, _Provider]] = {
    "github": _Provider(
        "GITHUB_ACTIONS",
        "true",
        repository=("GITHUB_REPOSITORY",),
        workflow=("GITHUB_WORKFLOW",),
        run=("GITHUB_RUN_ID",),
        job=("GITHUB_JOB",),
        step=("GITHUB_ACTION",),
    ),
    "gitlab": _Provider(
        "GITLAB_CI",
        "true",
        repository=("CI_PROJECT_PATH",),
        workflow=("CI_PIPELINE_NAME", "CI_PIPELINE_SOURCE"),
        run=("CI_PIPELINE_ID",),
        job=("CI_JOB_NAME",),
        step=("CI_JOB_STAGE",),
    ),
    "buildkite": _Provider(
        "BUILDKITE",
        "true",
        repository=("BUILDKITE_REPO",),
        workflow=("BUILDKITE_PIPELINE_SLUG",),
        run=("BUILDKITE_BUILD_NUMBER",),
        job=("BUILDKITE_LABEL", "BUILDKITE_JOB_ID"),
        step=("BUILDKITE_STEP_KEY", "BUILDKITE_STEP_ID"),
    ),
    "circleci": _Provider(
        "CIRCLECI",
        "true",
        repository=("CIRCLE_PROJECT_USERNAME/CIRCLE_PROJECT_REPONAME",),
        workflow=("CIRCLE_WORKFLOW_ID",),
        run=("CIRCLE_BUILD_NUM",),
        job=("CIRCLE_JOB",),
    ),
    "azure": _Provider(
        "TF_BUILD",
        "true",
        repository=("BUILD_REPOSITORY_NAME",),
        workflow=("BUILD_DEFINITIONNAME",),
        run=("BUILD_BUILDID",),
        job=("SYSTEM_JOBNAME", "AGENT_JOBNAME"),
        step=("SYSTEM_TASKDISPLAYNAME", "SYSTEM_STAGENAME"),
    ),
    "jenkins": _Provider(
        "JENKINS_URL",
        None,
        repository=("GIT_URL", "GIT_URL_1"),
        workflow=("JOB_NAME",),
        run=("BUILD_NUMBER",),
        job=("JOB_BASE_NAME", "JOB_NAME"),
        step=("STAGE_NAME",),
    ),
}

_MARKERS: Final = tuple(provider.marker.encode() + b"=" for provider in PROVIDERS.values())


def ci_job(environ: Mapping[str, str]) -> CiJob | None:
    """The job, or None where no known CI's marker is set."""
    for name, provider in PROVIDERS.items():
        marker = environ.get(provider.marker, "")
        if marker and (provider.value is None or marker.lower() == provider.value):
            return CiJob(
                provider=name,
                repository=_first(environ, provider.repository),
                workflow=_first(environ, provider.workflow),
                run=_first(environ, provider.run),
                job=_first(environ, provider.job),
                step=_first(environ, provider.step),
            )
    return None


def ci_job_in(raw: bytes) -> CiJob | None:
    """The same of a raw environment, which is only taken apart where a marker stands in it."""
    if not any(marker in raw for marker in _MARKERS):
        return None
    return ci_job(parse_environ(raw))


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> str:
    for name in names:
        text = "/".join(part for part in (environ.get(part, "") for part in name.split("/")) if part)
        if text:
            # a repository's address may carry credentials, and a control character would break a terminal
            return redact_text(
                "".join(char if char.isprintable() else "?" for char in text[:MAX_VALUE_CHARS])
            )
    return ""
