"""`doctor`'s verdicts, by the real runtimes of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.errors import TrustError
from sidecar.tls import verdicts as module
from sidecar.tls.authority import Authority
from sidecar.tls.stores import Keystore
from sidecar.tls.verdicts import verdicts

SIDECAR = str(Path(sys.executable).with_name("sidecar"))
CACERTS = Path("/etc/ssl/certs/java/cacerts")
BY_VARIABLES = {"curl", "OpenSSL", "Python ssl", "Python requests (certifi)", "Node", "git"}


@pytest.mark.parametrize("permitted", [(), ("corp.example",)], ids=["everything", "one domain"])
def test_every_runtime_of_this_machine(tmp_path: Path, permitted: tuple[str, ...]) -> None:
    """Nobody trusts an authority that was just made; those that variables reach do with them, Java does not."""
    found = {
        verdict.runtime: verdict for verdict in verdicts(Authority.open(tmp_path / "ca", permitted=permitted))
    }
    assert {"curl", "OpenSSL", "Python ssl", "git"} <= set(found)
    for name, verdict in found.items():
        if verdict.alone is None:
            assert "could not be tried" in verdict.detail
            assert name in ("Java", "Python requests (certifi)"), (
                verdict
            )  # a runtime without compiler, a Python without requests
            continue
        assert (verdict.alone, verdict.told) == (False, name in BY_VARIABLES), verdict


@pytest.mark.skipif(
    not CACERTS.is_file() or not shutil.which("keytool"),
    reason="there is no Java of Debian's on this machine",
)
def test_a_java_that_trusts_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a copy of its own keystore, into which `ca install` put us: no password is named, as for its own."""
    made = Authority.open(tmp_path / "ca")
    (tmp_path / "ours.pem").write_bytes(made.certificate_pem)
    shutil.copyfile(CACERTS, tmp_path / "cacerts")
    Keystore(tmp_path / "cacerts", str(shutil.which("keytool"))).add(tmp_path / "ours.pem")
    store = ("java", f"-Djavax.net.ssl.trustStore={tmp_path}/cacerts", "DIR/Probe.java", "NAME", "PORT")
    monkeypatch.setattr(module, "_CLIENTS", {"Java": store})
    (verdict,) = verdicts(made)
    if verdict.alone is None:
        pytest.skip(verdict.detail)
    assert verdict.alone is True, verdict


def test_what_cannot_be_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/node").write_text("#!/bin/sh\necho no such option >&2\nexit 9\n")
    (tmp_path / "bin/node").chmod(0o755)
    (verdict,) = verdicts(Authority.open(tmp_path / "ca"), path=str(tmp_path / "bin"))
    assert (verdict.runtime, verdict.alone, verdict.told) == ("Node", None, None)
    assert verdict.detail == "could not be tried: no such option"
    with pytest.raises(TrustError, match="addresses only"):
        verdicts(Authority.open(tmp_path / "other", permitted=("10.0.0.0/8",)))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="the authority's key is root's")
@pytest.mark.parametrize("opens", ["a target", "a rule", ""])
def test_doctor(tmp_path: Path, opens: str) -> None:
    config = tmp_path / "sidecar.yaml"
    mode = "verify-full" if opens == "a target" else "passthrough"
    rule = (
        "- {name: r, when: {protocol: http, host: b.test}, deny: not by a job}" if opens == "a rule" else "[]"
    )
    (tmp_path / "policy.yaml").write_text(f"version: 1\nrules:\n  {rule}\n")
    config.write_text(
        "policy: policy.yaml\ntls: {authority: {directory: ca}}\naudit: {directory: audit}\n"
        f"targets: [{{name: a, host: a.test, port: 443, protocol: http, tls: {{mode: {mode}}}}}]\n"
    )

    def doctor() -> list[str]:
        done = subprocess.run(
            [SIDECAR, "doctor", "-c", str(config)], capture_output=True, text=True, timeout=110
        )
        return done.stdout.splitlines()

    assert any("local authority" in line and "not made yet" in line for line in doctor())
    assert not (tmp_path / "ca").exists()
    Authority.open(tmp_path / "ca")
    lines = [line for line in doctor() if "client trust" in line]
    assert any(line.startswith("ok ") and "curl: trusts" in line and "variables" in line for line in lines)
    java = [line for line in lines if "Java: does not trust" in line]
    assert all(line.startswith("MISSING" if opens else "ok ") for line in java)
