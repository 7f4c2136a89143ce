"""Which client runtimes of this host trust the local authority: each is started, and really connects to a small server of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.errors import TrustError
from sidecar.tls import environment
from sidecar.tls.authority import Authority
from sidecar.tls.loopback import Loopback

CLIENT_TIMEOUT_S: Final = 20.0
"""A Java that compiles its probe needs two."""

_PYTHON: Final = """
import socket, ssl, sys
name, port = sys.argv[1], int(sys.argv[2])
with ssl.create_default_context().wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname=name) as s:
    s.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n"); s.recv(100)
"""
_REQUESTS: Final = """
import socket, sys
import requests
name, port = sys.argv[1], int(sys.argv[2])
real = socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **options: real("127.0.0.1", *rest, **options)
requests.get(f"https://{name}:{port}/", timeout=10)
"""
_NODE: Final = """
const [name, port] = process.argv.slice(1);
const s = require("tls").connect({host: "127.0.0.1", port: Number(port), servername: name}, () => s.write("GET / HTTP/1.0\\r\\n\\r\\n"));
s.on("data", () => s.destroy()); s.on("error", (e) => { console.error(e.message); process.exit(1); });
"""
_JAVA: Final = """
import java.net.Socket;
import javax.net.ssl.*;
class Probe {
    public static void main(String[] words) throws Exception {
        int port = Integer.parseInt(words[1]);
        SSLSocketFactory factory = (SSLSocketFactory) SSLSocketFactory.getDefault();
        try (SSLSocket s = (SSLSocket) factory.createSocket(new Socket("127.0.0.1", port), words[0], port, true)) {
            SSLParameters p = s.getSSLParameters();
            p.setEndpointIdentificationAlgorithm("HTTPS");
            s.setSSLParameters(p);
            s.getOutputStream().write("GET / HTTP/1.0\\r\\n\\r\\n".getBytes());
            s.getInputStream().read();
        }
    }
}
"""

_CLIENTS: Final[dict[str, tuple[str, ...]]] = {
    "curl": ("curl", "-sS", "--noproxy", "*", "-o", "/dev/null", "--resolve", "NAME:PORT:127.0.0.1", "https://NAME:PORT/"),
    "OpenSSL": (
        "openssl", "s_client", "-quiet", "-verify_return_error", "-servername", "NAME", "-verify_hostname", "NAME",
        "-connect", "127.0.0.1:PORT",
    ),
    "Python ssl": ("python3", "-c", _PYTHON, "NAME", "PORT"),
    "Python requests (certifi)": ("python3", "-c", _REQUESTS, "NAME", "PORT"),
    "Node": ("node", "-e", _NODE, "NAME", "PORT"),
    "Java": ("java", "DIR/Probe.java", "NAME", "PORT"),
    "git": (
        "git", "-c", "http.curloptResolve=NAME:PORT:127.0.0.1", "-c", "http.proxy=", "ls-remote", "https://NAME:PORT/probe",
    ),
}  # fmt: skip
"""Go programs read the system's store, as OpenSSL does, and have no runtime that could be asked."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`alone`: it trusts the authority by itself; `told`: with the variables that `exec` sets. Both None: it could not be tried."""

    runtime: str
    alone: bool | None
    told: bool | None
    detail: str


def verdicts(authority: Authority, path: str | None = None) -> list[Verdict]:
    """Of each runtime on `path` (our own PATH). Takes some 50 ms each, Java seconds. Raises TrustError where there is no name to try
    with, OSError."""
    name = _name(authority)
    with tempfile.TemporaryDirectory(prefix="sidecar-doctor-") as made:
        directory = Path(made)
        (directory / "Probe.java").write_text(_JAVA)
        variables = environment.for_command({}, authority.certificate_pem, directory / "tls")
        plain = {"PATH": path or os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "HOME": made}
        return [
            _verdict(runtime, authority, name, directory, plain, variables)
            for runtime, argv in _CLIENTS.items()
            if shutil.which(argv[0], path=plain["PATH"])
        ]


def _name(authority: Authority) -> str:
    if authority.permitted.everything:
        return "localhost"
    if not authority.permitted.domains:
        raise TrustError("the authority vouches for addresses only, and none of them is a client's own")
    return "sidecar-doctor." + authority.permitted.domains[0]


def _verdict(
    runtime: str,
    authority: Authority,
    name: str,
    directory: Path,
    plain: Mapping[str, str],
    variables: Mapping[str, str],
) -> Verdict:
    alone, said = _try(runtime, authority, name, directory, plain)
    if alone is None:
        return Verdict(runtime, None, None, f"could not be tried: {said}")
    if alone:
        return Verdict(runtime, True, True, "trusts the local authority")
    told, said = _try(runtime, authority, name, directory, {**plain, **variables})
    if told:
        return Verdict(
            runtime, False, True, "trusts the local authority with the variables of exec and ca.env only"
        )
    return Verdict(runtime, False, False, f"does not trust the local authority: {said}")


def _try(
    runtime: str, authority: Authority, name: str, directory: Path, environ: Mapping[str, str]
) -> tuple[bool | None, str]:
    """Whether it got an answer, None where it never came; and the last that it said."""
    with Loopback(authority.leaf((name,))) as server:
        argv = [
            word.replace("NAME", name).replace("PORT", str(server.port)).replace("DIR", str(directory))
            for word in _CLIENTS[runtime]
        ]
        try:
            done = subprocess.run(
                argv,
                env=dict(environ),
                cwd=directory,
                input=b"GET / HTTP/1.0\r\n\r\n",
                capture_output=True,
                timeout=CLIENT_TIMEOUT_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return (True if server.answered else None), str(error)[:200]
        lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        said = next((line for line in lines if "certif" in line.lower() or "error" in line.lower()), "")
        return (server.answered > 0 if server.reached else None), (
            said or (lines or ["it says nothing"])[-1]
        ).strip()[:200]
