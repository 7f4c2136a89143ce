"""After `sidecar exec` has returned nothing of it is left: on a busy machine, whatever the command leaves behind, and whenever
its inspector, or all of it, is killed while it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.kernel import cgroups, removal, run_state, steering

pytestmark = pytest.mark.root

SIDECAR = str(Path(sys.executable).parent / "sidecar")
COMMANDS = {
    "plain": ["true"],
    "ends itself while its threads run": [
        sys.executable, "-c",
        "import os, threading, time\nfor _ in range(20): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\nos._exit(0)",
    ],
    "children that are just ending": ["sh", "-c", "for i in 1 2 3 4; do (sleep 0.05) & done"],
    "children that fork on and on": ["sh", "-c", "(trap '' TERM; while :; do sleep 0.01; done) & true"],
}  # fmt: skip
KILL_AFTER_S = (0.0, 0.15, 0.35, 0.6, 0.9, 1.4)
CRASH_AFTER_S = tuple(tenth / 10 for tenth in range(17))


@pytest.fixture
def busy() -> Iterator[None]:
    """Two processes that compute, for as long as a test takes."""
    code = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    processes = [subprocess.Popen(["nice", "-n", "5", sys.executable, "-c", code]) for _ in range(2)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture
def before() -> set[str]:
    """Instances that are none of this test's."""
    return set(removal.known_instances())


def begin(directory: Path, command: list[str]) -> subprocess.Popen[str]:
    config = directory / "sidecar.yaml"
    config.write_text(f"audit: {{directory: {directory}/audit}}\n")
    return subprocess.Popen(
        [SIDECAR, "exec", "-c", str(config), "--", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left(before: set[str]) -> list[str]:
    names = [name for name in removal.known_instances() if name not in before]
    found = [trace for name in names for trace in (f"run directory {name}", *steering.traces(name))]
    if not removal.known_instances() and os.path.ismount(run_state.BPF_DIRECTORY):
        found.append("the file system of the pinned map")
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_on_a_busy_machine(name: str, busy: None, before: set[str], tmp_path: Path) -> None:
    """Two beside each other: the last to end takes with it what they share."""
    running = []
    for number in range(2):
        directory = tmp_path / str(number)
        directory.mkdir()
        running.append(begin(directory, COMMANDS[name]))
    for process in running:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert "Traceback" not in said
        assert "stopping," not in said
    assert left(before) == []


def inspector_of(front: int) -> int:
    """The process that the front has forked off, as soon as there is one."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        children = Path(f"/proc/{front}/task/{front}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.005)
    pytest.fail("no inspector was started")


@pytest.mark.parametrize("delay_s", KILL_AFTER_S)
def test_the_inspector_is_killed_while_it_starts(delay_s: float, before: set[str], tmp_path: Path) -> None:
    process = begin(tmp_path, ["sleep", "0.2"])
    inspector = inspector_of(process.pid)
    time.sleep(delay_s)
    try:
        os.kill(inspector, signal.SIGKILL)
    except ProcessLookupError:
        assert delay_s > 1
    said, _ = process.communicate(timeout=60)
    assert process.returncode in (0, 125), said
    assert left(before) == [], said


@pytest.mark.parametrize("delay_s", CRASH_AFTER_S)
def test_down_removes_what_a_crash_of_all_of_it_leaves(
    delay_s: float, busy: None, before: set[str], tmp_path: Path
) -> None:
    process = begin(tmp_path, ["sleep", "30"])
    inspector = inspector_of(process.pid)
    time.sleep(delay_s)
    os.kill(process.pid, signal.SIGKILL)
    os.kill(inspector, signal.SIGKILL)
    process.communicate(timeout=60)  # until nobody holds its output: the workers have ended as well
    down = subprocess.run([SIDECAR, "down", "--dead"], capture_output=True, text=True, timeout=60, check=True)
    assert left(before) == [], down.stdout
    assert subprocess.run(["pgrep", "-f", f"{tmp_path}"], capture_output=True, check=False).returncode == 1


def test_a_busy_start_is_not_taken_for_dead(before: set[str]) -> None:
    instance = os.urandom(4).hex()
    inspector, _ = cgroups.create(instance)
    starting = subprocess.Popen(["sleep", "30"])
    try:
        cgroups.move(starting.pid, inspector)
        assert not removal.has_ended(instance)
        starting.kill()
        starting.wait()
        assert removal.has_ended(instance)
    finally:
        starting.kill()
        starting.wait()
        removal.remove_all(instance)
    assert left(before) == []


def test_what_starts_says_who_it_is_before_it_makes_anything(before: set[str]) -> None:
    """A crash at any point is known to be one: by the state's process, not by what else may still live in the cgroup."""
    instance = os.urandom(4).hex()
    code = f"from sidecar.kernel import run_state; run_state.save({instance!r}); print('saved', flush=True); input()"
    starting = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert starting.stdout is not None
        assert starting.stdout.readline() == b"saved\n"
        inspector, _ = cgroups.create(instance)
        with subprocess.Popen(["sleep", "30"]) as child:  # as its compiler, or a worker that is just ending
            cgroups.move(child.pid, inspector)
            assert removal.remove_all(ended_only=True) == []
            starting.kill()
            starting.wait()
            assert removal.has_ended(instance)
            assert removal.remove_all(ended_only=True) != []
            assert child.wait(timeout=5) == -signal.SIGKILL
    finally:
        starting.kill()
        starting.communicate()
        removal.remove_all(instance)
    assert left(before) == []


def test_the_compiler_dies_with_whoever_wanted_the_hooks(tmp_path: Path) -> None:
    """Also where that had died before it could ask to be told."""
    command = [sys.executable, "-m", "sidecar.kernel.loader", "0", str(tmp_path / "owners"), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (1, "the process that wanted the hooks is gone\n")

    code = "import subprocess, sys, os; p = subprocess.Popen([*sys.argv[1:], str(os.getpid())]); print(p.pid, flush=True); p.wait()"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, *command[:-1]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + 20
    while (
        "clang" not in Path(f"/proc/{child}/maps").read_text()
    ):  # bcc is being imported: it has asked to be told
        assert time.monotonic() < deadline
    os.kill(child, signal.SIGSTOP)  # it does not end by itself
    parent.kill()
    parent.communicate()
    while run_state.start_ticks(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)
