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

from sidecar.kernel import cgroups, removal, steering

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
    return [trace for name in names for trace in (f"run directory {name}", *steering.traces(name))]


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


@pytest.mark.parametrize("delay_s", KILL_AFTER_S[::2])
def test_down_removes_what_a_crash_of_all_of_it_leaves(
    delay_s: float, before: set[str], tmp_path: Path
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
