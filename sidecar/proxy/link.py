"""Messages between the supervisor and one worker, over a SOCK_SEQPACKET pair, as tagged msgpack.

Owns the wire form and the queue; knows nothing of what the messages mean. Descriptors ride along (SCM_RIGHTS).
A `Secret` crosses only here, inside a kernel socket pair, because the worker has to put it on the connection.
"""

from __future__ import annotations

import array
import asyncio
import collections
import socket
from collections.abc import Callable
from typing import Any, Final

import msgspec

from sidecar.errors import ProtocolError
from sidecar.model.flow import FlowFacts
from sidecar.model.secret import Secret
from sidecar.proxy.limits import MAX_LINK_MESSAGE_BYTES, MAX_LINK_QUEUE

MAX_DESCRIPTORS: Final = 4


class Message(msgspec.Struct, tag=True, frozen=True):
    """Base of everything that crosses the link."""


# worker → supervisor


class Hello(Message, frozen=True):
    """The worker has dropped its privileges and is ready to be configured."""

    pid: int


class Ready(Message, frozen=True):
    """The worker accepts connections."""


class FlowStat(msgspec.Struct, frozen=True):
    flow: str
    protocol: str
    requests: int
    denied: int
    bytes_client: int
    bytes_server: int
    state: str
    user: str | None = None
    database: str | None = None


class Beat(Message, frozen=True):
    """Sent every `BEAT_INTERVAL_S`; carries what changed."""

    flows: int
    stats: tuple[FlowStat, ...] = ()


class Resolve(Message, frozen=True):
    """Who is this client? `original_*` is what SO_ORIGINAL_DST says."""

    id: int
    peer_host: str
    peer_port: int
    local_host: str
    local_port: int
    original_host: str
    original_port: int


class FlowClosed(Message, frozen=True):
    flow: str
    reason: str


class Sign(Message, frozen=True):
    id: int
    flow: str
    backend_pid: int


class MintLeaf(Message, frozen=True):
    id: int
    names: tuple[str, ...]


class HoldRequested(Message, frozen=True):
    hold_id: str
    flow: str
    request_id: str
    rule: str
    reason: str
    by: tuple[str, ...]
    within_s: float
    summary: str
    parameters: Any
    """A list of str, bytes or None, or None as a whole (msgspec decodes no union of str and bytes)."""
    digest: str


class HoldWithdrawn(Message, frozen=True):
    hold_id: str


class NeedSegment(Message, frozen=True):
    """The segment is full (or broken): rotate."""


class ClientRequiresTls(Message, frozen=True):
    """The client left after our `N`: relay its next connection opaque."""

    flow: str


class AuditFailed(Message, frozen=True):
    """The worker could not append: what the system said."""

    detail: str


class AuditRecovered(Message, frozen=True):
    pass


# supervisor → worker


class Configure(Message, frozen=True):
    host: str
    sync_strict: bool
    on_full_drop: bool
    segment_bytes: int
    request_max_bytes: int
    response_max_rows: int
    response_max_bytes: int
    authorities: dict[str, str] = {}
    """Certificates that targets' must be signed by: PEM, by the file's name. A worker may not be able to read the files."""


class PolicyText(Message, frozen=True):
    """A policy that the supervisor has compiled before; `text` None: the built-in one."""

    text: str | None
    file: str
    revision: str
    hash_key: bytes | None = None
    upstream: bool = False


class Segment(Message, frozen=True):
    """One descriptor rides along: the append-only segment."""

    stream: str
    head: bytes
    next_seq: int


class Resolved(Message, frozen=True):
    """The answer to `Resolve`; `facts` None: refused for `reason` (the supervisor has recorded it)."""

    id: int
    facts: FlowFacts | None
    reason: str = ""


class Signed(Message, frozen=True):
    id: int
    assertion: str | None


class LeafMinted(Message, frozen=True):
    """`chain` and `key` are PEM, valid until `not_after_ns`; empty where there is no leaf, for `problem`."""

    id: int
    chain: str
    key: Secret
    not_after_ns: int
    problem: str = ""


class HoldDecided(Message, frozen=True):
    hold_id: str
    outcome: str
    by: str | None
    reason: str


class Block(Message, frozen=True):
    """New requests wait while `reason` is not empty."""

    reason: str


