"""Every command from the outside: help, no arguments, wrong ones, nothing running, an agent running, another
user. Two lines say what failed and what to do; nothing ends in a traceback."""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from sidecar.cli import COMMANDS, cli, main
from sidecar.control import client
from sidecar.kernel import cgroups, run_state
from tests.support.control_agent import SmallAgent, run_directory, serving
from tests.support.other_user import ROOT

SIDECAR = Path(sys.executable).with_name("sidecar")
HOLD = "01a20d76-926c-7df1-a666-e3f3814d2abe"


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


Sidecar = Callable[..., Done]


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In the place of /run/sidecar, so that what runs on this machine is not seen."""
    with run_directory() as made:
        found = client.discover
        monkeypatch.setattr(client, "discover", lambda directory=made: found(made))
        monkeypatch.setattr(run_state, "RUN_DIRECTORY", made)
        monkeypatch.setattr(cgroups, "instances", list)
        yield made


@pytest.fixture
def sidecar(directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sidecar:
    """The entry point, in this process; an exception that nobody catches fails the test."""

    def call(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["sidecar", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Done(code or 0, said.out, said.err)

    return call


@pytest.fixture
def agent(directory: Path) -> Iterator[SmallAgent]:
    small = SmallAgent()
    with serving(small, directory):
        yield small


def _all_commands() -> list[tuple[str, ...]]:
    context = click.Context(cli)
    found: list[tuple[str, ...]] = []
    for name in COMMANDS:
        command = cli.get_command(context, name)
        found.append((name,))
        if isinstance(command, click.Group):
            found += [(name, inner) for inner in command.list_commands(context)]
    return found


@pytest.mark.parametrize("command", _all_commands(), ids=" ".join)
def test_help_of_every_command(sidecar: Sidecar, command: tuple[str, ...]) -> None:
    done = sidecar(*command, "--help")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"Usage: sidecar {' '.join(command)} ")
    assert sidecar(*command, "-h").out == done.out


@pytest.mark.parametrize("command", _all_commands(), ids=" ".join)
def test_an_unknown_option_of_every_command(sidecar: Sidecar, command: tuple[str, ...]) -> None:
    done = sidecar(*command, "--nope")
    assert (done.status, done.out) == (2, "")
    assert done.err.splitlines()[0].startswith("sidecar: No such option")
    assert "--nope" in done.err
    assert done.err.splitlines()[-1] == f"hint: sidecar {' '.join(command)} --help"


@pytest.mark.parametrize(
    ("arguments", "words", "hint"),
    [
        (("stauts",), "no command `stauts`", "did you mean `sidecar status`?"),
        (("xyz",), "no command `xyz`", "sidecar --help"),
        (("policy", "chek"), "chek", "sidecar policy --help"),
        (("exec",), "CMD", "sidecar exec --help"),
        (("why",), "ID", "sidecar why --help"),
        (("approvals", "approve"), "ID", "sidecar approvals approve --help"),
        (("policy", "check"), "FILE", "sidecar policy check --help"),
        (("policy", "explain"), "--statement", "sidecar policy explain --help"),
        (("policy", "explain", "--url", "http://[::1"), "--url", "sidecar policy explain --help"),
        (("policy", "explain", "--url", "http://h:99999"), "--url", "sidecar policy explain --help"),
        (("flows", "--once", "--watch"), "--watch", "sidecar flows --help"),
        (("run", "-c", "/nonexistent/s.yaml"), "/nonexistent/s.yaml", "-c names the file"),
        (
            ("policy", "check", "/nonexistent/p.yaml"),
            "/nonexistent/p.yaml: the policy cannot be read: No",
            "",
        ),
        (("collector", "--listen", "here"), "'here'", "such as 127.0.0.1:8420"),
        (("collector", "--listen", "0.0.0.0:8420"), "0.0.0.0 is not loopback", "TLS proxy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_usage(sidecar: Sidecar, arguments: tuple[str, ...], words: str, hint: str) -> None:
    done = sidecar(*arguments)
    assert (done.status, done.out) == (2, "")
    lines = done.err.splitlines()
    assert words in lines[0]
    assert lines[-1].startswith("hint: ")
    assert hint in lines[-1]


@pytest.mark.parametrize("group", [(), ("policy",), ("approvals",), ("audit",), ("ca",)])
def test_a_group_alone_shows_its_commands(sidecar: Sidecar, group: tuple[str, ...]) -> None:
    done = sidecar(*group)
    assert (done.status, done.out) == (2, "")
    assert "Commands:" in done.err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("status",), 1, "nothing is running\n"),
        (("flows",), 0, "no open flows\n"),
        (("approvals", "list"), 0, "nothing waits for a decision\n"),
    ],
)
def test_with_nothing_running(sidecar: Sidecar, arguments: tuple[str, ...], status: int, words: str) -> None:
    done = sidecar(*arguments)
    assert (done.status, done.out) == (status, words)
    as_json = sidecar(*arguments, "--json")
    assert as_json.status == status
    assert not any(json.loads(as_json.out).values())
    assert as_json.err == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can tell")
def test_an_instance_that_died_is_no_well_host(sidecar: Sidecar, directory: Path) -> None:
    """What it has left refuses connections: that is not `nothing is running`."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    (directory / "0badf00d").mkdir()
    (directory / "0badf00d" / run_state.STATE_FILE).write_text(json.dumps({"pid": ended.pid, "started": 1}))
    done = sidecar("status")
    assert done.status == 1
    assert "DEAD  instance 0badf00d died" in done.out
    assert "sidecar down --dead" in done.out
    assert json.loads(sidecar("status", "--json").out)["dead"] == ["0badf00d"]
    run_state.save("0badf00d")  # this process: it lives
    assert "DEAD" not in sidecar("status").out


