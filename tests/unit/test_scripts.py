"""The scripts, as far as they can be seen without root: syntax, choices, the quickstart's documents."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.config import load_config
from sidecar.policy import load_policy

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
BASH = [
    path
    for directory in ("scripts", "scripts/lib", "vagrant", "examples", ".ci")
    for path in sorted((ROOT / directory).iterdir())
    if path.is_file() and (path.suffix == ".sh" or path.read_bytes()[:80].split(b"\n")[0].endswith(b"bash"))
]


def _setup(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts/setup", *arguments], capture_output=True, text=True, check=False, timeout=30
    )


@pytest.mark.parametrize("path", BASH, ids=lambda path: str(path.relative_to(ROOT)))
def test_bash_parses(path: Path) -> None:
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_scripts_are_found() -> None:
    names = {path.name for path in BASH}
    assert {
        "setup",
        "check",
        "test",
        "quickstart",
        "test-vagrant",
        "run",
        "nightly-report.sh",
        "libvirt",
    } <= names


def test_executables_are_executable() -> None:
    for path in BASH:
        if path.parent.name != "lib":
            assert os.access(path, os.X_OK) or path.parent.name == "vagrant", path


def test_packages_grow_with_the_choice() -> None:
    runtime, quickstart, everything = (
        set(_setup(choice, "--packages").stdout.split()) for choice in ("--runtime", "--quickstart", "--all")
    )
    assert "python3-bpfcc" in runtime
    assert runtime < quickstart < everything
    assert "vagrant" not in everything
    assert "vagrant" in _setup("--vm", "--packages").stdout.split()


def test_unknown_argument_is_a_usage_error() -> None:
    done = _setup("--everything")
    assert done.returncode == 2
    assert "--everything" in done.stderr
    assert "hint:" in done.stderr


def test_without_sudo_the_whole_command_is_named(tmp_path: Path) -> None:
    """What `su -c` runs has the same arguments: `quickstart` alone would run something else than the user's command."""
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    (tmp_path / "basename").symlink_to("/usr/bin/basename")
    done = subprocess.run(
        [
            "/bin/bash",
            "-c",
            f'. {ROOT}/scripts/lib/common.sh; as_root "$@"',
            "./scripts/quickstart",
            "--",
            "echo",
            "a b",
        ],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines() == [
        "quickstart: error: needs root, and there is no sudo",
        "  hint: run it as root: su -c './scripts/quickstart -- echo a\\ b'",
    ]


def test_the_quickstarts_policy_passes_its_own_tests() -> None:
    text = (QUICKSTART / "policy.yaml").read_text(encoding="utf-8")
    policy = load_policy(text, "policy.yaml", hash_key=b"k" * 32, upstream=True)
    results = policy.run_tests()
    assert len(results) >= 2
    assert [result for result in results if not result.ok] == []
    assert {"db.shop.internal", "api.shop.internal"} <= policy.host_names


def test_the_quickstarts_configuration_is_valid(tmp_path: Path) -> None:
    template = (QUICKSTART / "sidecar.yaml").read_text(encoding="utf-8")
    file = tmp_path / "sidecar.yaml"
    file.write_text(template.replace("{state}", str(tmp_path)).replace("{collector}", "127.0.0.1:8420"))
    assert (
        re.findall(r"\{[a-z]+\}", "".join(line for line in file.read_text().splitlines() if line[:1] != "#"))
        == []
    )
    (tmp_path / "policy.yaml").write_text((QUICKSTART / "policy.yaml").read_text())
    config = load_config(file)
    assert config.audit.directory == tmp_path / "audit"
    assert {target.host for target in config.targets} == {"db.shop.internal", "api.shop.internal"}


def test_the_report_knows_nothing_of_sidecar() -> None:
    for name in ("nightly-report.sh", "nightly_totals.py"):
        lines = (ROOT / "examples" / name).read_text().splitlines()
        code = [line for line in lines if not line.startswith(("#", '"""'))]
        assert "sidecar" not in "\n".join(code).lower()


def test_issued_tokens_verify(tmp_path: Path) -> None:
    program = (
        "import sys, json, jwt; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import issuer\n"
        "file = Path(sys.argv[2]) / 'jwks.json'; token = issuer.issue_token(file)\n"
        "keys = jwt.PyJWKSet.from_json(file.read_text()); kid = jwt.get_unverified_header(token)['kid']\n"
        "trusted = dict(algorithms=['ES256'], audience='sidecar', issuer=issuer.ISSUER)\n"
        "claims = jwt.decode(token, keys[kid], **trusted)\n"
        "assert 'd' not in json.loads(file.read_text())['keys'][0]\n"
        "print(claims['sub'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, QUICKSTART, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "repo:shop/reports:ref:refs/heads/main"
