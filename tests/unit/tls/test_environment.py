"""What a command is told to trust: by real clients, which accept us with these variables and not without them."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.tls import bundles, environment
from sidecar.tls.authority import Authority
from sidecar.tls.loopback import Loopback

PLAIN = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
SYSTEM = Path("/etc/ssl/certs/ca-certificates.crt")

PYTHON_SSL = "import ssl, urllib.request as r, urllib.error as e, sys\ntry: r.urlopen(sys.argv[1])\nexcept e.HTTPError: pass"
CLIENTS = {
    "curl": ["curl", "-sS", "-o", "/dev/null", "URL"],
    "openssl": ["sh", "-c", "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | openssl s_client -quiet -verify_return_error -verify_hostname localhost -connect localhost:PORT"],
    "python ssl": [sys.executable, "-c", PYTHON_SSL, "URL"],
    "requests": [sys.executable, "-c", "import requests, sys; requests.get(sys.argv[1])", "URL"],
    "httpx": [sys.executable, "-c", "import httpx, sys; httpx.get(sys.argv[1])", "URL"],
    "node": ["node", "-e", "fetch(process.argv[1]).then(r => r.text(), e => { console.error(e); process.exit(1) })", "URL"],
    "git": ["sh", "-c", "git ls-remote URL 2>&1 | tee /dev/stderr | grep -q 'not found'"],
    "pip": [sys.executable, "-m", "pip", "download", "--retries", "0", "--no-deps", "-d", "DIR", "-i", "URL", "nothing-there"],
    "npm": ["npm", "view", "nothing-there", "--registry", "URL", "--fetch-retries", "0"],
    "wget": ["sh", "-c", "wget --tries=1 -O /dev/null URL 2>&1 | tee /dev/stderr | grep -q 404"],
}  # fmt: skip
FAILS_ANYWAY = ("pip", "npm")
"""They want a registry; what they say of the certificate counts."""
SYSTEM_STORE_ONLY = ("wget",)
"""With GnuTLS, as Debian's is: no variable reaches it, `sidecar ca install` does."""
REFUSED = ("certificate", "CERTIFICATE", "self-signed", "self signed", "SSL", "UNABLE_TO")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.open(tmp_path / "ca")


@pytest.fixture
def server(authority: Authority) -> Iterator[Loopback]:
    with Loopback(authority.leaf(("localhost", "127.0.0.1"))) as serving:
        yield serving


