"""The commands' side of the control socket: synchronous, one connection a client, every wait bounded."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import msgspec

from sidecar.control import protocol
from sidecar.control.protocol import FlowRow, HoldView, Reply, Request, Status
from sidecar.errors import ControlError, NotAllowedError

CONNECT_TIMEOUT_S: Final = 2.0
ANSWER_TIMEOUT_S: Final = 15.0
INSTANCE_NAME: Final = re.compile(r"[0-9a-f]{8}")
MIN_SHORT_ID: Final = 4
"""Digits of an id's end that are looked for."""

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


def known_instances(directory: Path = protocol.RUN_DIRECTORY) -> list[str]:
    """Names of all instances that have a run directory, live or dead."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(entry.name for entry in directory.iterdir() if INSTANCE_NAME.fullmatch(entry.name))
    return []


class ControlClient:
    """One connection to one agent. Every method raises ControlError where it is refused, unanswered or not
    understood."""

    def __init__(self, path: Path) -> None:
        self.path = path
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
            raise ControlError(f"the agent on {self.path} sent a reply of {size} bytes")
        reply = protocol.decode_reply(self._exactly(size))
        if reply.error is not None:
            kind = NotAllowedError if reply.kind == "not_allowed" else ControlError
            raise kind(reply.error, hint=reply.hint)
        return reply

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self._socket.recv(min(size - len(data), 65_536))
            except OSError as error:
                raise self._lost(error) from error
            if not part:
                raise ControlError(f"the agent on {self.path} closed the connection", hint="sidecar status")
            data += part
        return bytes(data)

    def _lost(self, error: OSError) -> ControlError:
        reason = "no answer in time" if isinstance(error, TimeoutError) else (error.strerror or str(error))
        return ControlError(f"the agent on {self.path}: {reason}", hint="sidecar status")


def _convert(reply: Reply, type_: type[T]) -> T:
    try:
        return msgspec.convert(reply.result, type_, str_keys=False)
    except msgspec.ValidationError as error:
        raise ControlError(
            f"the agent's answer is not understood: {error}", hint="is the agent of another version?"
        ) from error


class Approvals:
    """The holds of all live instances. Implements the collector's `ApprovalsGateway` for the page of `sidecar
    run`."""

    def __init__(self, directory: Path = protocol.RUN_DIRECTORY) -> None:
        self._directory = directory

    def views(self) -> list[HoldView]:
        """All holds that we may see."""
        found: list[HoldView] = []
        for client in self._clients():
            found += client.holds()
        return found

    def find(self, hold_id: str) -> HoldView:
        """By its id, or by the end of it that people type. Raises ControlError where there is none, or more
        than one."""
        return self._find(hold_id)[0]

    def decide_view(self, hold_id: str, approve: bool, *, by: str = "", reason: str = "") -> HoldView:
        view, path = self._find(hold_id)
        with ControlClient(path) as client:
            return client.decide(view.id, approve, by, reason)

    def _find(self, hold_id: str) -> tuple[HoldView, Path]:
        if len(hold_id) < MIN_SHORT_ID:
            raise ControlError(f"an id has at least {MIN_SHORT_ID} digits", hint="sidecar approvals list")
        found: list[tuple[HoldView, Path]] = []
        for client in self._clients():
            found += [(view, client.path) for view in client.holds() if view.id.endswith(hold_id)]
        if not found:
            raise ControlError(f"there is no hold {hold_id}", hint="sidecar approvals list")
        if len(found) > 1:
            raise ControlError(f"{len(found)} holds end in {hold_id}", hint="give more digits of the id")
        return found[0]

    def _clients(self) -> Iterator[ControlClient]:
        for instance in discover(self._directory):
            try:
                client = ControlClient(instance.path)
            except ControlError:
                continue  # it has just ended
            with client:
                yield client
