"""HTTPS through the steered listener: opened for declared targets and for hosts that a rule names, with both ends verified; the rest is
relayed as it is."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.audit.verify import verify
from tests.support.certificates import TestAuthority
from tests.support.far_host import FarHost
from tests.support.steered_job import SteeredJob

pytestmark = [pytest.mark.root, pytest.mark.servers]

NAME, EXPIRED, OTHER = "api.internal", "expired.internal", "other.internal"
BIG_BYTES = 512 * 1024 * 1024
CUSTOMERS = {"customers": [{"id": 1, "ssn": "123-45-6789"}]}
POLICY = """\
version: 1
rules:
  - {name: no-delete, when: {protocol: http, host: api.internal, method: [DELETE]}, deny: not by a job}
  - {name: api-pii, when: {protocol: http, host: "*.internal", path: "/customers*"}, mask: {json: {"$.customers[*].ssn": redact}}}
"""
NGINX = """\
daemon off; user root; worker_processes 1; pid {directory}/pid; error_log {directory}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log {directory}/access.log;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
  types {{ application/json json; }}
  {servers}
}}
"""
SERVER = "server {{ listen {address}:443 ssl; server_name {name}; root {directory}/www; ssl_certificate {directory}/{name}.crt; ssl_certificate_key {directory}/{name}.key; }}\n"


class HttpsFar:
    """nginx with TLS on the far host: one certificate that is good, one that has expired, one of another authority."""

    def __init__(self, hosts: FarHost) -> None:
        self.hosts = hosts
        self.directory = Path(tempfile.mkdtemp(prefix="sidecar-https-"))
        self.ca = self.directory / "ca.pem"

    def __enter__(self) -> HttpsFar:
        known, stranger = TestAuthority(), TestAuthority("a stranger")
        self.ca.write_text(known.certificate)
        www = self.directory / "www"
        www.mkdir()
        (www / "customers.json").write_text(json.dumps(CUSTOMERS))
        with (www / "big").open("wb") as file:
            file.truncate(BIG_BYTES)
        servers = ""
        for name, authority, days in ((NAME, known, 1), (EXPIRED, known, -1), (OTHER, stranger, 1)):
            leaf = authority.leaf(name, days=days)
            (self.directory / f"{name}.crt").write_text(leaf.certificate)
            (self.directory / f"{name}.key").write_text(leaf.key)
            servers += SERVER.format(address=self.hosts.far_address, name=name, directory=self.directory)
        (self.directory / "nginx.conf").write_text(NGINX.format(directory=self.directory, servers=servers))
        self._process = self.hosts.popen(
            self.hosts.far, ["nginx", "-p", str(self.directory), "-c", "nginx.conf"]
        )
        deadline = time.monotonic() + 20
        while self.hosts.run(
            self.hosts.far, self.curl(f"https://{NAME}/customers.json", ca=self.ca)
        ).returncode:
            assert time.monotonic() < deadline, (self.directory / "error.log").read_text()
            time.sleep(0.1)
        return self

    def curl(self, url: str, *options: str, ca: Path) -> list[str]:
        resolved = [
            part
            for name in (NAME, EXPIRED, OTHER)
            for part in ("--resolve", f"{name}:443:{self.hosts.far_address}")
        ]
        return ["curl", "-sS", "--max-time", "60", "--cacert", str(ca), *resolved, *options, url]

    def log(self) -> list[str]:
        return (self.directory / "access.log").read_text().splitlines()

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture(scope="module")
def far() -> Iterator[HttpsFar]:
    with FarHost() as hosts, HttpsFar(hosts) as servers:
        yield servers


def job_of(
    far: HttpsFar, directory: Path, *, target: str = "", policy: str = POLICY, decrypt: str = "declared"
) -> SteeredJob:
    return SteeredJob(
        far.hosts, directory, policy, target, steering=f"{{ports: {{443: auto}}, decrypt: {decrypt}}}"
    )


def declared(far: HttpsFar, mode: str = "verify-full") -> str:
    ca = "" if mode == "passthrough" else f", ca: {far.ca}"
    return f"targets: [{{name: api, host: {far.hosts.far_address}, port: 443, tls: {{mode: {mode}{ca}}}}}]\n"


def run(
    job: SteeredJob, far: HttpsFar, url: str, *options: str, ca: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return job.run(*far.curl(url, *options, ca=ca or job.authority / "authority.pem"))


def test_masked_denied_and_recorded(far: HttpsFar, tmp_path: Path) -> None:
    job = job_of(far, tmp_path, target=declared(far))
    before = len(far.log())
    done = run(job, far, f"https://{NAME}/customers.json")
    assert done.stdout == json.dumps(CUSTOMERS).replace("123-45-6789", "[redacted]"), done.stderr
    done = run(job, far, f"https://{NAME}/customers.json", "-X", "DELETE")
    assert json.loads(done.stdout)["rule"] == "no-delete"
    assert len(far.log()) == before + 1
    requests = job.records("request")
    assert [(r["operation"]["method"], r["verdict"]["action"]) for r in requests] == [
        ("GET", "mask"),
        ("DELETE", "deny"),
    ]
    assert not job.records("gap")
    assert verify(job.audit).ok
    raw = b"".join(path.read_bytes() for path in job.audit.rglob("*") if path.is_file())
    assert b"123-45-6789" not in raw
    assert b"PRIVATE KEY" not in b"".join(p.read_bytes() for p in job.audit.rglob("*.frames"))


def test_an_unchanged_command_trusts_what_it_is_given(far: HttpsFar, tmp_path: Path) -> None:
    """`exec` names the authority to every runtime: nothing on the command line does."""
    job = job_of(far, tmp_path, target=declared(far))
    resolve = f"{NAME}:443:{far.hosts.far_address}"
    done = job.run("curl", "-sS", "--max-time", "60", "--resolve", resolve, f"https://{NAME}/customers.json")
    assert "[redacted]" in done.stdout, done.stderr
    code = (
        "import socket, urllib.request\n"
        "dial = socket.create_connection\n"
        f"socket.create_connection = lambda to, *a, **k: dial(('{far.hosts.far_address}', 443), 30)\n"
        f"print(urllib.request.urlopen('https://{NAME}/customers.json').read().decode())\n"
    )
    done = job.run(sys.executable, "-c", code)
    assert "[redacted]" in done.stdout, done.stderr


def test_a_kept_connection_and_python(far: HttpsFar, tmp_path: Path) -> None:
    job = job_of(far, tmp_path, target=declared(far))
    code = (
        "import ssl, sys, http.client, socket\n"
        "context = ssl.create_default_context(cafile=sys.argv[1])\n"
        f"connection = http.client.HTTPSConnection('{NAME}', context=context)\n"
        f"connection._create_connection = lambda *a, **k: socket.create_connection(('{far.hosts.far_address}', 443), 30)\n"
        "for _ in range(20):\n"
        "    connection.request('GET', '/customers.json'); body = connection.getresponse().read()\n"
        "print(body.decode(), connection.sock.version())\n"
    )
    done = job.run(sys.executable, "-c", code, str(job.authority / "authority.pem"))
    assert "[redacted]" in done.stdout, done.stderr
    assert "TLSv1.3" in done.stdout
    assert len(job.records("open")) == 1
    assert len(job.records("request")) == 20


@pytest.mark.parametrize(
    ("name", "words"),
    [(EXPIRED, "certificate has expired"), (OTHER, "unable to get local issuer certificate")],
)
def test_a_bad_server_is_never_hidden(far: HttpsFar, tmp_path: Path, name: str, words: str) -> None:
    job = job_of(far, tmp_path, target=declared(far))
    before = len(far.log())
    done = run(job, far, f"https://{name}/customers.json")
    document = json.loads(done.stdout)
    assert (document["status"], document["title"]) == (503, "Sidecar: Service Unavailable")
    assert words in document["detail"]
    assert len(far.log()) == before
    assert job.records("close")[-1]["reason"] == "upstream_tls"


def test_a_client_that_does_not_trust_us_and_passthrough_for_it(far: HttpsFar, tmp_path: Path) -> None:
    job = job_of(far, tmp_path / "a", target=declared(far))
    done = run(job, far, f"https://{NAME}/customers.json", ca=far.ca)
    assert done.returncode == 60, done.stderr
    (gap,) = job.records("gap")
    assert gap["reason"] == "leaf_rejected"
    assert "tls: {mode: passthrough}" in gap["detail"]
    passing = job_of(far, tmp_path / "b", target=declared(far, "passthrough"))
    done = run(passing, far, f"https://{NAME}/customers.json", ca=far.ca)
    assert json.loads(done.stdout) == CUSTOMERS
    assert [row["target"]["protocol"] for row in passing.records("open")] == ["opaque"]


def test_only_what_is_declared_or_named_is_opened(far: HttpsFar, tmp_path: Path) -> None:
    """Without a target: `api.internal` is named by a rule, and its certificate is none of the system's; a host that nobody names is relayed."""
    job = job_of(far, tmp_path / "named")
    done = run(job, far, f"https://{NAME}/customers.json")
    assert "unable to get local issuer certificate" in json.loads(done.stdout)["detail"]
    other = (
        "version: 1\nrules: [{name: n, when: {protocol: http, host: else.example, method: [PUT]}, deny: x}]\n"
    )
    job = job_of(far, tmp_path / "not", policy=other)
    done = run(job, far, f"https://{NAME}/customers.json", ca=far.ca)
    assert json.loads(done.stdout) == CUSTOMERS
    job = job_of(far, tmp_path / "all", policy=other, decrypt="all")
    done = run(job, far, f"https://{NAME}/customers.json")
    assert "unable to get local issuer certificate" in json.loads(done.stdout)["detail"]


def test_a_long_download_in_bounded_memory(far: HttpsFar, tmp_path: Path) -> None:
    job = job_of(far, tmp_path, target=declared(far), policy="version: 1\n")
    done = run(job, far, f"https://{NAME}/big", "-o", "/dev/null", "-w", "%{size_download}")
    assert int(done.stdout) == BIG_BYTES, done.stderr
