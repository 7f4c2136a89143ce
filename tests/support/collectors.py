"""Collectors for tests: the real one as a process, and one that answers what the test wants."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from sidecar.audit.batch import Batch
from sidecar.collector.store import Store
from tests.support.free_port import free_port

Answer: TypeAlias = Callable[["OddCollector", http.server.BaseHTTPRequestHandler, bytes], None]


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not come about")
        time.sleep(0.02)


class CollectorProcess:
    """`sidecar collector` on a free port; can be killed and started again on the same data."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "sidecar.cli", "collector"]
        self._process = subprocess.Popen(
            [*command, "--listen", f"127.0.0.1:{self.port}", "--data", str(self.data)],
            stderr=subprocess.PIPE,
        )
        assert self._process.stderr is not None
        line = self._process.stderr.readline().decode()
        if self.url not in line:
            raise RuntimeError(line)

    def kill(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stderr.close()
        self._process = None

    def __enter__(self) -> CollectorProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.kill()


class OddCollector:
    """Over a real store; `answer` says what is sent back."""

    def __init__(self, data: Path, answer: Answer) -> None:
        self.store = Store(data)
        self.answer = answer
        self.asked = 0
        odd = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                odd.asked += 1
                body = self.rfile.read(int(self.headers["content-length"]))
                try:
                    odd.answer(odd, self, body)
                except OSError:
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def receipt(self, body: bytes) -> dict[str, Any]:
        return self.store.receipt(self.store.ingest(Batch.decode(body), time.time_ns()), time.time_ns())

    def __enter__(self) -> OddCollector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.store.close()


def send(handler: http.server.BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
