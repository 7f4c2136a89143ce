"""Real processes as /proc shows them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.attribution import procfs
from tests.support.job_process import job


def test_a_process() -> None:
    with job("--name", "with blanks ü", env={"A": "1", "EMPTY": ""}) as pid:
        stat = procfs.read_stat(pid)
        assert stat is not None
        assert stat.ppid == os.getpid()
        assert stat.state in "SR"
        assert stat.session == os.getsid(0)
        assert procfs.raw_cmdline(pid)[-2:] == ("--name", "with blanks ü")
        assert procfs.exe(pid) == os.path.realpath(sys.executable)
        assert procfs.environ(pid)["A"] == "1"
        assert procfs.environ(pid)["EMPTY"] == ""
        assert procfs.netns(pid) == os.stat("/proc/self/ns/net").st_ino


def test_a_process_that_is_gone() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    pid = process.pid
    assert procfs.read_stat(pid) is None
    assert procfs.raw_cmdline(pid) == ()
    assert procfs.environ(pid) == {}
    assert procfs.exe(pid) == ""
    assert procfs.netns(pid) == 0
    assert procfs.cgroup_text(pid) == ""
    assert procfs.login_uid(pid) is None


def test_a_zombie_still_has_a_parent() -> None:
    process = subprocess.Popen(["true"])
    try:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        stat = procfs.read_stat(process.pid)
        assert stat is not None
        assert (stat.state, stat.ppid) == ("Z", os.getpid())
        assert procfs.environ(process.pid) == {}
    finally:
        process.wait()


@pytest.mark.parametrize("name", ["a) S 1 (b", "((((", "x y z", ")"])
def test_a_name_that_imitates_the_format(tmp_path: Path, name: str) -> None:
    program = tmp_path / name
    shutil.copy("/bin/sleep", program)
    process = subprocess.Popen([program, "30"])
    try:
        stat = procfs.read_stat(process.pid)
        assert stat is not None
        # between fork and exec the name is still ours; the parent is right in both
        assert stat.ppid == os.getpid()
        os.stat(f"/proc/{process.pid}/exe")
        assert procfs.read_stat(process.pid).comm == name[:15]  # type: ignore[union-attr]
    finally:
        process.kill()
        process.wait()


def test_an_executable_that_was_removed(tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copy("/bin/sleep", program)
    process = subprocess.Popen([program, "30"])
    try:
        program.unlink()
        assert procfs.exe(process.pid) == f"{program} (deleted)"
    finally:
        process.kill()
        process.wait()


def test_reads_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"x" * 300_000)
    assert len(procfs.read_bounded(str(big), 100_000)) == 100_000
    assert len(procfs.read_bounded(str(big), 1_000_000)) == 300_000
    arguments = tuple(f"a{number}" for number in range(3000))
    with job(*arguments, env={"FIRST": "1", "SECOND": "y" * 100}) as pid:
        assert len(procfs.raw_cmdline(pid)) == procfs.MAX_CMDLINE_ARGUMENTS
        monkeypatch.setattr(procfs, "MAX_ENVIRON_BYTES", 50)
        assert procfs.environ(pid) == {"FIRST": "1"}


def test_a_large_environment_is_read_whole() -> None:
    values = {f"V{number}": "x" * 60_000 for number in range(20)}
    with job(env={**values, "LAST": "1"}) as pid:
        assert procfs.environ(pid) == {**values, "LAST": "1"}


def test_the_first_of_two_entries_counts_as_for_getenv() -> None:
    assert procfs.parse_environ(b"A=1\0A=2\0=x\0B\0C=d=e\0") == {"A": "1", "C": "d=e"}
