"""The control socket's server: framing, bounds, and who may ask what. What is asked is answered by a
`ControlApi`.

The socket is open to every local user (0666), because whoever got an error may ask why; each request is
authorised by what the kernel says about its peer. The directory above it can be traversed and not listed
(0711).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidecar.approvals.grants import Decider, may_decide
from sidecar.control import protocol
from sidecar.control.peer import Peer, kinship, peer_of, user_name
from sidecar.control.protocol import ControlApi, HoldView, Reply, Request
from sidecar.errors import ControlError, SidecarError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that was not allowed; the agent records it."""

    ts_ns: int
    method: str
    subject: str
    """The hold or record that was asked for; empty where the method has none."""
    pid: int
    uid: int
    cause: str


class _NotAllowed(ControlError):
    pass


class ControlServer:
    """Serves one instance. `on_refusal` is called for each refused request, and must not block. Children of
    `relay_parent` (default: this process) may decide for others: the embedded collector's page does."""

    def __init__(
        self,
        path: Path,
        api: ControlApi,
        *,
        on_refusal: Callable[[Refusal], None] = lambda refusal: None,
        relay_parent: int | None = None,
    ) -> None:
        self._path = path
        self._api = api
        self._on_refusal = on_refusal
        self._relay_parent = os.getpid() if relay_parent is None else relay_parent
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._by_uid: Counter[int] = Counter()

    async def start(self) -> None:
        """Bind and listen. A socket file that a dead agent left is replaced; a live one is not.

        Raises ControlError where another agent answers on it.
        """
        self._path.parent.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._path.parent.mkdir(mode=0o711, exist_ok=True)
        self._path.parent.chmod(0o711)
        if is_live(self._path):
            raise ControlError(f"another agent answers on {self._path}", hint="sidecar status")
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(str(self._path))
            self._path.chmod(0o666)
            listener.listen(protocol.MAX_CLIENTS)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept(listener), name="control")

    async def close(self) -> None:
        """Stop, end what is being answered, remove the socket. Idempotent."""
        tasks = [task for task in (self._accepting, *self._clients) if task is not None]
        self._accepting = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = listener.accept()
                connection.setblocking(False)
            except BlockingIOError:
                await _readable(loop, listener)
                continue
            except OSError as error:  # out of descriptors: those in use will be freed
                log.warning("control socket: accept: %s", error.strerror)
                await asyncio.sleep(0.1)
                continue
            try:
                peer = peer_of(connection)
            except OSError as error:
                log.warning("control socket: no credentials of the peer: %s", error.strerror)
                connection.close()
                continue
            if len(self._clients) >= protocol.MAX_CLIENTS or (
                not peer.decider().is_operator and self._by_uid[peer.uid] >= protocol.MAX_CLIENTS_PER_UID
            ):
                _close(connection, peer)
                continue
            self._by_uid[peer.uid] += 1
            task = asyncio.create_task(self._serve(connection, peer))
            self._clients.add(task)
            # Also where the task is cancelled before its first step, which runs none of its `finally`.
            task.add_done_callback(lambda done, kept=connection: self._forget(done, kept))  # type: ignore[misc]

    def _forget(self, task: asyncio.Task[None], connection: socket.socket) -> None:
        self._clients.discard(task)
        connection.close()

    async def _serve(self, connection: socket.socket, peer: Peer) -> None:
        try:
            while True:
                async with asyncio.timeout(protocol.REQUEST_TIMEOUT_S):
                    body = await _read_frame(connection)
                if body is None:
                    return
                await self._answer(connection, peer, body)
        except (TimeoutError, OSError, ControlError) as error:
            log.debug("control socket: uid %d, pid %d: %s", peer.uid, peer.pid, error)
        finally:
            self._by_uid[peer.uid] -= 1
            if not self._by_uid[peer.uid]:
                del self._by_uid[peer.uid]
            _close(connection, peer)

    async def _answer(self, connection: socket.socket, peer: Peer, body: bytes) -> None:
        try:
            request = protocol.decode_request(body)
            self._authorise(peer, request)
            if request.method == "watch_flows":
                await self._watch(connection)
                return
            async with asyncio.timeout(protocol.REPLY_TIMEOUT_S):
                reply = Reply(result=await self._dispatch(peer, request))
        except TimeoutError:
            reply = Reply(error="the agent did not answer in time", kind="timeout")
        except _NotAllowed as error:
            reply = Reply(error=error.message, kind="not_allowed", hint=error.hint)
        except SidecarError as error:
            reply = Reply(error=error.message, kind="refused", hint=error.hint)
        await _send(connection, reply)

    def _authorise(self, peer: Peer, request: Request) -> None:
        needs_operator = protocol.METHODS.get(request.method)
        if needs_operator is None:
            raise ControlError(
                f"unknown request {request.method[:60]!r}", hint="is the agent of another version?"
            )
        if needs_operator and not peer.decider().is_operator:
            self._refuse(
                peer,
                request,
                "needs root or the group sidecar",
                f"{request.method.replace('_', ' ')} needs root or the group sidecar",
                hint="run it with sudo",
            )

    def _refuse(self, peer: Peer, request: Request, cause: str, message: str, *, hint: str | None) -> None:
        subject = request.args.get("id", "")
        self._on_refusal(
            Refusal(
                ts_ns=time.time_ns(),
                method=request.method,
                subject=subject if isinstance(subject, str) else "",
                pid=peer.pid,
                uid=peer.uid,
                cause=cause,
            )
        )
        raise _NotAllowed(message, hint=hint)

    async def _dispatch(self, peer: Peer, request: Request) -> Any:
        api = self._api
        match request.method:
            case "status":
                return await api.status()
            case "flows":
                return await api.flows()
            case "holds":
                decider = peer.decider()
                return [view for view in await api.holds() if _may_see(view, decider)]
            case "hold":
                return await self._hold(peer, _text(request, "id"))
            case "decide":
                return await self._decide(peer, request)
            case "why":
                return await self._why(peer, _text(request, "id"))
            case "reload":
                return await api.reload()
            case _:
                return await api.stop()

    async def _hold(self, peer: Peer, hold_id: str) -> HoldView:
        view = await self._api.hold(hold_id)
        if view is None or not _may_see(view, peer.decider()):
            raise ControlError(f"there is no hold {hold_id[:60]}", hint="sidecar approvals list")
        return view

    async def _decide(self, peer: Peer, request: Request) -> HoldView:
        approve = request.args.get("approve")
        if not isinstance(approve, bool):
            raise ControlError("a decision needs `approve`: true or false")
        decider = peer.decider(_label(request, peer))
        view = await self._api.hold(_text(request, "id"))
        if view is None:
            raise ControlError("there is no such hold", hint="sidecar approvals list")
        why_not = kinship(
            peer, self._api.held_origin(view.id), self._api.is_steered, relay_parent=self._relay_parent
        )
        if why_not is not None:
            self._refuse(
                peer,
                request,
                why_not,
                f"a job cannot approve itself: {why_not}",
                hint="decide from a login of your own, outside the job and its session",
            )
        if not may_decide(view.by, decider):
            wanted = " or ".join(view.by) or "sidecar"
            self._refuse(
                peer,
                request,
                f"needs root, or a user or group named {wanted}",
                f"{decider.name} may not decide this hold",
                hint=f"it takes root, or a user or group named {wanted}",
            )
        return await self._api.decide(view.id, approve, decider, _text(request, "reason", required=False))

    async def _why(self, peer: Peer, record_id: str) -> dict[str, Any]:
        operator = peer.decider().is_operator
        record = await self._api.why(record_id, 0 if operator else peer.uid)
        if record is None or not (operator or _uid_of(record) == peer.uid):
            whose = "any job" if operator else user_name(peer.uid)
            raise ControlError(
                f"no record {record_id[:60]} of {whose} is known here",
                hint="an id is the eight digits of the error message"
                + ("" if operator else "; ask root for records of other users"),
            )
        return record

    async def _watch(self, connection: socket.socket) -> None:
        """Send the flows every second until the client goes away."""
        loop = asyncio.get_running_loop()
        gone = asyncio.ensure_future(loop.sock_recv(connection, 1))
        try:
            while not gone.done():
                async with asyncio.timeout(protocol.REPLY_TIMEOUT_S):
                    rows = await self._api.flows()
                await _send(connection, Reply(result=rows, more=True))
                await asyncio.wait([gone], timeout=protocol.WATCH_INTERVAL_S)
        finally:
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await gone
        raise ControlError("the watching client is gone")


