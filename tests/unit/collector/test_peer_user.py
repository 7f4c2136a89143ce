"""Over loopback every user of the host reaches the pages; whose socket it is decides who may read."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sidecar.collector.guard import TOKEN_FILE
from sidecar.collector.peer_user import is_ours, user_of

SIDECAR = Path(sys.executable).with_name("sidecar")
NOBODY = 65534


@contextlib.contextmanager
def connected(host: str, through: str | None = None) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(client, server), the client by way of the address `through`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        client = socket.socket(socket.AF_INET6 if ":" in (through or host) else socket.AF_INET)
        with client:
            client.connect((through or host, listener.getsockname()[1]))
            server, _ = listener.accept()
            with server:
                yield client, server


def ends(server: socket.socket) -> tuple[tuple[str, int], tuple[str, int]]:
    """(client, server) as uvicorn puts them into its scope."""
    return server.getpeername()[:2], server.getsockname()[:2]


@pytest.mark.parametrize(
    ("host", "through"), [("127.0.0.1", None), ("::1", None), ("127.0.0.1", "::ffff:127.0.0.1")]
)
def test_a_connection_of_ours(host: str, through: str | None) -> None:
    with connected(host, through) as (_, server):
        assert user_of(*ends(server)) == os.geteuid()
        assert is_ours(*ends(server))


def test_a_socket_that_was_closed_is_nobodys() -> None:
    """The kernel shows user 0 for it: it must not count as root's."""
    with connected("127.0.0.1") as (client, server):
        client.close()
        assert user_of(*ends(server)) is None
        assert not is_ours(*ends(server))


def test_unknown_ends_are_nobodys() -> None:
    assert not is_ours(None, ("127.0.0.1", 1))
    assert user_of(("127.0.0.1", 1), ("127.0.0.1", 2)) is None
    assert user_of(("192.0.2.1", 1), ("127.0.0.1", 2), tables=(Path("/nonexistent"),)) is None


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with subprocess.Popen(
        [SIDECAR, "collector", "--listen", address, "--data", tmp_path / "data"], stderr=subprocess.PIPE
    ) as process:
        try:
            deadline = time.monotonic() + 20
            while True:
                try:
                    httpx.get(f"http://{address}/", timeout=5)
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield f"http://{address}"
        finally:
            process.terminate()


def as_nobody(url: str, *arguments: str) -> tuple[str, str]:
    """(status, body) of curl as another user."""
    done = subprocess.run(
        ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--",
         "curl", "-sS", "-w", "\n%{http_code}", *arguments, url],
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    body, _, status = done.stdout.rpartition("\n")
    return status, body


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_other_users_need_the_token(collector: str, tmp_path: Path) -> None:
    assert httpx.get(f"{collector}/v1/flows").status_code == 200
    assert as_nobody(f"{collector}/v1/flows")[0] == "401"
    page = as_nobody(f"{collector}/")[1]
    assert ("page's token is needed" in page.replace("&#39;", "'"), "<table" in page) == (True, False)
    # No header makes them somebody else.
    for header in ("X-Forwarded-For: 127.0.0.1", "Forwarded: for=127.0.0.1"):
        assert as_nobody(f"{collector}/v1/flows", "-H", header)[0] == "401"
    token = (tmp_path / "data" / TOKEN_FILE).read_text().strip()
    assert as_nobody(f"{collector}/v1/flows", "-H", f"Authorization: Bearer {token}")[0] == "200"
