"""cgroup ids and paths on the real hierarchy, and what paths of known hosts say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.attribution import cgroup
from sidecar.attribution.lineage import places, same_job
from tests.support.job_process import job

ID = "0123456789abcdef" * 4
OTHER = "f" * 64


@pytest.fixture
def made() -> Iterator[Path]:
    mount = cgroup.mount_point()
    assert mount is not None
    directory = mount / f"attribution-{os.urandom(4).hex()}" / "inner"
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        if directory.exists():
            directory.rmdir()
        directory.parent.rmdir()


@pytest.mark.root
def test_an_id_is_found_and_kept_after_the_cgroup_is_gone(made: Path) -> None:
    paths = cgroup.CgroupPaths()
    identity = made.stat().st_ino
    expected = f"/{made.parent.name}/inner"
    assert paths.path(identity) == expected
    made.rmdir()
    assert paths.path(identity) == expected
    assert cgroup.CgroupPaths().path(identity) == ""


@pytest.mark.root
def test_the_root_and_what_never_was() -> None:
    paths = cgroup.CgroupPaths()
    mount = cgroup.mount_point()
    assert mount is not None
    assert paths.path(mount.stat().st_ino) == "/"
    assert paths.path(0) == ""
    assert paths.path(2**63 + 12345) == ""


@pytest.mark.root
def test_the_slow_ways_agree(made: Path) -> None:
    paths = cgroup.CgroupPaths()
    identity = made.stat().st_ino
    expected = f"/{made.parent.name}/inner"
    assert paths._by_handle(identity) == expected
    assert paths._by_walk(identity) == expected
    with job() as pid:
        (made / "cgroup.procs").write_text(str(pid))
        assert paths._by_process(identity, pid) == expected
        assert paths._by_process(identity + 1, pid) == ""


@pytest.mark.root
def test_memory_is_bounded(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "MAX_KNOWN", 1)
    paths = cgroup.CgroupPaths()
    for directory in (made, made.parent):
        assert paths.path(directory.stat().st_ino)
    assert len(paths._known) == 1


V2 = f"0::/system.slice/docker-{ID}.scope\n"
HYBRID = f"""\
12:devices:/docker/{ID}
11:cpu,cpuacct:/docker/{ID}
1:name=systemd:/docker/{ID}
0::/system.slice/docker.service
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0::/\n", ()),
        ("0::/ci.slice/job (deleted)\n", ("/ci.slice/job",)),
        (V2, (f"/system.slice/docker-{ID}.scope",)),
        (HYBRID, ("/system.slice/docker.service", f"/docker/{ID}")),
        ("9:name=systemd:/user.slice/x\n4:memory:/m\n0::/\n", ("/user.slice/x", "/m")),
        ("", ()),
        ("garbage\n", ()),
    ],
)
def test_paths_that_name(text: str, expected: tuple[str, ...]) -> None:
    assert cgroup.naming_paths(text) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", ""),
        ("/system.slice/cron.service", "cron.service"),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/job.service", "job.service"),
        (
            "/system.slice/actions.runner.acme\\x2dreports.service/inner",
            "actions.runner.acme-reports.service",
        ),
        ("/ci.slice/job-1", ""),
    ],
)
def test_units(path: str, expected: str) -> None:
    assert cgroup.unit_of(path) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (f"/docker/{ID}", ID),
        (f"/system.slice/docker-{ID}.scope", ID),
        (f"/docker/{OTHER}/docker/{ID}", ID),
        (f"/machine.slice/libpod-{ID}.scope/container", ID),
        (f"/machine.slice/libpod-conmon-{ID}.scope", None),
        (
            f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-{ID}.scope",
            ID,
        ),
        (f"/kubepods/besteffort/pod12345678-1234-1234-1234-123456789abc/{ID}", ID),
        (f"/kubepods.slice/kubepods-pod1.slice/crio-{ID}.scope", ID),
        (f"/system.slice/containerd.service/kubepods-pod1.slice:cri-containerd:{ID}", ID),
        ("/lxc.payload.build7/system.slice", "build7"),
        ("/system.slice/docker.service", None),
        (f"/home/{ID[:63]}", None),
        ("/", None),
    ],
)
def test_containers(path: str, expected: str | None) -> None:
    found = cgroup.container_of(path)
    assert (found.id if found else None) == expected


def test_a_hybrid_host_names_its_containers() -> None:
    found = cgroup.container_of(*cgroup.naming_paths(HYBRID))
    assert found is not None
    assert found.id == ID


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        (("/",), ("/",), True),
        (("/job",), ("/job",), True),
        (("/job/step",), ("/job",), True),
        (("/job",), ("/job/step",), False),
        (("/job",), ("/",), False),
        (("/job-2",), ("/job",), False),
        (("/docker/1",), ("/system.slice/containerd.service",), False),
        (("/", "/user.slice/a"), ("/", "/user.slice/a"), True),
        (("/", "/user.slice/a"), ("/", "/system.slice/b"), False),
        (("/job",), ("/job", "/x"), False),
        ((), (), True),
    ],
)
def test_where_a_job_ends(inner: tuple[str, ...], outer: tuple[str, ...], expected: bool) -> None:
    assert same_job(inner, outer) is expected


def test_places() -> None:
    assert places("9:name=systemd:/a\n4:memory:/m\n0::/b (deleted)\n") == ("/b", "/a")