def is_live(path: Path) -> bool:
    """Whether an agent accepts on this socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _may_see(view: HoldView, decider: Decider) -> bool:
    return decider.is_operator or may_decide(view.by, decider)


def _uid_of(record: dict[str, Any]) -> int | None:
    origin = record.get("origin")
    uid = origin.get("uid") if isinstance(origin, dict) else None
    return uid if isinstance(uid, int) else None


def _label(request: Request, peer: Peer) -> str:
    """Only root relays for others (the web page); everybody else is who the kernel says."""
    return _text(request, "by", required=False) if peer.uid == 0 else ""


def _text(request: Request, name: str, *, required: bool = True) -> str:
    value = request.args.get(name, "")
    if not isinstance(value, str) or (required and not value):
        raise ControlError(f"{request.method} needs `{name}`")
    return "".join(c for c in value if c.isprintable())[: protocol.MAX_NAME_CHARS]


async def _read_frame(connection: socket.socket) -> bytes | None:
    head = await _read_exactly(connection, 4)
    if head is None:
        return None
    size = int.from_bytes(head, "big")
    if size > protocol.MAX_REQUEST_BYTES:
        raise ControlError(f"a request of {size} bytes")
    return await _read_exactly(connection, size)


async def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < size:
        part = await loop.sock_recv(connection, size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


async def _send(connection: socket.socket, reply: Reply) -> None:
    data = protocol.encode(reply)
    if len(data) > protocol.MAX_REPLY_BYTES:
        data = protocol.encode(Reply(error="the answer is too long for the control socket", kind="limit"))
    async with asyncio.timeout(protocol.REPLY_TIMEOUT_S):
        await asyncio.get_running_loop().sock_sendall(connection, data)


def _close(connection: socket.socket, peer: Peer) -> None:
    connection.close()
    if peer.pidfd is not None:
        os.close(peer.pidfd)


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    """Wait; unlike `sock_accept`, cancelling it cannot lose a connection that was accepted already."""
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await ready
    finally:
        loop.remove_reader(sock)