class Drain(Message, frozen=True):
    """Accept nothing more; end what is open within `grace_s`, then exit."""

    grace_s: float


FromWorker = (
    Hello
    | Ready
    | Beat
    | Resolve
    | FlowClosed
    | Sign
    | MintLeaf
    | HoldRequested
    | HoldWithdrawn
    | NeedSegment
    | ClientRequiresTls
    | AuditFailed
    | AuditRecovered
)
ToWorker = Configure | PolicyText | Segment | Resolved | Signed | LeafMinted | HoldDecided | Block | Drain


def _encode_secret(value: Any) -> Any:
    if isinstance(value, Secret):
        return value.reveal()
    raise NotImplementedError(f"{type(value).__name__} does not cross the link")


def _decode_secret(type_: type, value: Any) -> Any:
    if type_ is Secret:
        return Secret(value)
    raise NotImplementedError(f"{type_.__name__} does not cross the link")


class Link:
    """One end of the pair. Sending never blocks: what the kernel does not take at once is queued, in order, up to a bound.

    `on_message(message, descriptors)` gets ownership of the descriptors; `on_close()` is called once when the peer is gone.
    """

    def __init__(
        self,
        sock: socket.socket,
        incoming: Any,
        on_message: Callable[[Any, list[int]], None],
        on_close: Callable[[], None],
    ) -> None:
        self._sock = sock
        sock.setblocking(False)
        self._decoder = msgspec.msgpack.Decoder(incoming, dec_hook=_decode_secret)
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_encode_secret)
        self._on_message = on_message
        self._on_close = on_close
        self._queue: collections.deque[tuple[bytes, tuple[int, ...], Callable[[], None] | None]] = (
            collections.deque()
        )
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._writing = False
        self._loop.add_reader(sock, self._readable)

    def send(
        self,
        message: Message,
        descriptors: tuple[int, ...] = (),
        sent: Callable[[], None] | None = None,
    ) -> None:
        """Queue `message`; `sent` is called once the kernel holds it (descriptors may be closed then)."""
        if self._closed:
            if sent:
                sent()
            return
        data = self._encoder.encode(message)
        if len(data) > MAX_LINK_MESSAGE_BYTES or len(self._queue) >= MAX_LINK_QUEUE:
            self._lost()
            return
        self._queue.append((data, descriptors, sent))
        if not self._writing:
            self._flush()

    def _flush(self) -> None:
        while self._queue:
            data, descriptors, sent = self._queue[0]
            ancillary = (
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            )
            try:
                self._sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if not self._writing:
                    self._writing = True
                    self._loop.add_writer(self._sock, self._flush)
                return
            except OSError:
                self._lost()
                return
            self._queue.popleft()
            if sent:
                sent()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        for _ in range(64):  # a bound, so that one link does not starve the loop
            if self._closed:
                return
            try:
                size = self._sock.recv_into(bytearray(1), 1, socket.MSG_PEEK | socket.MSG_TRUNC)
                if size == 0:
                    self._lost()
                    return
                data, ancillary, _, _ = self._sock.recvmsg(
                    size, socket.CMSG_LEN(MAX_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                self._lost()
                return
            descriptors = array.array("i")
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
            try:
                message = self._decoder.decode(data)
            except msgspec.MsgspecError as error:
                self._lost()
                raise ProtocolError(
                    f"the other end of the worker link sent what no version of it sends: {error}"
                ) from error
            self._on_message(message, list(descriptors))

    def _lost(self) -> None:
        if self._closed:
            return
        self.close()
        self._on_close()

    def close(self) -> None:
        """Close this end; `on_close` is not called. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock)
        if self._writing:
            self._loop.remove_writer(self._sock)
        for _, _, sent in self._queue:
            if sent:
                sent()
        self._queue.clear()
        self._sock.close()


def link_pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair with room for the largest message (forced: the supervisor is privileged)."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        for option in (32, 33):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
            try:
                end.setsockopt(socket.SOL_SOCKET, option, 2 * MAX_LINK_MESSAGE_BYTES)
            except PermissionError:
                end.setsockopt(
                    socket.SOL_SOCKET,
                    socket.SO_SNDBUF if option == 32 else socket.SO_RCVBUF,
                    2 * MAX_LINK_MESSAGE_BYTES,
                )
    return pair
