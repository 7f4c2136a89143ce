"""The collector that `sidecar run` serves itself where the configuration names no `upstream`: a child process, started
again when it ends. Records are shipped to it only once it listens, and never while something else has its address."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"
PORT: Final = 8420
RETRY_S: Final = 5.0
LOOK_S: Final = 0.1


class EmbeddedCollector:
    """`serve` runs until it is cancelled; `stop` ends the child."""

    def __init__(self, data: Path, on_listening: Callable[[], None], *, port: int = PORT) -> None:
        self.listen = f"{HOST}:{port}"
        self.address = f"http://{self.listen}"
        self.error: str | None = None
        """Why it does not serve at the moment."""
        self._port = port
        self._data = data
        self._on_listening = on_listening
        self._process: subprocess.Popen[bytes] | None = None

    async def serve(self) -> None:
        while True:
            await self._serve_once()
            await asyncio.sleep(RETRY_S)

    async def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            await asyncio.to_thread(self._process.wait)

    async def _serve_once(self) -> None:
        """From the start of a child to its end."""
        if not _is_free(self._port):
            self._failed(f"{self.listen} is taken by another program (ss -ltnp says which)")
            return
        self._process = process = subprocess.Popen(
            [
                *(sys.executable, "-m", "sidecar.cli", "collector"),
                *("--listen", self.listen, "--data", str(self._data)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
        )
        while process.poll() is None and _is_free(self._port):  # noqa: ASYNC110 - another process's socket
            await asyncio.sleep(LOOK_S)
        if process.poll() is None:
            self.error = None
            self._on_listening()
        await asyncio.to_thread(process.wait)
        self._failed(f"it ended with status {process.returncode}")

    def _failed(self, reason: str) -> None:
        said = f"the embedded collector does not serve: {reason}"
        if said != self.error:
            log.error("%s; records stay in the spool, trying again every %.0f s", said, RETRY_S)
        self.error = said


def _is_free(port: int) -> bool:
    """Whether nobody listens there, asked without connecting to whoever does."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True
