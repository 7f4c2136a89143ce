"""The quickstart's story: one unchanged report against a far host, first without Sidecar, then with it.

Started by scripts/quickstart as root. Everything it makes is its own and is undone at the end, whatever
happens, but for the page, which is left running with its records until `scripts/quickstart --stop`.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import NoReturn

import page
import screen
from approver import Approver
from evidence import collect, tampered_copy_is_refused
from far_host import FarHost, FarHostError
from issuer import issue_token
from story import Story

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
REPORT = HERE.parent / "nightly-report.sh"
SIDECAR = str(Path(sys.executable).with_name("sidecar"))
STATES = Path("/var/lib/sidecar")
SECRETS = ("078-05-1120", "219-09-9999", "457-55-5462", "ada@example.org")
"""Of the far host's data: masked, so that neither the report nor any record may hold them."""
REPORT_TIMEOUT_S = 420.0  # with software emulation; a second or two otherwise


def note(text: str) -> None:
    print(f"quickstart: {text}", file=sys.stderr, flush=True)


def make_state() -> Path:
    """A directory of this run: configuration, keys, records. Others may pass through it, not read it."""
    STATES.mkdir(mode=0o755, parents=True, exist_ok=True)
    state = Path(tempfile.mkdtemp(prefix=page.STATE_PREFIX, dir=STATES))
    state.chmod(0o711)
    (state / "pid").write_text(str(os.getpid()))
    key = state / "hash.key"
    key.touch(mode=0o600)
    key.write_text(secrets.token_hex(32))
    return state


def write_configuration(state: Path, collector: str) -> Path:
    template = (HERE / "sidecar.yaml").read_text()
    config = state / "sidecar.yaml"
    config.write_text(template.replace("{state}", str(state)).replace("{collector}", collector))
    shutil.copy(HERE / "policy.yaml", state / "policy.yaml")
    return config


