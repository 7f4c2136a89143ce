"""The process, container or CI job that a flow belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Container:
    """`name` is empty where no engine has said more than the id; then the rest is unknown as well. `image` is as the container was
    started with it, `image_id` its content's digest, `image_digest` the repository's (empty for an image that was built here)."""

    id: str
    name: str = ""
    image: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    image_id: str = ""
    image_digest: str = ""


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


@dataclass(frozen=True, slots=True)
class WorkloadContext:
    """What a token may be looked for in.

    `pids`: the process, its parent, … up to the job's root, nearest first, pid 1 excluded; `starts` are their
    start times in ticks, so that a reused pid is not read (empty: unknown, not compared). `environ` is the
    process's own. `exited`: it had gone before it could be read.
    """

    pids: tuple[int, ...]
    uid: int
    environ: Mapping[str, str] = field(repr=False, hash=False)
    gid: int = 0
    starts: tuple[int, ...] = ()
    exited: bool = False
