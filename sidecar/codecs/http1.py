"""HTTP/1.1 heads and body framing, strictly. Heads are delimited here and their content is validated by httptools.

Refused, because peers read them differently (request smuggling, RFC 9112 section 11.2): both Content-Length and
Transfer-Encoding, differing lengths, bare CR, folded headers, space before the colon, NUL, a chunk size that is no hex number.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, unquote

import httptools

from sidecar.errors import LimitExceeded, ProtocolError

MAX_HEADERS: Final = 200
MAX_CHUNK_LINE: Final = 1024
MAX_TRAILERS: Final = 16_384
_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?")
NO_BODY: Final = frozenset({204, 304})


@dataclass(slots=True)
class Head:
    """A request's or a response's head. Header names as sent; `get` looks case-insensitively."""

    start: bytes
    headers: list[tuple[bytes, bytes]]
    method: str = ""
    target: str = ""
    status: int = 0
    version: str = "1.1"

    def get(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    def get_all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name]

    def without(self, *names: bytes) -> None:
        self.headers = [(key, value) for key, value in self.headers if key.lower() not in names]

    def encode(self) -> bytes:
        return (
            self.start
            + b"\r\n"
            + b"".join(key + b": " + value + b"\r\n" for key, value in self.headers)
            + b"\r\n"
        )

    @property
    def keep_alive(self) -> bool:
        connection = (self.get(b"connection") or b"").lower()
        return b"close" not in connection if self.version == "1.1" else b"keep-alive" in connection


class _Sink:
    def __init__(self) -> None:
        self.url = b""

    def on_url(self, url: bytes) -> None:
        self.url += url


def parse_head(raw: bytes, *, request: bool) -> Head:
    """`raw` up to and with the empty line. Raises ProtocolError."""
    lines = raw[:-4].split(b"\r\n")
    if any(b"\r" in line or b"\n" in line or b"\0" in line for line in lines):
        raise ProtocolError("a bare CR, LF or NUL in a head")
    if len(lines) - 1 > MAX_HEADERS:
        raise LimitExceeded(f"more than {MAX_HEADERS} headers", limit="headers", value=MAX_HEADERS)
    headers = []
    for line in lines[1:]:
        if line[:1] in (b" ", b"\t"):
            raise ProtocolError("a folded header")
        name, colon, value = line.partition(b":")
        if not colon or not _NAME.fullmatch(name):
            raise ProtocolError("a malformed header line")
        headers.append((name, value.strip(b" \t")))
    head = Head(lines[0], headers)
    sink = _Sink()
    try:
        if request:
            parser: Any = httptools.HttpRequestParser(sink)
            first = b"\r\n".join([lines[0], b"Host: x", b"", b""]) if not headers else raw
            with contextlib.suppress(httptools.HttpParserUpgrade):
                parser.feed_data(first)
            head.method = parser.get_method().decode()
            head.target = sink.url.decode("ascii", "surrogateescape")
            head.version = parser.get_http_version()
        else:
            parts = lines[0].split(b" ", 2)
            if (
                len(parts) < 2
                or not re.fullmatch(rb"HTTP/1\.[01]", parts[0])
                or not re.fullmatch(rb"[1-9]\d\d", parts[1])
            ):
                raise ProtocolError("a malformed status line")
            head.status = int(parts[1])
            head.version = parts[0][5:].decode()
    except httptools.HttpParserError as error:
        raise ProtocolError(f"a malformed head: {error}") from error
    if head.version not in ("1.0", "1.1"):
        raise ProtocolError(f"HTTP/{head.version} in an HTTP/1 message")
    return head


@dataclass(slots=True)
class Body:
    """Follows a body's framing over chunks of bytes: `feed` says how many belong to it. `kind`: length, chunked, close, none."""

    kind: str
    remaining: int = 0
    done: bool = False
    _state: str = "size"
    _line: bytearray = field(default_factory=bytearray)
    _trailers: int = 0

    def feed(self, data: memoryview, payload: bytearray | None = None) -> int:
        """Consume from `data`; the decoded payload is added to `payload` where one is given. Raises ProtocolError."""
        if self.kind in ("none",) or self.done:
            self.done = True
            return 0
        if self.kind == "close":
            if payload is not None:
                payload += data
            return len(data)
        if self.kind == "length":
            take = min(self.remaining, len(data))
            self.remaining -= take
            self.done = self.remaining == 0
            if payload is not None:
                payload += data[:take]
            return take
        return self._chunked(data, payload)

    def _chunked(self, data: memoryview, payload: bytearray | None) -> int:
        offset, end = 0, len(data)
        while offset < end and not self.done:
            if self._state == "data":
                take = min(self.remaining, end - offset)
                if payload is not None:
                    payload += data[offset : offset + take]
                offset += take
                self.remaining -= take
                if self.remaining == 0:
                    self._state = "crlf"
                continue
            byte = data[offset]
            offset += 1
            self._line.append(byte)
            if len(self._line) > MAX_CHUNK_LINE and self._state != "trailer":
                raise ProtocolError("a chunk header is too long")
            if byte != 10:
                continue
            if self._line[-2:] != b"\r\n":
                raise ProtocolError("a bare LF in a chunked body")
            line = bytes(self._line[:-2])
            self._line.clear()
            self._chunk_line(line)
        return offset

    def _chunk_line(self, line: bytes) -> None:
        if self._state == "crlf":
            if line:
                raise ProtocolError("a chunk is longer than its size")
            self._state = "size"
        elif self._state == "size":
            match = _CHUNK.fullmatch(line)
            if not match:
                raise ProtocolError("a malformed chunk size")
            self.remaining = int(match[1], 16)
            self._state = "data" if self.remaining else "trailer"
        else:
            self._trailers += len(line)
            if self._trailers > MAX_TRAILERS:
                raise ProtocolError("the trailers are too long")
            self.done = not line


