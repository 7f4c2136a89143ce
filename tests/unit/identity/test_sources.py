"""Tokens are found in the job's own context, and a job cannot make the supervisor read what it could not read
itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.attribution.resolver import Resolver
from sidecar.config import EnvSource, FileSource, SourceDocument
from sidecar.errors import IdentityError
from sidecar.identity.sources import TokenFinder, WorkloadContext, expand_path
from sidecar.identity.token_file import only_root_placed
from tests.support.job_process import job, job_below, scratch, seen

ALICE, BOB = 61001, 61002

ENV = (SourceDocument(env=EnvSource("SIDECAR_ID_TOKEN")),)


_CHROOTED = """
import os, sys
os.chroot(sys.argv[1])
os.chdir("/")
sys.stdout.write("r")
sys.stdout.flush()
sys.stdin.read()
"""


def file_source(path: Path | str) -> tuple[SourceDocument, ...]:
    return (SourceDocument(file=FileSource(str(path))),)


def context_of(pid: int, uid: int = 0, gid: int | None = None) -> WorkloadContext:
    return Resolver().resolve(seen(pid, uid=uid, gid=uid if gid is None else gid)).context


def found(sources: tuple[SourceDocument, ...], context: WorkloadContext) -> str | None:
    token = TokenFinder(sources).find(context, 2.0)
    return token.token.reveal() if token else None


def refused(sources: tuple[SourceDocument, ...], context: WorkloadContext) -> str:
    with pytest.raises(IdentityError) as caught:
        TokenFinder(sources).find(context, 2.0)
    return caught.value.reason


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch(Path("/run")) as directory:
        yield directory


def write(path: Path, text: str, *, uid: int = 0, mode: int = 0o600) -> Path:
    path.write_text(text)
    os.chown(path, uid, uid)
    path.chmod(mode)
    return path


# -- the environment


def test_from_the_jobs_own_environment() -> None:
    with job(env={"SIDECAR_ID_TOKEN": " token-of-job\n"}) as pid:
        assert found(ENV, context_of(pid)) == "token-of-job"


def test_never_from_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is set before the child starts with an empty one; our own ancestors have none either."""
    monkeypatch.setenv("SIDECAR_ID_TOKEN", "of-the-agent")
    with job() as pid:
        context = context_of(pid)
        assert found(ENV, WorkloadContext(context.pids[:1], 0, context.environ)) is None


def test_from_an_ancestor_where_the_process_has_none() -> None:
    with job_below(env={"SIDECAR_ID_TOKEN": "of-the-parent"}) as (child, parent):
        context = context_of(child)
        assert context.pids[:2] == (child, parent)
        assert context.environ.get("SIDECAR_ID_TOKEN") is None
        assert found(ENV, context) == "of-the-parent"


def test_an_ancestors_reused_pid_is_not_read() -> None:
    with job_below(env={"SIDECAR_ID_TOKEN": "of-the-parent"}) as (child, parent):
        context = WorkloadContext((child, parent), 0, {}, starts=(1, 1))
        assert found(ENV, context) is None


@pytest.mark.root
def test_the_first_source_that_yields_wins(tmp_path: Path) -> None:
    write(tmp_path / "token", "from-file")
    both = (*ENV, *file_source(tmp_path / "token"))
    with job(env={"SIDECAR_ID_TOKEN": "from-env"}) as pid:
        assert found(both, context_of(pid)) == "from-env"
    with job(env={"SIDECAR_ID_TOKEN": "  "}) as pid:
        assert found(both, context_of(pid)) == "from-file"


def test_a_token_that_is_too_large_is_refused_and_not_passed_over() -> None:
    with job(env={"SIDECAR_ID_TOKEN": "x" * 70_000}) as pid:
        assert refused(ENV, context_of(pid)) == "too_large"


def test_the_context_shows_no_environment() -> None:
    with job(env={"SIDECAR_ID_TOKEN": "hunter2"}) as pid:
        assert "hunter2" not in repr(context_of(pid))


