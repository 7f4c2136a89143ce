"""What a CI system's own variables say about the job. They are claims of the environment, not proof: the token is.

Sources: the variables that GitHub Actions, GitLab, Buildkite, Jenkins, CircleCI and Azure Pipelines document.
"""

from __future__ import annotations

from collections.abc import Mapping

from sidecar.model.workload import CiJob

_VARIABLES: dict[str, tuple[str, dict[str, str]]] = {
    "github": (
        "GITHUB_ACTIONS",
        {"repository": "GITHUB_REPOSITORY", "workflow": "GITHUB_WORKFLOW", "run": "GITHUB_RUN_ID", "job": "GITHUB_JOB", "step": "GITHUB_ACTION"},
    ),
    "gitlab": (
        "GITLAB_CI",
        {"repository": "CI_PROJECT_PATH", "workflow": "CI_PIPELINE_SOURCE", "run": "CI_PIPELINE_ID", "job": "CI_JOB_NAME", "step": "CI_JOB_STAGE"},
    ),
    "buildkite": (
        "BUILDKITE",
        {"repository": "BUILDKITE_REPO", "workflow": "BUILDKITE_PIPELINE_SLUG", "run": "BUILDKITE_BUILD_NUMBER", "job": "BUILDKITE_JOB_ID", "step": "BUILDKITE_STEP_KEY"},
    ),
    "jenkins": (
        "JENKINS_URL",
        {"repository": "GIT_URL", "workflow": "JOB_NAME", "run": "BUILD_NUMBER", "job": "JOB_BASE_NAME", "step": "STAGE_NAME"},
    ),
    "circleci": (
        "CIRCLECI",
        {"repository": "CIRCLE_PROJECT_REPONAME", "workflow": "CIRCLE_WORKFLOW_ID", "run": "CIRCLE_BUILD_NUM", "job": "CIRCLE_JOB", "step": ""},
    ),
    "azure": (
        "TF_BUILD",
        {"repository": "BUILD_REPOSITORY_NAME", "workflow": "BUILD_DEFINITIONNAME", "run": "BUILD_BUILDID", "job": "SYSTEM_JOBNAME", "step": "SYSTEM_TASKDISPLAYNAME"},
    ),
}  # fmt: skip

VALUE_MAX_CHARS = 512


def ci_job(environ: Mapping[str, str]) -> CiJob | None:
    """The job, or None where no known CI's marker is set."""
    for provider, (marker, names) in _VARIABLES.items():
        if environ.get(marker):
            values = {field: environ.get(name, "")[:VALUE_MAX_CHARS] for field, name in names.items() if name}
            return CiJob(provider=provider, **values)
    return None
