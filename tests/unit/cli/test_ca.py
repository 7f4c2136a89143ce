"""`sidecar ca` as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509

from tests.support import system_tree

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


@pytest.mark.root
@pytest.mark.skipif(not system_tree.available(), reason="needs root, busybox-static and ca-certificates")
def test_install_and_uninstall(config: Path, tmp_path: Path) -> None:
    """The authority is made on the way; what is said is also JSON."""
    root = system_tree.make(tmp_path / "root", "debian")
    before = system_tree.fingerprint(root)
    done = ca("install", config, "--root", str(root), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["failed"] == []
    assert said["done"][0] == "system store, by update-ca-certificates"
    pem = ca("show", config, "--pem").stdout
    assert pem in (root / "etc/ssl/certs/ca-certificates.crt").read_text()
    again = ca("install", config, "--root", str(root))
    assert again.stdout == "installed already: nothing to do\n"
    undone = subprocess.run(
        [str(SIDECAR), "ca", "uninstall", "--root", str(root)], capture_output=True, text=True
    )
    assert (undone.returncode, undone.stderr) == (0, "")
    assert undone.stdout.startswith("taken out; ")
    found = system_tree.fingerprint(root)
    assert {name: entry for name, entry in found.items() if name not in ("var", "var/lib")} == before
    assert (config.parent / "ca" / "authority.key").exists()


@pytest.mark.root
def test_what_was_passed_over_is_exit_status_1(config: Path, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    done = ca("install", config, "--root", str(tmp_path / "root"))
    assert done.returncode == 1
    assert "not done: the system has no roots" in done.stderr
    absent = ca("install", config, "--root", str(tmp_path / "absent"))
    assert absent.returncode == 3
    assert "is no directory" in absent.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_only_root_installs(config: Path) -> None:
    ca("regenerate", config)
    for command in ("install", "uninstall"):
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--clear-groups", str(SIDECAR), "ca", command],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 3, done.stderr
        assert done.stderr.splitlines()[-1] == "hint: run it as root"


def test_broken_files_are_said(config: Path) -> None:
    ca("regenerate", config)
    (config.parent / "ca" / "authority.pem").write_text("hunter2")
    done = ca("show", config)
    assert done.returncode == 3
    assert "authority.pem is no certificate" in done.stderr
    assert "hunter2" not in done.stderr
