"""`sidecar policy` as a process: what a script that calls it sees."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.cli import main

SIDECAR = Path(sys.executable).with_name("sidecar")

DOCUMENT = """\
version: 1
rules:
  - name: no-drops
    when: {protocol: postgres, host: "*.internal", statement: [DROP]}
    deny: schema changes go through the migration job
  - name: pii
    when: {protocol: postgres}
    mask: {columns: {public.customers.ssn: redact}}
tests:
  - name: a drop is refused
    given: {protocol: postgres, host: db.internal, statement: "DROP TABLE t"}
    expect: {action: deny, rule: no-drops}
"""


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Inside = Callable[..., Done]


def sidecar(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SIDECAR), "policy", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inside:
    """The same entry point in this process, for the many cases: starting one takes half a second."""

    def call(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["sidecar", "policy", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Done(int(ended.value.code or 0), said.out, said.err)

    return call


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(DOCUMENT)
    return path


def test_check_says_what_it_read_and_warns_on_stderr(file: Path) -> None:
    done = sidecar("check", file)
    assert done.returncode == 0
    assert done.stdout.startswith("ok: 2 rules, 1 test, revision ")
    assert "no source for PostgreSQL in plain text" in done.stderr
    found = json.loads(sidecar("check", file, "--json").stdout)
    assert (found["ok"], found["rules"], len(found["warnings"])) == (True, 2, 1)


@pytest.mark.parametrize(
    ("before", "after", "line", "says"),
    [
        ("version: 1", "version: 2", 1, "version"),
        ("    deny: schema", "    dney: schema", 5, "did you mean `deny`?"),
        ("statement: [DROP]", "statement: [DORP]", 4, "did you mean `DROP`?"),
        ("statement: [DROP]", "statment: [DROP]", 4, "did you mean `statement`?"),
        ("protocol: postgres, host", "protocol: postgre, host", 4, "did you mean `postgres`?"),
        ("ssn: redact", "ssn: readct", 8, "redact"),
        ("rule: no-drops", "rule: no-drop", 12, "did you mean `no-drops`?"),
        ("version: 1", "version: 1\non_derived: dney", 2, "on_derived"),
        ("version: 1", "version: 1\npredicate: deny", 2, "did you mean `predicates`?"),
        ("version: 1", "version: 1\non_opaque: deny\non_opaque: mask", 3, "on_opaque"),
        ("name: pii", "name: no-drops", 6, "two rules"),
        ("{protocol: postgres}", "{cel: 'operation.'}", 7, "condition"),
        ("{protocol: postgres}", "{text: '(?=a)'}", 7, "RE2"),
        ("{protocol: postgres}", "{protocol: [postgres", 8, "not YAML"),
    ],
)  # fmt: skip
def test_check_names_file_line_and_the_nearest_valid_name(
    inside: Inside, file: Path, before: str, after: str, line: int, says: str
) -> None:
    assert before in DOCUMENT
    file.write_text(DOCUMENT.replace(before, after, 1))
    done = inside("check", file)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"{file}:{line}" in done.stderr, done.stderr
    assert says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_check_warns_of_what_has_ended(inside: Inside, file: Path) -> None:
    file.write_text(
        DOCUMENT.replace(
            "    deny: schema",
            "    except: [{name: old, when: {user: x}, until: 2020-01-01}]\n    deny: schema",
        )
    )
    done = inside("check", file)
    assert done.returncode == 0
    assert "warning: rule `no-drops`: exception `old` has ended: until 2020-01-01" in done.stderr
    file.write_text(file.read_text().replace("2020", "2999"))
    assert "has ended" not in inside("check", file).stderr


def test_explain_judges_one_thing(inside: Inside, file: Path) -> None:
    done = inside(
        "explain", "--policy", file, "--statement", "SELECT 1", "--method", "GET", "--url", "http://h/"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "not both" in done.stderr


def test_explain_says_which_option_would_tell_what_is_unknown(inside: Inside, file: Path) -> None:
    done = inside("explain", "--policy", file, "--statement", "DROP TABLE t")
    assert "not known here: host (give --host)" in done.stdout


def test_check_of_what_is_no_file(inside: Inside, tmp_path: Path) -> None:
    assert inside("check", tmp_path / "nothing").returncode == 2
    assert inside("check", tmp_path).returncode == 2
    (tmp_path / "latin").write_bytes(b"version: 1\nrules: []\n# \xe4\n")
    done = inside("check", tmp_path / "latin")
    assert (done.returncode, f"{tmp_path / 'latin'}:3" in done.stderr) == (2, True)


def test_test_fails_with_one_and_says_which(file: Path) -> None:
    assert sidecar("test", file).returncode == 0
    file.write_text(DOCUMENT.replace("host: db.internal, ", "").replace("action: deny", "action: allow"))
    done = sidecar("test", file)
    assert done.returncode == 1
    assert "FAILED a drop is refused: undecided: needs host" in done.stdout
    assert "0 passed, 1 failed" in done.stdout
    found = json.loads(sidecar("test", file, "--json").stdout)
    assert (found["ok"], found["tests"][0]["ok"]) == (False, False)


def test_explain_shows_the_rule_and_each_selector(file: Path) -> None:
    done = sidecar("explain", "--policy", file, "--statement", "DROP TABLE t", "--host", "db.internal")
    assert done.returncode == 0
    assert done.stdout.startswith("deny by no-drops: schema changes")
    assert "host yes" in done.stdout
    unknown = sidecar("explain", "--policy", file, "--statement", "DROP TABLE t")
    assert "not known here: host" in unknown.stdout


@pytest.mark.parametrize(
    ("option", "statement", "action", "reason"),
    [
        ("", "SELECT upper(ssn) FROM customers", "mask", ""),
        ("on_derived: deny", "SELECT upper(ssn) FROM customers", "deny", "made from a masked column"),
        ("on_derived: deny", "SELECT ssn, count(*) FROM customers GROUP BY 1", "mask", ""),
        ("", "SELECT 1 FROM customers WHERE ssn = 'a'", "mask", ""),
        ("predicates: deny", "SELECT 1 FROM customers WHERE ssn = 'a'", "deny", "conditions look at"),
        ("", "SELECT mine(1)", "mask", ""),
        ("on_opaque: deny", "SELECT mine(1)", "deny", "cannot be looked into"),
        ("", "INSERT INTO t SELECT mine(1)", "deny", "what a function may have read"),
        ("on_opaque: allow", "INSERT INTO t SELECT mine(1)", "mask", ""),
        ("on_opaque: allow", "INSERT INTO t SELECT mine(ssn) FROM customers", "deny", "a masked column"),
    ],
)  # fmt: skip
def test_explain_knows_how_strictly_masks_are_kept(
    inside: Inside, file: Path, option: str, statement: str, action: str, reason: str
) -> None:
    file.write_text(f"{DOCUMENT}{option}\n")
    done = inside("explain", "--policy", file, "--statement", statement, "--json")
    found = json.loads(done.stdout)
    assert (found["action"], found["rule"]) == (action, "pii")
    assert reason in found["reason"]
    assert found["derived_masked"] is (
        "upper(ssn)" in statement or (statement == "SELECT mine(1)" and "allow" not in option)
    )


def test_explain_without_anything_to_explain_is_a_usage_error(file: Path) -> None:
    done = sidecar("explain", "--policy", file)
    assert done.returncode == 2
    assert "--statement" in done.stderr
