"""The collector that `sidecar run` serves itself where the configuration names no `upstream`: a child process, started again when it
ends. The listening socket is the supervisor's, bound once and handed to each child: as long as the supervisor lives nobody else can
have the address, and what is shipped while no child accepts waits for the next one. Nothing is shipped before it is bound.
"""

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
BACKLOG: Final = 128
RETRY_S: Final = 5.0


class EmbeddedCollector:
    """`serve` runs until it is cancelled; `stop` ends the child and gives the address up."""

    def __init__(self, data: Path, on_listening: Callable[[], None], *, port: int = PORT) -> None:
        """`on_listening` is called whenever a child serves."""
        self.listen = f"{HOST}:{port}"
        self.address = f"http://{self.listen}"
        self.error: str | None = None
        """Why it does not serve at the moment."""
        self._port = port
        self._data = data
        self._on_listening = on_listening
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    async def serve(self) -> None:
        while True:
            await self._serve_once()
            await asyncio.sleep(RETRY_S)

    async def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            await asyncio.to_thread(self._process.wait)
        if self._socket is not None:
            self._socket.close()

    async def _serve_once(self) -> None:
        """From the start of a child to its end."""
        try:
            listening = self._socket = self._socket or _bind(self._port)
        except OSError as error:
            self._failed(f"{self.listen} is taken by another program (ss -ltnp says which): {error.strerror}")
            return
        descriptor = listening.fileno()
        link, its_link = (
            socket.socketpair()
        )  # its standard input: it says that it serves, and ends when we have gone
        with link:
            with its_link:
                self._process = process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "sidecar.cli", "collector"),
                        *("--listen-fd", str(descriptor), "--data", str(self._data)),
                    ],
                    stdin=its_link.fileno(),
                    stdout=sys.stderr,
                    pass_fds=(descriptor,),
                )
            link.setblocking(False)
            if await _says_ready(link):
                self.error = None
                self._on_listening()
            await asyncio.to_thread(process.wait)
        self._failed(f"it ended with status {process.returncode}")

    def _failed(self, reason: str) -> None:
        said = f"the embedded collector does not serve: {reason}"
        if said != self.error:
            log.error("%s; records stay in the spool, trying again every %.0f s", said, RETRY_S)
        self.error = said


async def _says_ready(link: socket.socket) -> bool:
    """False where it ended before."""
    try:
        return bool(await asyncio.get_running_loop().sock_recv(link, 1))
    except ConnectionError:
        return False


def _bind(port: int) -> socket.socket:
    """Raises OSError. Without SO_REUSEPORT: nobody can bind the address beside us."""
    made = socket.socket()
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((HOST, port))
        made.listen(BACKLOG)
    except OSError:
        made.close()
        raise
    return made
