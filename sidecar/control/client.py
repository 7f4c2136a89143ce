"""The commands' side of the control socket: synchronous, one connection a client, every wait bounded."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import msgspec

from sidecar.control import protocol
from sidecar.control.protocol import FlowRow, HoldView, Reply, Request, Status
from sidecar.errors import ControlError

CONNECT_TIMEOUT_S: Final = 2.0
ANSWER_TIMEOUT_S: Final = 15.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Instance:
    """A live agent on this host."""

    instance: str
    path: Path


def discover(directory: Path = protocol.RUN_DIRECTORY) -> list[Instance]:
    """All instances whose control socket accepts, by name."""
    from sidecar.control.server import is_live

    found = []
    with contextlib.suppress(FileNotFoundError):
        for entry in sorted(directory.iterdir()):
            path = entry / protocol.SOCKET_NAME
            if is_live(path):
                found.append(Instance(entry.name, path))
    return found


class ControlClient:
    """One connection to one agent. Every method raises ControlError where it is refused, unanswered or not understood."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(CONNECT_TIMEOUT_S)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise ControlError(
                f"no agent answers on {path}: {error.strerror or error}", hint="sidecar status"
            ) from error
        self._socket.settimeout(ANSWER_TIMEOUT_S)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def status(self) -> Status:
        return self._call("status", Status)

    def flows(self) -> list[FlowRow]:
        return self._call("flows", list[FlowRow])

    def watch_flows(self) -> Iterator[list[FlowRow]]:
        """The open flows, again every second, until the agent ends or the caller closes the client."""
        self._send(Request("watch_flows"))
        while True:
            reply = self._receive()
            yield _convert(reply, list[FlowRow])
            if not reply.more:
                return

    def holds(self) -> list[HoldView]:
        return self._call("holds", list[HoldView])

    def hold(self, hold_id: str) -> HoldView:
        return self._call("hold", HoldView, id=hold_id)

    def decide(self, hold_id: str, approve: bool, by: str = "", reason: str = "") -> HoldView:
        """`by` is a label that only root may give (the web page); who decides is what the kernel says."""
        return self._call("decide", HoldView, id=hold_id, approve=approve, by=by, reason=reason)

    def why(self, record_id: str) -> dict[str, Any]:
        return self._call("why", dict[str, Any], id=record_id)

    def reload(self) -> None:
        self._call("reload", type(None))

    def stop(self) -> None:
        self._call("stop", type(None))

    def _call(self, method: str, type_: type[T], **args: Any) -> T:
        self._send(Request(method, args))
        return _convert(self._receive(), type_)

    def _send(self, request: Request) -> None:
        try:
            self._socket.sendall(protocol.encode(request))
        except OSError as error:
            raise self._lost(error) from error

    def _receive(self) -> Reply:
        size = int.from_bytes(self._exactly(4), "big")
        if size > protocol.MAX_REPLY_BYTES:
            raise ControlError(f"the agent on {self._path} sent a reply of {size} bytes")
        reply = protocol.decode_reply(self._exactly(size))
        if reply.error is not None:
            raise ControlError(reply.error, hint=reply.hint)
        return reply

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self._socket.recv(min(size - len(data), 65_536))
            except OSError as error:
                raise self._lost(error) from error
            if not part:
                raise ControlError(f"the agent on {self._path} closed the connection", hint="sidecar status")
            data += part
        return bytes(data)

    def _lost(self, error: OSError) -> ControlError:
        reason = "no answer in time" if isinstance(error, TimeoutError) else (error.strerror or str(error))
        return ControlError(f"the agent on {self._path}: {reason}", hint="sidecar status")


def _convert(reply: Reply, type_: type[T]) -> T:
    try:
        return msgspec.convert(reply.result, type_, str_keys=False)
    except msgspec.ValidationError as error:
        raise ControlError(
            f"the agent's answer is not understood: {error}", hint="is the agent of another version?"
        ) from error