# -- files


@pytest.mark.root
def test_a_file_by_uid(place: Path) -> None:
    for uid in (ALICE, BOB):
        write(place / str(uid), f"token-of-{uid}", uid=uid)
        with job(uid=uid) as pid:
            assert found(file_source(place / "{uid}"), context_of(pid, uid)) == f"token-of-{uid}"


@pytest.mark.root
def test_a_file_that_the_job_may_not_read_itself(place: Path) -> None:
    """A broker's token in a directory that only root enters: the script never holds it."""
    place.chmod(0o700)
    write(place / str(ALICE), "never-held")
    with job(uid=ALICE) as pid:
        assert found(file_source(place / "{uid}"), context_of(pid, ALICE)) == "never-held"


@pytest.mark.root
def test_a_missing_file_is_no_error(place: Path) -> None:
    place.chmod(0o700)
    with job(uid=ALICE) as pid:
        context = context_of(pid, ALICE)
        for path in (place / "{uid}", place / "{uid}" / "deeper", Path("/nowhere/at/all")):
            assert found(file_source(path), context) is None


@pytest.mark.root
@pytest.mark.parametrize("owner_mode", [(BOB, 0o600), (0, 0o600), (BOB, 0o644)])
def test_a_link_to_a_strangers_token_gains_nothing(place: Path, owner_mode: tuple[int, int]) -> None:
    owner, mode = owner_mode
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    write(closed / "bob", "token-of-bob", uid=owner, mode=mode)
    home = place / "alice"
    home.mkdir()
    os.chown(home, ALICE, ALICE)
    link = home / "token"
    link.symlink_to(closed / "bob")
    os.lchown(link, ALICE, ALICE)
    with job(uid=ALICE) as pid:
        assert refused(file_source(link), context_of(pid, ALICE)) == "source_unsafe"


@pytest.mark.root
def test_a_root_file_in_a_users_place_is_not_read_as_root(place: Path) -> None:
    """Alice cannot read it, and her directory decides what stands there."""
    home = place / "alice"
    home.mkdir()
    os.chown(home, ALICE, ALICE)
    write(home / "token", "secret-of-root")
    with job(uid=ALICE) as pid:
        assert refused(file_source(home / "token"), context_of(pid, ALICE)) == "source_unsafe"


@pytest.mark.root
def test_supplementary_groups_count_and_ours_do_not(place: Path) -> None:
    shared = write(place / "shared", "group-token")
    os.chown(shared, 0, 61050)
    shared.chmod(0o640)
    home = place / "home"
    home.mkdir()
    os.chown(home, ALICE, ALICE)
    link = home / "link"
    link.symlink_to(shared)
    with job(uid=ALICE, groups=(61050,)) as pid:
        assert found(file_source(link), context_of(pid, ALICE)) == "group-token"
    os.chown(shared, 0, 0)
    with job(uid=ALICE) as pid:
        assert refused(file_source(link), context_of(pid, ALICE)) == "source_unsafe"


@pytest.mark.root
def test_our_own_identity_is_the_same_afterwards(place: Path) -> None:
    before = Path("/proc/thread-self/status").read_text().split("Groups:")[1].split("\n")[0]
    write(place / str(ALICE), "x", uid=ALICE)
    with job(uid=ALICE) as pid:
        found(file_source(place / "{uid}"), context_of(pid, ALICE))
    status = Path("/proc/thread-self/status").read_text()
    assert "Uid:\t0\t0\t0\t0" in status
    assert "Gid:\t0\t0\t0\t0" in status
    assert status.split("Groups:")[1].split("\n")[0] == before
    assert write(place / "root-only", "y").read_text() == "y"


