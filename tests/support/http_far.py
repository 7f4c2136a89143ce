"""HTTP servers of the far host: nginx of the distribution on port 80, and an ASGI program under uvicorn on port 8080."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.far_host import FarHost

ROOT = Path(__file__).parents[2]
NGINX = """\
daemon off; user root; worker_processes 1; pid {directory}/pid; error_log {directory}/error.log;
events {{ worker_connections 256; }}
http {{
  log_format short '$connection $connection_requests $request_method $uri';
  access_log {directory}/access.log short;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
  sendfile on; gzip on; gzip_types application/json; gzip_min_length 1; keepalive_requests 1000;
  types {{ application/json json; text/html html; }}
  server {{ listen {address}:80; root {directory}/www; }}
}}
"""
CUSTOMERS = {"customers": [{"id": 12345678901234567890, "ssn": "123-45-6789"}], "rate": 0.10}


def in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


class HttpFar:
    """Context manager. `big_bytes` is the size of nginx's /big (a sparse file); `address` one of the far host's, else its IPv4 one."""

    def __init__(self, hosts: FarHost, *, big_bytes: int = 0, address: str = "") -> None:
        self.hosts = hosts
        self.address = address or hosts.far_address
        self.directory = Path(tempfile.mkdtemp(prefix="sidecar-http-"))
        self.big_bytes = big_bytes
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> HttpFar:
        www = self.directory / "www"
        www.mkdir()
        (www / "customers.json").write_text(json.dumps(CUSTOMERS))
        (www / "page.html").write_text("<p>123-45-6789</p>")
        with (www / "big").open("wb") as file:
            file.truncate(self.big_bytes)
        (self.directory / "nginx.conf").write_text(
            NGINX.format(directory=self.directory, address=in_url(self.address))
        )
        try:
            far = self.hosts.far
            self._processes = [
                self.hosts.popen(far, ["nginx", "-p", str(self.directory), "-c", "nginx.conf"]),
                self.hosts.popen(
                    far,
                    [sys.executable, "-m", "tests.support.http_far", self.address],
                    cwd=ROOT,
                ),
            ]
            deadline = time.monotonic() + 20
            while not all(self._answers(port) for port in (80, 8080)):
                assert time.monotonic() < deadline, "the far host's HTTP servers do not start"
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _answers(self, port: int) -> bool:
        url = f"http://{in_url(self.address)}:{port}/"
        return self.hosts.run(self.hosts.far, ["curl", "-s", "-o", "/dev/null", url]).returncode == 0

    def ask(self, path: str) -> Any:
        """The ASGI program's JSON, asked from its own host, past everything."""
        url = f"http://{in_url(self.address)}:8080{path}"
        return json.loads(self.hosts.run(self.hosts.far, ["curl", "-s", url]).stdout)

    def nginx_log(self) -> list[list[str]]:
        """(connection, its request's number, method, path) of every request."""
        return [line.split() for line in (self.directory / "access.log").read_text().splitlines()]

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        shutil.rmtree(self.directory, ignore_errors=True)


class Api:
    """The ASGI program. Remembers what it got and how much it could send."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.sent = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        if path == "/requests":
            await self._json(send, self.requests)
            return
        if path == "/sent":
            await self._json(send, self.sent)
            return
        size, more = 0, True
        while more:
            event = await receive()
            size += len(event.get("body", b""))
            more = event.get("more_body", False)
        headers = [(name.decode(), value.decode("latin-1")) for name, value in scope["headers"]]
        seen = {
            "method": scope["method"],
            "path": path,
            "headers": headers,
            "body": size,
            "client": scope["client"],
        }
        self.requests.append(seen)
        if path == "/endless":
            await self._endless(send)
        elif path == "/customers":
            await self._json(send, CUSTOMERS)
        else:
            await self._json(send, seen)

    async def _json(self, send: Any, document: object) -> None:
        body = json.dumps(document).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _endless(self, send: Any) -> None:
        self.sent = 0
        await send({"type": "http.response.start", "status": 200, "headers": []})
        block = bytes(64 * 1024)
        while True:
            await send({"type": "http.response.body", "body": block, "more_body": True})
            self.sent += len(block)


def main(address: str) -> None:
    import uvicorn

    uvicorn.run(
        Api(), host=address, port=8080, log_level="error", timeout_keep_alive=60, timeout_graceful_shutdown=1
    )


if __name__ == "__main__":
    main(sys.argv[1])