def test_who_may_decide_is_named_once(sidecar: Sidecar, agent: SmallAgent) -> None:
    me = pwd.getpwuid(os.geteuid()).pw_name  # who may not decide is not shown it
    agent.park(HOLD, by=("root", me, "dba"))
    named = ", ".join(dict.fromkeys(("root", me, "dba")))
    assert f"may decide  {named}\n" in sidecar("approvals", "show", HOLD).out


def test_nothing_to_decide_because_nothing_runs(sidecar: Sidecar) -> None:
    assert sidecar("approvals", "list").err == "nothing is running\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "--instance", "0badf00d"),
        ("flows", "--instance", "0badf00d"),
        ("approvals", "show", "0badf00d"),
        ("approvals", "approve", "0badf00d"),
        ("approvals", "reject", "0badf00d"),
        ("approvals", "show", "0b"),
        ("why", "0b"),
        ("why", "0badf00d", "--directory", "/nonexistent"),
        ("audit", "tail", "--directory", "/nonexistent"),
        ("audit", "show", "0badf00d", "--directory", "/nonexistent"),
        ("audit", "export", "--directory", "/nonexistent"),
        ("audit", "verify", "/nonexistent"),
    ],
    ids=" ".join,
)
def test_what_is_not_there(sidecar: Sidecar, arguments: tuple[str, ...]) -> None:
    done = sidecar(*arguments)
    assert (done.status, done.out) == (1, "")
    assert re.fullmatch(r"sidecar: [^\n]+\nhint: [^\n]+\n", done.err), done.err