def framing(head: Head, *, request: bool, method: str = "") -> Body:
    """RFC 9112 section 6.3. Raises ProtocolError for what peers could read differently."""
    lengths = head.get_all(b"content-length")
    codings = head.get_all(b"transfer-encoding")
    if codings:
        if lengths:
            raise ProtocolError("both Content-Length and Transfer-Encoding")
        if head.version == "1.0":
            raise ProtocolError("Transfer-Encoding in HTTP/1.0")
        if len(codings) != 1 or codings[0].strip().lower() != b"chunked":
            raise ProtocolError("a Transfer-Encoding other than chunked")
    if (
        any(not re.fullmatch(rb"\d{1,18}", value) for value in lengths)
        or len({int(value) for value in lengths}) > 1
    ):
        raise ProtocolError("a malformed or contradictory Content-Length")
    if not request and (method == "HEAD" or head.status in NO_BODY or 100 <= head.status < 200):
        return Body("none", done=True)
    if codings:
        return Body("chunked")
    if lengths:
        size = int(lengths[0])
        return Body("length", remaining=size, done=size == 0)
    return Body("none", done=True) if request else Body("close")


def split_target(
    target: str, host_header: str | None
) -> tuple[str | None, str, str, tuple[tuple[str, str], ...]]:
    """(host without port, normalised path, raw path, query) of a request target in any of its forms."""
    host = host_header
    rest = target
    if "://" in target:
        _, _, after = target.partition("://")
        authority, slash, path = after.partition("/")
        host, rest = authority, slash + path or "/"
    elif not target.startswith(("/", "*")):
        host, rest = target, "/"  # CONNECT's authority form
    raw_path, _, query = rest.partition("?")
    if host is not None:
        host = host.rpartition("@")[2]
        host = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
        host = host.lower().rstrip(".")
    return host, normal_path(raw_path), raw_path, tuple(parse_qsl(query, keep_blank_values=True))


def normal_path(raw: str) -> str:
    """Decoded once, dot segments and doubled slashes removed: what a rule is matched against."""
    decoded = unquote(raw, errors="replace").replace("\\", "/")
    found: list[str] = []
    for segment in decoded.split("/"):
        if segment == "..":
            if found:
                found.pop()
        elif segment not in ("", "."):
            found.append(segment.partition(";")[0])
    tail = "/" if decoded.endswith("/") and found else ""
    return "/" + "/".join(found) + tail
