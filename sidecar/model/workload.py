"""The process, container or CI job that a flow belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Container:
    id: str
    name: str = ""
    image: str = ""
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class CiJob:
    """What the CI system's own variables say; `provider` is `github`, `gitlab`, `buildkite`, …"""

    provider: str
    repository: str = ""
    workflow: str = ""
    run: str = ""
    job: str = ""
    step: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    kind: str = "process"
    """`process`, `container` or `ci`."""
    uid: int | None = None
    exe: str = ""
    cgroup: str = ""
    unit: str = ""
    """The systemd unit, where the cgroup path names one."""
    container: Container | None = None
    ci: CiJob | None = None
    facts: tuple[tuple[str, str], ...] = field(default=())