@pytest.mark.root
def test_other_threads_keep_theirs_meanwhile(place: Path) -> None:
    """setfsuid and the groups are of one thread: a neighbour that reads as root all the while never fails."""
    write(place / str(ALICE), "x", uid=ALICE)
    secret = write(place / "root-only", "y")
    stop, failures = threading.Event(), []

    def neighbour() -> None:
        while not stop.is_set():
            try:
                secret.read_text()
            except OSError as error:
                failures.append(error)

    thread = threading.Thread(target=neighbour)
    thread.start()
    with job(uid=ALICE) as pid:
        context = context_of(pid, ALICE)
        for _ in range(200):
            assert found(file_source(place / "{uid}"), context) == "x"
    stop.set()
    thread.join()
    assert failures == []


@pytest.mark.root
@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "stranger's", "world-writable"])
def test_what_is_no_safe_file(place: Path, kind: str) -> None:
    path = place / "token"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "directory":
            path.mkdir()
        case "stranger's":
            write(path, "x", uid=BOB, mode=0o644)
        case "world-writable":
            write(path, "x", mode=0o666)
    with job(uid=ALICE) as pid:
        assert refused(file_source(path), context_of(pid, ALICE)) == "source_unsafe"


@pytest.mark.root
def test_a_file_that_is_too_large(place: Path) -> None:
    write(place / "token", "x" * 70_000)
    with job() as pid:
        assert refused(file_source(place / "token"), context_of(pid)) == "too_large"


@pytest.mark.root
@pytest.mark.parametrize(
    "target", ["/token-of-host", "../../../../../../token-of-host", "/proc/self/root/token-of-host"]
)
def test_a_link_does_not_lead_out_of_a_jobs_root(place: Path, target: str) -> None:
    """The job is in a chroot; on the host there is a token at the place that its link names."""
    jail = place / "jail"
    (jail / "run").mkdir(parents=True)
    (jail / "run" / "token").symlink_to(target.replace("/token-of-host", f"{place}/token-of-host"))
    write(place / "token-of-host", "stolen", mode=0o644)
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _CHROOTED, str(jail)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"r"
        own = WorkloadContext((process.pid,), 0, {})
        assert found(file_source("/run/token"), own) is None
        (jail / "run" / "token").unlink()
        write(jail / "run" / "token", "of-the-jail")
        assert found(file_source("/run/token"), own) == "of-the-jail"
    finally:
        process.communicate(timeout=10)


def test_a_process_that_is_gone() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert found(file_source("/etc/hostname"), WorkloadContext((process.pid,), 0, {})) is None


# -- templates


def test_placeholders() -> None:
    assert expand_path("/run/t/{uid}.{gid}.{pid}", 7, 8, 9) == "/run/t/8.9.7"
    assert expand_path("/home/{user}/token", 7, 0, 0) == "/home/root/token"
    assert expand_path("/home/{user}/token", 7, 3_999_999_999, 0) is None
    assert expand_path("/run/{other}", 7, 8, 9) == "/run/{other}"


@pytest.mark.parametrize("name", ["../root", "a/b", "", ".", "..", "a\0b", "{uid}", "-x y"])
def test_a_users_name_cannot_leave_the_template(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import pwd

    record = pwd.struct_passwd((name, "x", 1, 1, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: record)
    assert expand_path("/home/{user}/token", 1, 1, 1) is None


@pytest.mark.root
def test_who_decides_what_a_path_means(place: Path) -> None:
    assert only_root_placed(str(place))
    assert not only_root_placed("/tmp/x")
    (place / "to-tmp").symlink_to("/tmp")
    assert not only_root_placed(str(place / "to-tmp"))
    (place / "loop").symlink_to(place / "loop")
    assert not only_root_placed(str(place / "loop"))
    write(place / "file", "x", uid=ALICE)
    assert only_root_placed(str(place / "file"))
    theirs = place / "theirs"
    theirs.symlink_to("/etc/hostname")
    os.lchown(theirs, ALICE, ALICE)
    assert not only_root_placed(str(theirs))