def test_what_the_system_refuses_is_no_traceback(sidecar: Sidecar, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = sidecar("collector", "--data", tmp_path / "file" / "data", "--listen", "127.0.0.1:1")
    assert done.status in (1, 2)
    assert f"{tmp_path}/file" in done.err
    assert done.err.splitlines()[-1].startswith("hint: ")


@pytest.mark.root
def test_an_agent_is_shown(sidecar: Sidecar, agent: SmallAgent) -> None:
    done = sidecar("status")
    assert f"instance   {agent.instance}" in re.sub(
        " +", lambda m: m[0] if len(m[0]) < 3 else "   ", done.out
    )
    shown = json.loads(sidecar("status", "--json").out)["instances"]
    assert [each["instance"] for each in shown] == [agent.instance]
    # This one has neither workers nor hooks, and says so.
    assert (done.status, shown[0]["ok"], bool(shown[0]["complaints"])) == (1, False, True)
    assert sidecar("status", "--instance", agent.instance).out == done.out


@pytest.mark.root
@pytest.mark.parametrize(("word", "state"), [("approve", "approved"), ("reject", "rejected")])
def test_a_hold_from_list_to_decision(sidecar: Sidecar, agent: SmallAgent, word: str, state: str) -> None:
    agent.park(HOLD, "DELETE FROM customers\nWHERE id = 5")
    assert "DELETE FROM customers\\nWHERE id = 5" in sidecar("approvals", "list").out
    assert [hold["id"] for hold in json.loads(sidecar("approvals", "list", "--json").out)["holds"]] == [HOLD]
    assert "customer-deletes" in sidecar("approvals", "show", HOLD[-8:]).out
    done = sidecar("approvals", word, HOLD[-8:], "--reason", "ticket 1234")
    assert done.status == 0, done.err
    assert f"{HOLD[-8:]} {state}" in done.out
    # Once: what is decided is decided.
    again = sidecar("approvals", word, HOLD[-8:])
    assert again.status == 1
    assert state in again.err
    assert "hint: " in again.err


@pytest.mark.root
def test_why_asks_the_agent(sidecar: Sidecar, agent: SmallAgent) -> None:
    agent.records["4c5ba63a"] = _record()
    done = sidecar("why", "4c5ba63a")
    assert (done.status, done.err) == (0, "")
    assert "no-schema-changes" in done.out
    assert json.loads(sidecar("why", "4c5ba63a", "--json").out)["rule"] == "no-schema-changes"


@pytest.mark.root
@pytest.mark.parametrize(
    ("hold", "words"),
    [
        ({}, "it waits for a decision: sidecar approvals show 814d2abe"),
        ({"state": "approved", "by": "alice"}, "it was approved by alice, for this once; it ran"),
        ({"state": "rejected", "by": "alice"}, "it was rejected by alice: ask"),
        ({"state": "expired"}, "nobody decided in time"),
    ],
)
def test_why_says_what_became_of_a_hold(
    sidecar: Sidecar, agent: SmallAgent, hold: dict[str, str], words: str
) -> None:
    verdict = {"action": "hold", "rule": "customer-deletes"}
    agent.records["814d2abe"] = {**_record(), "verdict": verdict, "hold": {"id": HOLD, **hold}}
    assert words in sidecar("why", "814d2abe").out


def _record() -> dict[str, Any]:
    return {
        "id": "01a20d76-9220-725e-9895-51244c5ba63a",
        "ts_ns": 1,
        "kind": "request",
        "verdict": {"action": "deny", "rule": "no-schema-changes", "reason": "use the migration job"},
        "operation": {"kind": "sql", "text": "DROP TABLE t", "statements": ["DROP"]},
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="runs the command as another user")
@pytest.mark.parametrize(
    ("arguments", "status", "hint"),
    [
        (("run",), 3, "sudo sidecar run"),
        (("exec", "--", "true"), 125, "sudo sidecar exec -- CMD…"),
        (("down",), 3, "sudo sidecar down"),
        (("why", "4c5ba63a", "--directory", "{closed}"), 1, "sudo sidecar why 4c5ba63a --directory {closed}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_without_root(arguments: tuple[str, ...], status: int, hint: str, tmp_path: Path) -> None:
    """pytest's directories are root's alone."""
    filled = [argument.format(closed=tmp_path) for argument in arguments]
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", SIDECAR, *filled],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd="/",
    )
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr.splitlines()[-1] == "hint: " + hint.format(closed=tmp_path)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("masks: {hash_key: {file: absent}}", "masks.hash_key: the secret in"),
        ("upstream: {url: 'http://127.0.0.1:1', token: {file: absent}}", "upstream.token: the secret in"),
        (
            "identity: {sources: [{env: {name: T}}], issuers: [{issuer: i, audience: a, jwks: absent}]}",
            "absent: No such file or directory",
        ),
    ],
)
def test_doctor_looks_for_what_the_configuration_names(
    document: str, words: str, tmp_path: Path, sidecar: Sidecar
) -> None:
    config = tmp_path / "sidecar.yaml"
    config.write_text(document + f"\naudit: {{directory: {tmp_path}}}\n")
    done = sidecar("doctor", "-c", config)
    assert done.status == 3
    (missing,) = [line for line in done.out.splitlines() if words in line]
    assert missing.startswith("MISSING")
    assert done.err == ""  # a row, and not a warning besides


LOOKING_IN = """
import sys
from pathlib import Path
from sidecar.control import client
found, directory = client.discover, Path(sys.argv[1])
client.discover = lambda: found(directory)
sys.argv[:] = ["sidecar", *sys.argv[2:]]
from sidecar.cli import main
main()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("command", ["status", "flows"])
def test_who_may_not_look_is_told_so_and_not_that_something_is_wrong(
    command: str, agent: SmallAgent, directory: Path
) -> None:
    """For monitoring, 1 of `status` means: not well."""
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--",
         sys.executable, "-c", LOOKING_IN, directory, command],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"sidecar: {command} needs root or the group sidecar\nhint: run it with sudo\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="exec says first that it needs root")
@pytest.mark.parametrize(
    ("document", "policy", "where", "hint"),
    [
        ("steering:\n  scpoe: all\n", "", "sidecar.yaml:2: `scpoe`", "did you mean `scope`?"),
        ("policy: nowhere.yaml\n", "", "nowhere.yaml: the policy cannot be read", "relative"),
        (
            "policy: policy.yaml\n",
            "version: 1\nrules:\n  - name: a\n    dney: x\n",
            "policy.yaml:4: `dney`",
            "did you mean `deny`?",
        ),
    ],
    ids=["configuration", "no policy", "policy"],
)
@pytest.mark.parametrize("command", [("run",), ("exec", "--", "echo", "ran")], ids=lambda words: words[0])
def test_bad_documents_stop_the_start(
    command: tuple[str, ...], document: str, policy: str, where: str, hint: str, tmp_path: Path
) -> None:
    """Before anything is put into the kernel."""
    config = tmp_path / "sidecar.yaml"
    config.write_text(document)
    (tmp_path / "policy.yaml").write_text(policy)
    done = subprocess.run(
        [SIDECAR, command[0], "-c", config, *command[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert where in lines[0]
    assert lines[-1].startswith("hint: ")
    assert hint in lines[-1]


def test_a_reader_that_goes_away_is_no_error_message(tmp_path: Path) -> None:
    """`sidecar … | head`"""
    done = subprocess.run(
        ["bash", "-c", '"$0" policy --help | true; exit "${PIPESTATUS[1]}"', SIDECAR],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