def run_report(argv: list[str], environment: dict[str, str]) -> str:
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            timeout=REPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")  # bytes, whatever `text` says
        raise FarHostError(
            f"{argv[-1]} did not end within {REPORT_TIMEOUT_S:.0f} s:\n{said[-4000:]}"
        ) from error
    if done.returncode != 0:
        raise FarHostError(f"{' '.join(argv[-2:])} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def measured(output: str) -> dict[str, float]:
    """The loop's last line; before it there may be warnings, which are for the person."""
    lines = output.splitlines()
    for line in lines[:-1]:
        note(line)
    try:
        medians: dict[str, float] = json.loads(lines[-1])
    except (ValueError, IndexError) as error:
        raise FarHostError(f"the loop printed no medians:\n{output[-2000:]}") from error
    return medians


def tell(state: Path, with_page: bool) -> Story:
    story = Story(state)
    with ExitStack() as undo:
        far = FarHost(state, state / "jwks.json")
        undo.callback(far.remove)
        token = issue_token(far.jwks_file)
        note("starting a far host: PostgreSQL and an HTTP API in a network namespace")
        far.start()
        collector = page.start(state)
        if not with_page:
            undo.callback(page.stop, state)
        config = write_configuration(state, collector.address)
        environment = {**os.environ, **far.environment(), "SIDECAR_ID_TOKEN": token}
        loop = [sys.executable, str(HERE / "loop.py")]
        steered = [SIDECAR, "exec", "-c", str(config), "--"]

        note("the nightly report, without Sidecar")
        story.direct = run_report(far.seen_from_here([str(REPORT)]), environment)
        story.direct_loop = measured(run_report(far.seen_from_here(loop), environment))
        far.reset()

        note("the same report, steered; somebody approves what waits")
        story.approver = undo.enter_context(Approver(SIDECAR))
        story.steered = run_report(far.seen_from_here([*steered, str(REPORT)]), environment)
        story.approver.stop()
        story.steered_loop = measured(run_report(far.seen_from_here([*steered, *loop]), environment))
        story.server_saw = far.application_name()

        note("looking at what was recorded")
        audit = state / "audit"
        story.evidence = collect(SIDECAR, audit, must_not_appear=(token, far.password, *SECRETS))
        story.verified = verify(audit)
        story.refused = tampered_copy_is_refused(SIDECAR, audit, state / "altered")
        story.leaked = [secret for secret in SECRETS if secret in story.steered]
        story.traces = traces()
        for name, output in (("direct", story.direct), ("steered", story.steered)):
            (state / f"report-{name}.txt").write_text(output)
        screen.show(story)
        if with_page:
            screen.show_page(collector, state, story.denied_record())
    return story


def verify(audit: Path) -> str:
    done = subprocess.run(
        [SIDECAR, "audit", "verify", str(audit)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise FarHostError(f"the audit does not verify:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def traces() -> list[str]:
    """What instances that no longer run have left in the kernel."""
    from sidecar.control.client import discover
    from sidecar.kernel.steering import traces as all_traces

    live = {entry.instance for entry in discover()}
    return [trace for trace in all_traces() if not any(name in trace for name in live)]


def run_in_terminal(argv: list[str], environment: dict[str, str]) -> int:
    """The command has the terminal, its keys too: Ctrl-C is for it to act on (psql goes on), and what ends us is
    handed on, so that it ends as it would alone."""
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda *_: None)  # a handler, which ends with exec; ignoring would be inherited
    process = subprocess.Popen(argv, env=environment)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: process.send_signal(number))
    status = process.wait()
    return status if status >= 0 else 128 - status


def steer(state: Path, command: list[str], with_page: bool) -> int:
    """One command of the caller's, on the quickstart's configuration. Its exit status."""
    collector = page.start(state)
    config = write_configuration(state, collector.address)
    token = issue_token(state / "jwks.json")
    environment = {**os.environ, "SIDECAR_ID_TOKEN": token}
    status = run_in_terminal([SIDECAR, "exec", "-c", str(config), "--", *command], environment)
    if with_page:
        screen.show_page(collector, state, file=sys.stderr)
    return status


def give_back() -> None:
    """What Python compiled while we were root belongs to the checkout's owner, who could not remove it otherwise."""
    owner = CHECKOUT.stat()
    if owner.st_uid == 0:
        return
    for directory in (CHECKOUT / "sidecar", CHECKOUT / "examples"):
        for cache in directory.rglob("__pycache__"):
            for path in (cache, *cache.iterdir()):
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


class Arguments(argparse.ArgumentParser):
    """Says what is wrong as all our commands do."""

    def error(self, message: str) -> NoReturn:
        print(f"quickstart: error: {message}\n  hint: scripts/quickstart -- CMD…, or --help", file=sys.stderr)
        raise SystemExit(2)


def _split(words: list[str]) -> tuple[list[str], list[str] | None]:
    """Our own arguments, and the command after the first `--`, which may hold a `--` of its own; None without `--`."""
    if "--" not in words:
        return words, None
    at = words.index("--")
    return words[:at], words[at + 1 :]


def main() -> int:
    parser = Arguments(prog="quickstart", usage="scripts/quickstart [--no-page | --stop [STATE]] [-- CMD…]")
    parser.add_argument("--no-page", action="store_true", help="do not leave the page running")
    parser.add_argument(
        "--stop", nargs="?", const="", metavar="STATE", help="stop pages and remove what quickstarts left"
    )
    arguments, command = _split(sys.argv[1:])
    options = parser.parse_args(arguments)
    if command is not None and not command:
        parser.error("there is no command after --")
    if options.stop is not None:
        for line in page.stop_all(STATES, only=options.stop):
            print(line)
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    state = make_state()
    kept = False
    try:
        if command:
            kept = not options.no_page
            return steer(state, command, kept)
        story = tell(state, not options.no_page)
        kept = not options.no_page
        return 1 if story.failures() else 0
    except FarHostError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        (state / "pid").unlink(missing_ok=True)
        if not kept:
            page.stop(state)
            shutil.rmtree(state, ignore_errors=True)
        give_back()


if __name__ == "__main__":
    sys.exit(main())
