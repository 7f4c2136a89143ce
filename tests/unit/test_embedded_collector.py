"""The collector of `sidecar run`: shipped to only while it is ours and listens; started again when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from sidecar import embedded_collector
from sidecar.embedded_collector import EmbeddedCollector
from tests.support.free_port import free_port


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
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)