def talk(name: str, server: Loopback, tmp_path: Path, variables: dict[str, str]) -> tuple[bool, str]:
    if shutil.which(CLIENTS[name][0] if CLIENTS[name][0] != "sh" else name) is None:
        pytest.skip(f"{name} is not on this machine")
    if name in ("node", "npm") and not SYSTEM.is_file():
        pytest.skip("no system roots")
    words = [
        word.replace("URL", f"https://localhost:{server.port}/")
        .replace("PORT", str(server.port))
        .replace("DIR", str(tmp_path / "downloads"))
        for word in CLIENTS[name]
    ]
    before = server.answered
    done = subprocess.run(
        words,
        env={**PLAIN, "HOME": str(tmp_path), **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    text = done.stdout + done.stderr
    if name not in FAILS_ANYWAY:
        assert (done.returncode == 0) is (server.answered > before), text
    return server.answered > before, text


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_accepts_us_with_the_variables_and_not_without(
    name: str, server: Loopback, authority: Authority, tmp_path: Path
) -> None:
    trusted, text = talk(name, server, tmp_path, {})
    assert not trusted
    assert any(word in text for word in REFUSED), text
    variables = environment.for_command({}, authority.certificate_pem, tmp_path / "tls")
    trusted, text = talk(name, server, tmp_path, variables)
    assert trusted is (name not in SYSTEM_STORE_ONLY), text


def test_public_roots_stay(authority: Authority, tmp_path: Path) -> None:
    variables = environment.for_command({}, authority.certificate_pem, tmp_path / "tls")
    assert set(variables) == {*environment.ADDS, *environment.REPLACES}
    for name in environment.REPLACES:
        blocks = bundles.certificates_in(Path(variables[name]).read_bytes())
        system = bundles.certificates_in(SYSTEM.read_bytes())
        assert blocks == [*system, authority.certificate_pem]
        assert len(system) > 50
    for name in environment.ADDS:
        assert Path(variables[name]).read_bytes() == authority.certificate_pem
    assert all(Path(value).stat().st_mode & 0o777 == 0o644 for value in variables.values())


def test_a_bundle_of_the_persons_own_is_kept_and_ours_added(
    authority: Authority, server: Loopback, tmp_path: Path
) -> None:
    theirs = Authority.open(tmp_path / "theirs", hostname="theirs")
    own = tmp_path / "own.pem"
    own.write_bytes(theirs.certificate_pem)
    environ = {"REQUESTS_CA_BUNDLE": str(own), "NODE_EXTRA_CA_CERTS": str(own), "npm_config_cafile": str(own)}
    found = environment.for_command(environ, authority.certificate_pem, tmp_path / "tls")
    assert "NPM_CONFIG_CAFILE" not in found
    for name in environ:
        assert Path(found[name]).read_bytes() == theirs.certificate_pem + authority.certificate_pem
    assert own.read_bytes() == theirs.certificate_pem
    for client in ("requests", "node"):
        assert talk(client, server, tmp_path, found)[0]
        with Loopback(theirs.leaf(("localhost",))) as other:
            assert talk(client, other, tmp_path, {**environ, **found})[0]


def test_what_cannot_be_combined_stays(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "secret").write_text("hunter2\n")
    (tmp_path / "key").write_text("-----BEGIN CERTIFICATE-----\naHVudGVyMg==\n-----END CERTIFICATE-----\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "both").write_bytes(SYSTEM.read_bytes() + authority.certificate_pem)
    environ = {
        "SSL_CERT_FILE": str(tmp_path / "secret"),
        "PIP_CERT": str(tmp_path / "absent"),
        "AWS_CA_BUNDLE": str(tmp_path),
        "GIT_SSL_CAINFO": str(tmp_path / "pipe"),
        "CURL_CA_BUNDLE": str(tmp_path / "both"),
        "DENO_CERT": str(tmp_path / "key"),
        "NIX_SSL_CERT_FILE": "a\0b",
    }
    with caplog.at_level(logging.WARNING):
        found = environment.for_command(environ, authority.certificate_pem, tmp_path / "tls")
    assert not set(found) & set(environ)
    assert {record.args[0] for record in caplog.records if isinstance(record.args, tuple)} == set(environ) - {
        "CURL_CA_BUNDLE"
    }
    for file in (tmp_path / "tls").iterdir():
        assert "hunter2" not in file.read_text()
        assert "aHVudGVyMg" not in file.read_text()


def test_a_system_that_trusts_us_already(authority: Authority, tmp_path: Path) -> None:
    """Then its own file is named, which the distribution goes on updating."""
    root = tmp_path / "root"
    (root / "etc/ssl/certs").mkdir(parents=True)
    bundle = root / "etc/ssl/certs/ca-certificates.crt"
    bundle.write_bytes(SYSTEM.read_bytes() + authority.certificate_pem.replace(b"\n", b"\r\n"))
    found = environment.for_command({}, authority.certificate_pem, tmp_path / "tls", root=root)
    assert {found[name] for name in environment.REPLACES} == {str(bundle)}
    assert not (tmp_path / "tls" / "bundle.pem").exists()


def test_never_ours_alone(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    found = environment.for_command({}, authority.certificate_pem, tmp_path / "tls", root=tmp_path / "root")
    assert set(found) == set(environment.ADDS)


def test_only_certificates_are_taken(authority: Authority) -> None:
    leaf = authority.leaf(("a.example",))
    data = b"# a comment\n" + leaf.key_pem + leaf.certificate_chain_pem * 2 + b"rest"
    assert bundles.certificates_in(data) == [leaf.certificate_chain_pem]
