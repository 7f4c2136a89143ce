"""Tokens that do not verify, as the job's own clients see it: psql and curl are denied and told why, nothing
arrives, and the reason is in the record and in `sidecar why`."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.free_port import free_port
from tests.support.postgres_server import PostgresServer
from tests.support.tokens import Issuer, new_key

pytestmark = [pytest.mark.root, pytest.mark.servers]

SIDECAR = Path(sys.executable).with_name("sidecar")


class Api(http.server.ThreadingHTTPServer):
    """Counts what arrives."""

    def __init__(self) -> None:
        self.arrived = 0
        super().__init__(("127.0.0.1", 0), Answer)


class Answer(http.server.BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        self.server.arrived += 1
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        del format, arguments


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    with Api() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


@pytest.fixture(scope="module")
def database() -> Iterator[PostgresServer]:
    with PostgresServer(port=free_port()) as server:
        server.sql("CREATE SEQUENCE arrived")
        yield server


@pytest.mark.parametrize("reason", ["expired", "wrong_audience", "bad_signature", "malformed", "no_token"])
def test_psql_and_curl_are_told_why(reason: str, api: Api, database: PostgresServer, tmp_path: Path) -> None:
    issuer = Issuer()
    token = {
        "expired": issuer.token(exp=1_700_000_000),
        "wrong_audience": issuer.token(aud="somebody-else"),
        "bad_signature": issuer.token(key=new_key("another"), headers={"kid": "key-1"}),
        "malformed": "no token at all",
        "no_token": "",
    }[reason]
    config = tmp_path / "sidecar.yaml"
    config.write_text(
        issuer.configuration(issuer.jwks(tmp_path)).replace("identity:\n", "identity:\n  required: true\n")
        + f"steering:\n  ports: {{{database.port}: postgres, {api.server_port}: http}}\n"
        f"audit: {{directory: {tmp_path / 'audit'}}}\n"
    )
    job = tmp_path / "job.sh"
    job.write_text(
        f"psql -X -h 127.0.0.1 -p {database.port} -U postgres -c \"SELECT nextval('arrived')\"\n"
        f"echo psql $?\ncurl -sS -m 10 -w ' %{{http_code}}\\n' http://127.0.0.1:{api.server_port}/\n"
    )
    before = api.arrived
    done = subprocess.run(
        [
            SIDECAR,
            "exec",
            "-c",
            config,
            "--",
            "env",
            *([f"SIDECAR_ID_TOKEN={token}"] if token else []),
            "sh",
            job,
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    said = (
        f"denied by policy: identity.required: a verified identity is required and there is none ({reason})"
    )
    assert said in done.stderr, done.stderr + done.stdout
    assert "FATAL" in done.stderr
    psql, problem = done.stdout.splitlines()
    assert psql == "psql 2"
    assert problem.endswith(" 403")
    assert json.loads(problem.removesuffix(" 403"))["detail"] == said
    assert api.arrived == before
    assert database.sql("SELECT is_called FROM arrived") == "f"

    named = re.search(r"sidecar why ([0-9a-f]{8})", done.stderr)
    assert named is not None
    why = subprocess.run(
        [SIDECAR, "why", named[1], "--directory", tmp_path / "audit"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert f"no principal: {reason}: " in why.stdout, why.stdout + why.stderr
    assert "give the job a token that verifies" in why.stdout
    recorded = b"".join(path.read_bytes() for path in (tmp_path / "audit").rglob("*") if path.is_file())
    assert reason.encode() in recorded
    assert not token or token.encode() not in recorded
