"""`sidecar ca` as a process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509

SIDECAR = Path(sys.executable).with_name("sidecar")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "sidecar.yaml"
    path.write_text(
        "tls: {authority: {directory: ca, lifetime: 30d, permitted: [corp.example, 10.0.0.0/8]}}\n"
    )
    return path


def ca(command: str, config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SIDECAR), "ca", command, "-c", str(config), *options], capture_output=True, text=True, timeout=60
    )


def test_there_is_none_yet(config: Path) -> None:
    done = ca("show", config)
    assert (done.returncode, done.stdout) == (3, "")
    assert f"there is no authority in {config.parent}/ca yet" in done.stderr
    assert "hint: sidecar ca install" in done.stderr
    assert not (config.parent / "ca").exists()


def test_show(config: Path) -> None:
    made = ca("regenerate", config)
    assert made.returncode == 0, made.stderr
    shown = ca("show", config)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == made.stdout
    found = json.loads(ca("show", config, "--json").stdout)
    pem = ca("show", config, "--pem").stdout
    file = config.parent / "ca" / "authority.pem"
    assert pem == file.read_text()
    openssl = subprocess.run(
        ["openssl", "x509", "-in", str(file), "-noout", "-fingerprint", "-sha256"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert openssl.endswith("=" + found["fingerprint_sha256"])
    assert found["permitted"] == ["corp.example", "10.0.0.0/8"]
    assert found["path"] == str(file)
    assert abs(found["not_after_ns"] - time.time_ns() - 30 * 86_400 * 10**9) < 60 * 10**9
    for word in (found["fingerprint_sha256"], "corp.example, 10.0.0.0/8", "29 d left", str(file)):
        assert word in shown.stdout
    assert "PRIVATE" not in pem + shown.stdout + json.dumps(found)


def test_regenerate_makes_another(config: Path) -> None:
    first = json.loads(ca("regenerate", config, "--json").stdout)
    second = ca("regenerate", config, "--json")
    assert json.loads(second.stdout)["fingerprint_sha256"] != first["fingerprint_sha256"]
    assert "sidecar ca install" in second.stderr
    certificate = x509.load_pem_x509_certificate((config.parent / "ca" / "authority.pem").read_bytes())
    assert certificate.subject.rfc4514_string() == first["subject"]


def test_broken_files_are_said(config: Path) -> None:
    ca("regenerate", config)
    (config.parent / "ca" / "authority.pem").write_text("hunter2")
    done = ca("show", config)
    assert done.returncode == 3
    assert "authority.pem is no certificate" in done.stderr
    assert "hunter2" not in done.stderr
