"""`sidecar exec` around the command, with real processes, cgroups and terminals; without steering."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.launch import processes
from tests.support.job_cgroup import job_cgroup
from tests.support.terminal import terminal

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[3]
DRIVER = [sys.executable, "-m", "tests.support.exec_driver"]


@pytest.fixture
def cgroup() -> Iterator[Path]:
    with job_cgroup() as directory:
        yield directory


def run(
    cgroup: Path, *argv: str, extra: tuple[str, ...] = (), **options: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [*DRIVER, str(cgroup), *extra, "--", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        **options,
    )


def wait_until(condition: object, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def command_pid(cgroup: Path) -> int:
    wait_until(lambda: processes(cgroup))
    return processes(cgroup)[0]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children_of(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def comm_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -TERM $$"], 128 + 15),
        (["sh", "-c", "kill -KILL $$"], 128 + 9),
        (["no-such-program-anywhere"], 127),
        (["./no/such/file"], 127),
        (["/etc/passwd"], 126),
        (["/"], 126),
    ],
)
def test_exit_status(cgroup: Path, argv: list[str], status: int) -> None:
    done = run(cgroup, *argv)
    assert done.returncode == status
    assert (status in (126, 127)) == (argv[0] in done.stderr)


def test_without_cgroup_nothing_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    done = run(tmp_path / "no-such-cgroup", "touch", str(mark))
    assert done.returncode == 125
    assert "was not started: joining the cgroup" in done.stderr
    assert not mark.exists()


def test_command_is_in_its_cgroup_before_it_runs(cgroup: Path) -> None:
    done = run(cgroup, "cat", "/proc/self/cgroup")
    assert f"0::/{cgroup.parent.name}/job" in done.stdout.splitlines()


def test_script_without_interpreter_line_runs(cgroup: Path, tmp_path: Path) -> None:
    script = tmp_path / "plain"
    script.write_text("echo from $1\n")
    script.chmod(0o755)
    assert run(cgroup, str(script), "sh").stdout == "from sh\n"


def test_streams_descriptors_environment_and_signals_are_the_callers(cgroup: Path) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as out:
        out.write("through a descriptor")
    try:
        done = run(
            cgroup,
            "sh",
            "-c",
            f"cat; cat /dev/fd/{reader}; echo; echo $GIVEN $OWN; echo err >&2; grep -E '^Sig(Blk|Ign)' /proc/self/status",
            extra=("GIVEN=by-us", "OWN=by-us"),
            input="typed\n",
            pass_fds=(reader,),
            env={**os.environ, "OWN": "by-the-caller"},
        )
    finally:
        os.close(reader)
    plain = subprocess.run(
        ["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"typed\nthrough a descriptor\nby-us by-the-caller\n{plain.stdout}"
    assert done.stderr == "err\n"


def test_background_processes_are_ended_and_named(cgroup: Path) -> None:
    started = time.monotonic()
    # Both have become what they are: until then they are still called sh.
    run_by = "until grep -q sleep /proc/$a/comm && grep -q sleep /proc/$b/comm; do sleep 0.02; done"
    program = f"sleep 300 & a=$!; setsid sleep 301 & b=$!; {run_by}; exit 3"
    done = run(cgroup, "sh", "-c", program)
    assert done.returncode == 3
    assert "ending 2 processes that the command left behind" in done.stderr
    assert "sleep" in done.stderr
    assert not processes(cgroup)
    assert time.monotonic() - started < 10


def test_background_process_that_ignores_sigterm_is_killed(cgroup: Path) -> None:
    code = "import signal,time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
    done = run(
        cgroup,
        "sh",
        "-c",
        f'{sys.executable} -c "{code}" >{cgroup.parent.name}.tmp & while ! test -s {cgroup.parent.name}.tmp; do sleep 0.05; done; rm {cgroup.parent.name}.tmp',
        env={**os.environ, "SIDECAR_TEST_GRACE": "0.3"},
    )
    assert done.returncode == 0
    assert not processes(cgroup)


def test_sigterm_is_passed_on(cgroup: Path) -> None:
    with subprocess.Popen(
        [
            *DRIVER,
            str(cgroup),
            "--",
            "sh",
            "-c",
            "trap 'echo told; exit 9' TERM; echo ready; while :; do sleep 0.1; done",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as front:
        assert front.stdout is not None
        assert front.stdout.readline() == "ready\n"
        front.terminate()
        assert front.stdout.readline() == "told\n"
        assert front.wait(15) == 9


def test_when_the_front_is_killed_the_command_is_ended(cgroup: Path) -> None:
    with subprocess.Popen(
        [*DRIVER, str(cgroup), "--", "sleep", "300"], cwd=ROOT, stderr=subprocess.PIPE
    ) as front:
        pid = command_pid(cgroup)
        assert parent_of(pid) == front.pid
        front.kill()
        wait_until(lambda: not processes(cgroup))


def test_when_the_inspector_is_killed_the_command_goes_on(cgroup: Path) -> None:
    done = run(
        cgroup,
        "sh",
        "-c",
        "sleep 1.5; sleep 300 & exit 4",
        env={**os.environ, "SIDECAR_TEST_DIE": "inspector"},
    )
    assert done.returncode == 4
    assert "the inspector died" in done.stderr
    assert not processes(cgroup)


def test_ctrl_c_reaches_the_command_only(cgroup: Path) -> None:
    script = "trap 'echo told; exit 5' INT; echo ready; while :; do sleep 0.1; done"
    with terminal([*DRIVER, str(cgroup), "--", "sh", "-c", script], cwd=str(ROOT)) as tty:
        tty.expect("ready")
        tty.type("\x03")
        tty.expect("told")
        assert tty.wait() == 5


def test_ctrl_c_stops_the_calling_script_as_without_us(cgroup: Path) -> None:
    line = " ".join([*DRIVER, str(cgroup), "--", "sh", "-c", "'echo ready; exec sleep 300'"])
    with terminal(["bash", "-c", f"{line}; echo survived"], cwd=str(ROOT)) as tty:
        tty.expect("ready")
        time.sleep(0.1)
        tty.type("\x03")
        assert tty.wait() == -signal.SIGINT
        assert "survived" not in tty.seen
    assert not processes(cgroup)


def test_ctrl_z_and_fg(cgroup: Path) -> None:
    bash = ["bash", "--norc", "--noprofile", "-i"]
    with terminal(bash, cwd=str(ROOT), environ={**os.environ, "PS1": "prompt> "}) as tty:
        tty.expect("prompt> ")
        tty.type(" ".join([*DRIVER, str(cgroup), "--", "cat"]) + "\n")
        pid = command_pid(cgroup)
        front = parent_of(pid)
        inspector = next(child for child in children_of(front) if child != pid)
        tty.type("hello\n")
        tty.expect("hello\r\nhello")
        tty.type("\x1a")
        tty.expect("Stopped")
        tty.expect("prompt> ")
        assert state_of(pid) == "T"
        assert state_of(inspector) in "RS"
        tty.type("fg\n")
        wait_until(lambda: state_of(pid) == "S")
        tty.type("again\n")
        tty.expect("again\r\nagain")
        tty.type("\x04")
        tty.expect("prompt> ")
        tty.type("exit $?\n")
        assert tty.wait() == 0


def test_window_size_and_job_control_of_an_inner_shell(cgroup: Path) -> None:
    inner = ["bash", "--norc", "--noprofile", "-i"]
    with terminal(
        [*DRIVER, str(cgroup), "--", *inner], cwd=str(ROOT), environ={**os.environ, "PS1": "inner> "}
    ) as tty:
        tty.expect("inner> ")
        tty.resize(40, 133)
        tty.type("stty size\n")
        tty.expect("40 133")
        tty.type("sleep 300\n")
        wait_until(lambda: "sleep" in [comm_of(pid) for pid in processes(cgroup)])
        tty.type("\x1a")
        tty.expect("Stopped")
        tty.type("fg\n")
        sleeper = next(pid for pid in processes(cgroup) if comm_of(pid) == "sleep")
        wait_until(lambda: state_of(sleeper) == "S")
        tty.type("\x03")
        wait_until(lambda: sleeper not in processes(cgroup))
        tty.type("exit 6\n")
        assert tty.wait() == 6


def test_invoking_user_behind_sudo(cgroup: Path, tmp_path: Path) -> None:
    """A program named sudo above us, as `sudo -u root` leaves it: SUDO_UID set, its own environment the caller's."""
    sudo = tmp_path / "sudo"
    shutil.copy("/bin/dash", sudo)
    tmp_path.chmod(0o755)
    show = "id -u; id -g; id -G; echo $HOME $CALLERS $ON_TOP ${SUDO_UID-none}"
    inner = " ".join(
        [
            "env",
            "-i",
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME=/root",
            "SUDO_UID=65534",
            "SUDO_GID=65534",
            "ON_TOP=given",
        ]
        + [*DRIVER, str(cgroup), "--", "sh", "-c", f"'{show}'"]
    )
    done = subprocess.run(
        [str(sudo), "-c", f"{inner}; exit $?"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/home/caller", "CALLERS": "secret"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stdout.splitlines() == ["65534", "65534", "65534", "/home/caller secret given none"]
    assert done.returncode == 0


def test_plain_root_stays_root(cgroup: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SUDO_")}
    assert run(cgroup, "id", "-u", env=environ).stdout == "0\n"


def test_ignored_signals_stay_ignored(cgroup: Path) -> None:
    """As for `nohup sidecar exec …`."""

    def ignore_hangup() -> None:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    done = run(cgroup, "sh", "-c", "kill -HUP $$; echo alive", preexec_fn=ignore_hangup)
    assert done.stdout == "alive\n"
