"""README's first command, as a person runs it: everything it promises holds, and it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.servers, pytest.mark.slow, pytest.mark.timeout(300)]

QUICKSTART = Path(__file__).resolve().parents[2] / "scripts" / "quickstart"
STATES = Path("/var/lib/sidecar")
SCREEN_LINES = 52
SECRETS = ("219-09-9999", "grace@example.org")


def _far_hosts() -> set[str]:
    return {path.name for path in Path("/run/netns").glob("sidecar-far-*")}


def _states() -> set[Path]:
    return set(STATES.glob("quickstart-*"))


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = _far_hosts(), _states()
    yield
    assert (_far_hosts() - before[0], _states() - before[1]) == (set(), set())


def test_everything_it_promises_holds() -> None:
    done = subprocess.run(
        [QUICKSTART, "--no-page"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) <= SCREEN_LINES, done.stdout
    for part in ("no-schema-changes", "no-unfiltered-deletes", "orders: 240", "read-only-api", "DELETE 1"):
        assert part in done.stdout, done.stdout
    # Once without Sidecar, never with it.
    for secret in SECRETS:
        assert done.stdout.count(secret) <= 2, done.stdout


def test_a_command_of_ones_own_keeps_its_arguments_and_status() -> None:
    done = subprocess.run(
        [QUICKSTART, "--no-page", "--", "sh", "-c", 'echo "$@"; exit 7', "sh", "--", "-x", "a b"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (7, "-- -x a b\n"), done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_quickstart_leaves_nothing(number: signal.Signals) -> None:
    before = _far_hosts()
    process = subprocess.Popen(
        [QUICKSTART, "--no-page"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not _far_hosts() - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _far_hosts() - before
    time.sleep(0.5)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0, said
