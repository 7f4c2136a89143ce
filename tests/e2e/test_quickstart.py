"""README's first command, as a person runs it: everything it promises holds, and it leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.root, pytest.mark.servers, pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "scripts" / "quickstart"
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


@pytest.fixture(scope="module")
def shown() -> Iterator[str]:
    """What the first command prints, with its page left running until the module's end."""
    environment = {name: value for name, value in os.environ.items() if name != "SUDO_USER"}
    done = subprocess.run(
        [QUICKSTART],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        cwd=ROOT,
        env=environment,
    )
    state = re.search(r"^records +(/\S+)$", done.stdout, flags=re.M)
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        yield done.stdout
    finally:
        if state is not None:
            stopped = subprocess.run(
                [QUICKSTART, "--stop", state[1]], capture_output=True, text=True, check=False, timeout=60
            )
            assert stopped.stdout == f"stopped a page\nremoved {state[1]}\n"
            assert not Path(state[1]).exists()


def test_everything_it_promises_holds(shown: str) -> None:
    assert len(shown.splitlines()) <= SCREEN_LINES, shown
    for part in ("no-schema-changes", "no-unfiltered-deletes", "orders: 240", "read-only-api", "DELETE 1"):
        assert part in shown, shown
    assert "FAILED" not in shown
    # Once without Sidecar, never with it.
    for secret in SECRETS:
        assert shown.count(secret) <= 2, shown


def _shape(text: str) -> str:
    """What is the same in every run: words and their order, but no identifier, number, process or line's end."""
    text = re.sub(r"^( +process ).*", r"\1 TREE", text, flags=re.M)
    for pattern, name in (
        (r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "UUID"),
        (
            r"\s*\(UUID\)",
            "",
        ),  # the altered record's id is shown where the byte that was changed left it readable
        (r"quickstart-\w+", "STATE"),
        (r"\b(record|why|hold|approve) [0-9a-f]{8}\b", r"\1 ID"),
        (r"\b[0-9a-f]{8}…", "HASH"),
        (r"[+-]?\d+(\.\d+)? (µs|ms|s)\b", "TIME"),
        (r"[+-]?\d+(\.\d+)?", "N"),
    ):
        text = re.sub(pattern, name, text)
    return " ".join(text.split())


def test_the_readme_shows_what_it_prints(shown: str) -> None:
    begin, end = "<!-- transcript: begin -->\n```text\n", "```\n<!-- transcript: end -->"
    readme = (ROOT / "README.md").read_text()
    transcript = readme[readme.index(begin) + len(begin) : readme.index(end)]
    assert _shape(transcript) == _shape(shown)


def test_the_page_shows_what_the_screen_showed(shown: str) -> None:
    address = re.search(r"^page +(http://\S+)$", shown, flags=re.M)
    connections = re.search(r"records +\d+ of (\d+) connections", shown)
    assert address is not None
    assert connections is not None
    with httpx.Client(base_url=address[1], timeout=30, trust_env=False) as client:
        overview = client.get("/").text
        links = list(dict.fromkeys(re.findall(r'href="(/flows/[^"]+)"', overview)))
        pages = [client.get(link).text for link in links]
    assert len(links) == int(connections[1])
    everything = "\n".join(pages)
    for part in (
        "no-schema-changes: schema changes go through the migration job",
        "no-unfiltered-deletes: add a WHERE clause",
        "read-only-api",
        "orders: 240",
        "customer-deletes",
        "approved",
        "repo:shop/reports:ref:refs/heads/main",
        "nightly-report.sh",
        "*******1120",
        *re.findall(r"sidecar why ([0-9a-f]{8})", shown),
    ):
        assert part in everything, part
    for secret in (*SECRETS, "078-05-1120"):
        assert secret not in overview + everything


def test_why_as_it_says(shown: str) -> None:
    command = re.search(r"^why +(.*)$", shown, flags=re.M)
    assert command is not None
    done = subprocess.run(
        command[1].split(), capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "no-schema-changes" in done.stdout
    assert "DROP TABLE report_archive" in done.stdout


def test_the_keys_belong_to_the_command() -> None:
    """Ctrl-C is for it to act on, and a signal that ends us ends it the way it ends itself."""
    program = "trap 'echo interrupted' INT; trap 'echo ending; exit 5' TERM; echo ready; while :; do sleep 0.05; done"
    process = subprocess.Popen(
        [QUICKSTART, "--no-page", "--", "bash", "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)  # as a terminal sends it to all of the group
    time.sleep(0.3)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (5, "ending\n"), said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--nope",), "--nope"), (("ls",), "ls"), (("--",), "no command after --")],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_arguments(arguments: tuple[str, ...], words: str) -> None:
    done = subprocess.run([QUICKSTART, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "hint: scripts/quickstart -- CMD…" in done.stderr


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
