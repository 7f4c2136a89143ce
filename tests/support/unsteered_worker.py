"""The real worker (uvloop, driver, spool file, session) in a process of its own, before one server, without a kernel that steers.

Only two answers are played: where the client meant to go (conntrack knows nothing of a connection that was not redirected), and the
supervisor's word on who the client is. Run by hand, it lends any client's own test suite a port:

    python -m tests.support.unsteered_worker '{"upstream": ["127.0.0.1", 5432], "directory": "/tmp/x"}'
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import uvloop

from sidecar.audit.encode import decode_record
from sidecar.audit.segment import frames
from sidecar.audit.writer import SEGMENT_BYTES
from sidecar.model.flow import Address, FlowFacts, Target
from sidecar.model.ids import IdSource
from sidecar.model.workload import Workload
from sidecar.proxy import link
from sidecar.proxy import worker as worker_module

ROOT = Path(__file__).parents[2]
STREAM = "0190a000-0000-7000-8000-000000000001"


class UnsteeredWorker:
    """Context manager; `address` is where clients connect. `policy` is a document's text."""

    def __init__(
        self, upstream: Address, directory: Path, *, policy: str | None = None, **options: Any
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._options = {"upstream": [upstream.host, upstream.port], "policy": policy, "directory": str(directory), **options}  # fmt: skip
        self.address = upstream

    def __enter__(self) -> UnsteeredWorker:
        self._log = (self.directory / "log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.unsteered_worker", json.dumps(self._options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, cwd=ROOT,
        )  # fmt: skip
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], 30)[0]:
            self.process.kill()
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(10)
            self._log.close()
            raise AssertionError(self.log())
        self.address = Address("127.0.0.1", int(line))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.process.communicate(timeout=20)  # its stdin ends: it drains and goes
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        finally:
            self._log.close()
        assert "Traceback" not in self.log(), self.log()
        assert kind is not None or self.process.returncode == 0, self.log()

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.directory.glob("*.frames")):
            for _, _, record in frames(path.read_bytes(), 0):
                found.append(decode_record(record))
        return [record for record in found if kind is None or record["kind"] == kind]

    def memory(self, name: str = "VmHWM") -> int:
        """Bytes of resident memory: the highest so far, or (`VmRSS`) now."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise AssertionError(name)

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


class _Supervisor:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.upstream = Address(*options["upstream"])
        self.directory = Path(options["directory"])
        self.ids = IdSource()
        self.segments = 0
        worker_module.original_destination = lambda sock: self.upstream  # type: ignore[assignment]
        ours, theirs = link.link_pair()
        listener = socket.create_server(("127.0.0.1", options.get("port", 0)))
        self.port = listener.getsockname()[1]
        self.ready = asyncio.Event()
        self.link = link.Link(ours, link.FromWorker, self.message, lambda: None)
        self.worker = worker_module.Worker(theirs, [listener])

    def message(self, message: Any, descriptors: list[int]) -> None:
        match message:
            case link.Hello():
                ca = self.options.get("tls_ca")
                self.link.send(
                    link.Configure(
                        host="host",
                        sync_strict=False,
                        on_full_drop=False,
                        segment_bytes=SEGMENT_BYTES,
                        request_max_bytes=65536,
                        response_max_rows=100,
                        response_max_bytes=65536,
                        authorities={ca: Path(ca).read_text()} if ca else {},
                    )
                )
                self.link.send(link.PolicyText(self.options.get("policy"), "policy.yaml", "test"))
                self.segment()
            case link.NeedSegment():
                self.segment()
            case link.Ready():
                self.ready.set()
            case link.Resolve():
                now, client = time.time_ns(), Address(message.peer_host, message.peer_port)
                host = self.options.get("host")
                target = Target(
                    self.upstream, host or self.upstream.host, "target" if host else "address", "postgres",
                    (host,) if host else (), host, self.options.get("tls_mode"), self.options.get("tls_ca"),
                )  # fmt: skip
                facts = FlowFacts(
                    self.ids.new(now), now, client, target, None, Workload(),
                    client_wants_tls=self.options.get("client_wants_tls", False),
                )  # fmt: skip
                self.link.send(link.Resolved(message.id, facts))

    def segment(self) -> None:
        self.segments += 1
        path = self.directory / f"{self.segments:06d}.frames"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self.link.send(link.Segment(STREAM, bytes(32), 0), (descriptor,), lambda: os.close(descriptor))

    def fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A worker that raises where nobody catches it has to fail the test."""
        loop.default_exception_handler(context)
        os._exit(1)

    async def run(self) -> int:
        asyncio.get_running_loop().set_exception_handler(self.fault)
        await self.ready.wait()
        print(self.port, flush=True)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin.fileno(), ended.set)
        await ended.wait()
        loop.remove_reader(sys.stdin.fileno())
        self.link.send(link.Drain(1.0))
        return await self.worker.stopped


async def _main(options: dict[str, Any]) -> int:
    return await _Supervisor(options).run()


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    worker_module.raise_descriptor_limit()
    sys.exit(uvloop.run(_main(json.loads(sys.argv[1]))))
