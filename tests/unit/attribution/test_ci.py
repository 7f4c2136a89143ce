"""What the variables of CI systems say."""

from __future__ import annotations

import pytest

from sidecar.attribution.ci import MAX_VALUE_CHARS, ci_job, ci_job_in
from sidecar.model.workload import CiJob

ENVIRONMENTS = [
    (
        {
            "GITHUB_ACTIONS": "true",
            "GITHUB_REPOSITORY": "acme/reports",
            "GITHUB_WORKFLOW": "nightly",
            "GITHUB_RUN_ID": "42",
            "GITHUB_JOB": "report",
            "GITHUB_ACTION": "__run_2",
        },
        CiJob("github", "acme/reports", "nightly", "42", "report", "__run_2"),
    ),
    (
        {
            "GITLAB_CI": "true",
            "CI_PROJECT_PATH": "acme/reports",
            "CI_PIPELINE_SOURCE": "schedule",
            "CI_PIPELINE_ID": "7",
            "CI_JOB_NAME": "report",
            "CI_JOB_STAGE": "deploy",
        },
        CiJob("gitlab", "acme/reports", "schedule", "7", "report", "deploy"),
    ),
    (
        {
            "BUILDKITE": "true",
            "BUILDKITE_REPO": "https://bot:hunter2@git.test/acme/reports.git",
            "BUILDKITE_PIPELINE_SLUG": "reports",
            "BUILDKITE_BUILD_NUMBER": "9",
            "BUILDKITE_LABEL": "Report",
            "BUILDKITE_STEP_KEY": "report",
        },
        CiJob("buildkite", "https://bot:****@git.test/acme/reports.git", "reports", "9", "Report", "report"),
    ),
    (
        {
            "JENKINS_URL": "https://ci.test/",
            "JOB_NAME": "folder/reports",
            "JOB_BASE_NAME": "reports",
            "BUILD_NUMBER": "3",
            "STAGE_NAME": "Report",
            "GIT_URL": "git@git.test:acme/reports.git",
        },
        CiJob("jenkins", "git@git.test:acme/reports.git", "folder/reports", "3", "reports", "Report"),
    ),
    (
        {
            "CIRCLECI": "true",
            "CIRCLE_PROJECT_USERNAME": "acme",
            "CIRCLE_PROJECT_REPONAME": "reports",
            "CIRCLE_WORKFLOW_ID": "w-1",
            "CIRCLE_BUILD_NUM": "11",
            "CIRCLE_JOB": "report",
        },
        CiJob("circleci", "acme/reports", "w-1", "11", "report", ""),
    ),
    (
        {
            "TF_BUILD": "True",
            "BUILD_REPOSITORY_NAME": "reports",
            "BUILD_DEFINITIONNAME": "nightly",
            "BUILD_BUILDID": "5",
            "SYSTEM_JOBNAME": "report",
            "SYSTEM_TASKDISPLAYNAME": "Run report",
        },
        CiJob("azure", "reports", "nightly", "5", "report", "Run report"),
    ),
]


@pytest.mark.parametrize(("environ", "expected"), ENVIRONMENTS, ids=[row[1].provider for row in ENVIRONMENTS])
def test_providers(environ: dict[str, str], expected: CiJob) -> None:
    assert ci_job({"PATH": "/bin", **environ}) == expected
    raw = b"\0".join(f"{name}={value}".encode() for name, value in environ.items())
    assert ci_job_in(raw) == expected


@pytest.mark.parametrize(
    "environ", [{}, {"CI": "true"}, {"GITHUB_ACTIONS": "false"}, {"GITHUB_ACTIONS": ""}, {"TF_BUILD": "1"}]
)
def test_no_ci(environ: dict[str, str]) -> None:
    assert ci_job(environ) is None
    assert ci_job_in(b"\0".join(f"{name}={value}".encode() for name, value in environ.items())) is None


def test_values_are_bounded_and_printable() -> None:
    found = ci_job({"GITHUB_ACTIONS": "true", "GITHUB_JOB": "a\x1b[2J\n" + "x" * 5000})
    assert found is not None
    assert found.job.startswith("a?[2J?x")
    assert len(found.job) == MAX_VALUE_CHARS
