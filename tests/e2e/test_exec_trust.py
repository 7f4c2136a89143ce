"""`sidecar exec` tells its command to trust the local authority where TLS may be opened, and nothing elsewhere; what it wrote for that
goes with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sidecar.kernel import run_state
from sidecar.tls import bundles, environment
from sidecar.tls.authority import Authority, Leaf
from sidecar.tls.loopback import Loopback

pytestmark = pytest.mark.root

SIDECAR = str(Path(sys.executable).parent / "sidecar")
OPENED = "{name: api, host: api.test, port: 443, protocol: http}"
NOT_OPENED = "{name: api, host: api.test, port: 443, tls: {mode: passthrough}}"
PLAIN = {"PATH": os.environ["PATH"], "HOME": "/root"}


def execute(
    tmp_path: Path, target: str, *command: str, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    config = tmp_path / "sidecar.yaml"
    config.write_text(
        f"audit: {{directory: audit}}\ntargets: [{target}]\ntls: {{authority: {{directory: ca}}}}\n"
    )
    return subprocess.run(
        [SIDECAR, "exec", "-c", str(config), "--", *command],
        env={**PLAIN, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )


def leaf(tmp_path: Path) -> Leaf:
    return Authority.open(tmp_path / "ca").leaf(("localhost",))


def test_the_command_trusts_us(tmp_path: Path) -> None:
    """Also as the file that the command sees: readable for everyone, with the public roots, gone afterwards."""
    with Loopback(leaf(tmp_path)) as server:
        done = execute(
            tmp_path,
            OPENED,
            "sh", "-c", f"curl -sS -o /dev/null https://localhost:{server.port}/ && stat -c '%a %n' $SSL_CERT_FILE && cat $SSL_CERT_FILE",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert server.answered == 1
    first, _, rest = done.stdout.partition("\n")
    mode, _, name = first.partition(" ")
    assert mode == "644"
    assert Path(name).is_relative_to(run_state.RUN_DIRECTORY)
    assert not Path(name).parents[1].exists()
    blocks = bundles.certificates_in(rest.encode())
    assert blocks[-1] == Authority.open(tmp_path / "ca").certificate_pem
    assert len(blocks) > 50


def test_what_the_person_has_set_is_kept_and_ours_added(tmp_path: Path) -> None:
    theirs = Authority.open(tmp_path / "theirs")
    own = tmp_path / "own.pem"
    own.write_bytes(theirs.certificate_pem)
    with Loopback(leaf(tmp_path)) as ours, Loopback(theirs.leaf(("localhost",))) as other:
        done = execute(
            tmp_path,
            OPENED,
            "curl", "-sS", f"https://localhost:{ours.port}/", f"https://localhost:{other.port}/",
            environ={"CURL_CA_BUNDLE": str(own)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert (ours.answered, other.answered) == (1, 1)


def test_nothing_where_no_tls_is_opened(tmp_path: Path) -> None:
    done = execute(tmp_path, NOT_OPENED, "env")
    assert done.returncode == 0
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert "PGCHANNELBINDING" in names
    assert not names & {*environment.ADDS, *environment.REPLACES}
    assert not (tmp_path / "ca").exists()


def test_an_authority_that_cannot_be_used_starts_nothing(tmp_path: Path) -> None:
    leaf(tmp_path)
    (tmp_path / "ca" / "authority.key").chmod(0o644)
    done = execute(tmp_path, OPENED, "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert "authority.key can be read or written by others" in done.stderr
    assert "hint: chmod" in done.stderr


def test_after_a_kill_nothing_is_left(tmp_path: Path) -> None:
    before = set(run_state.run_directories())
    config = tmp_path / "sidecar.yaml"
    config.write_text(
        f"audit: {{directory: audit}}\ntargets: [{OPENED}]\ntls: {{authority: {{directory: ca}}}}\n"
    )
    running = subprocess.Popen([SIDECAR, "exec", "-c", str(config), "--", "sleep", "3"], env=PLAIN)
    try:
        deadline = time.monotonic() + 30
        while True:
            made = [
                name
                for name in set(run_state.run_directories()) - before
                if (run_state.RUN_DIRECTORY / name / run_state.TLS_DIRECTORY / "bundle.pem").exists()
            ]
            if made or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        assert made
        state = run_state.states()[made[0]]
        os.kill(
            int(str(state["pid"])), signal.SIGKILL
        )  # the inspector: once the command has ended its front undoes what is left
        running.wait(30)
    finally:
        running.kill()
        running.wait()
    assert not (run_state.RUN_DIRECTORY / made[0]).exists()
