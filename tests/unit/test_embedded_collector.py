"""The collector of `sidecar run`: shipped to only while it is ours and listens; started again when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from sidecar import embedded_collector
from sidecar.audit.shipper import Shipper
from sidecar.audit.verify import verify
from sidecar.embedded_collector import EmbeddedCollector
from tests.support.free_port import free_port
from tests.support.spools import make_spool, request, writer_of


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.02)


def test_a_stranger_at_its_address_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_collector, "RETRY_S", 0.1)
    port = free_port()
    listening: list[float] = []

    async def story() -> None:
        collector = EmbeddedCollector(tmp_path / "data", lambda: listening.append(0.0), port=port)
        with socket.create_server(("127.0.0.1", port)) as stranger:
            stranger.settimeout(0.3)
            serving = asyncio.create_task(collector.serve())
            await _until(lambda: collector.error is not None)
            assert f"127.0.0.1:{port} is taken by another program" in str(collector.error)
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(stranger.accept)
            assert not listening
        await _until(lambda: bool(listening))
        assert collector.error is None
        answer = await asyncio.to_thread(httpx.get, collector.address, trust_env=False, timeout=20)
        assert answer.status_code == 200

        # It ends, which is said; then there is another one.
        assert collector._process is not None
        os.kill(collector._process.pid, signal.SIGKILL)
        await _until(lambda: collector.error is not None)
        assert "ended with status -9" in str(collector.error)
        await _until(lambda: len(listening) == 2)
        assert collector.error is None

        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        await collector.stop()

    asyncio.run(story())
    assert not _listens(port)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)


TAKE_IT = """
import os, socket, sys, time
port, taken, tried = int(sys.argv[1]), 0, 0
os.set_blocking(0, False)
while sys.stdin.buffer.read(1) is None:
    for host in ("127.0.0.1", "0.0.0.0", "::"):
        for option in (0, socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            with socket.socket(socket.AF_INET6 if host == "::" else socket.AF_INET) as stranger:
                if option:
                    stranger.setsockopt(socket.SOL_SOCKET, option, 1)
                if host == "::":
                    stranger.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                tried += 1
                try:
                    stranger.bind((host, port))
                    stranger.listen()
                    taken += 1
                except OSError:
                    pass
    time.sleep(0.002)
print(tried, taken)
"""


def test_nobody_takes_its_address_while_it_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another user nor we. What is shipped meanwhile waits for the next child, and is with it."""
    monkeypatch.setattr(embedded_collector, "RETRY_S", 0.5)
    port = free_port()
    spool = make_spool(tmp_path / "audit")
    writer = writer_of(spool.open_stream("w"))
    writer.append(request(0))
    spool.commit()

    async def story() -> None:
        begun: list[float] = []
        collector = EmbeddedCollector(tmp_path / "data", lambda: begun.append(0.0), port=port)
        serving = asyncio.create_task(collector.serve())
        await _until(lambda: bool(begun))
        shipper = Shipper(spool, collector.address, None, backoff_s=(0.05,))
        shipper.start()
        await _until(lambda: shipper.state().batches == 1)
        strangers = [
            subprocess.Popen(
                [sys.executable, "-c", TAKE_IT, str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                user=user,
            )
            for user in ((None, 65534) if os.geteuid() == 0 else (None,))
        ]
        await asyncio.sleep(0.2)
        assert collector._process is not None
        os.kill(collector._process.pid, signal.SIGKILL)
        await _until(lambda: collector.error is not None)
        writer.append(request(1))
        await asyncio.to_thread(spool.commit)
        await _until(lambda: shipper.state().batches == 2)
        assert len(begun) == 2
        for stranger in strangers:
            said, _ = await asyncio.to_thread(stranger.communicate)
            tried, taken = map(int, said.split())
            assert tried > 50
            assert taken == 0
        await shipper.stop(1.0)
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        await collector.stop()

    asyncio.run(story())
    spool.close()
    assert verify(spool.directory).ok


def test_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    """The supervisor is killed: the address is free for the next one."""
    port = free_port()
    started = f"""
import asyncio, pathlib
from sidecar.embedded_collector import EmbeddedCollector
asyncio.run(EmbeddedCollector(pathlib.Path({str(tmp_path)!r}), lambda: print("serves", flush=True), port={port}).serve())
"""
    with subprocess.Popen([sys.executable, "-c", started], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == b"serves\n"
        supervisor.kill()
    asyncio.run(_until(lambda: not _listens(port)))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
        return False
