"""HTTP/1.1 heads and body framing, strictly. Heads are delimited here and their content is validated by httptools as well.

Refused, because peers read them differently (request smuggling, RFC 9112 section 11.2): both Content-Length and
Transfer-Encoding, differing lengths, any coding but one `chunked`, bare CR or LF, NUL and other control characters, folded headers,
space before the colon, a chunk size that is no plain hex number, a target and a Host that name different hosts.
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
NO_BODY: Final = frozenset({204, 304})
_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_NAME: Final = re.compile(_TOKEN)
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_REQUEST_LINE: Final = re.compile(rb"(" + _TOKEN + rb") ([\x21\x22\x24-\x7e\x80-\xff]+) HTTP/(\d\.\d)")
_STATUS_LINE: Final = re.compile(rb"HTTP/(1\.[01]) ([1-9]\d\d)(?: [\t\x20-\x7e\x80-\xff]*)?")
_LENGTH: Final = re.compile(rb"\d{1,18}")
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_ABSOLUTE: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://([^/?]*)(.*)")
_AUTHORITY: Final = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s/?#@\[\]:,]*)(?::\d{0,5})?")
_STRUCTURAL: Final = re.compile(r"(?i)(%(?:2f|5c|3b|25))")
_ODD_PATH: Final = re.compile(r"(?i)%(?:2f|5c|3b|25|2e)|[;\\]|/\.")
_PARAMETERS: Final = re.compile(r";[^/]*")
_STAND_IN: Final = b"POST"
"""What httptools, which knows a fixed list of methods, is shown in place of one that it does not know."""
Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class Head:
    """A request's or a response's head. Header names as sent; `get` looks case-insensitively."""

    start: bytes
    headers: Headers
    method: str = ""
    target: str = ""
    status: int = 0
    version: str = "1.1"

    def get(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    def get_all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name]

    def words(self, name: bytes) -> list[bytes]:
        """The members of a comma-separated header, lower case, of all its lines."""
        members = b",".join(self.get_all(name)).split(b",")
        return [word for member in members if (word := member.strip(b" \t").lower())]

    def without(self, *names: bytes) -> None:
        self.headers = [(key, value) for key, value in self.headers if key.lower() not in names]

    def encode(self) -> bytes:
        return self.start + b"\r\n" + encode_headers(self.headers)

    @property
    def keep_alive(self) -> bool:
        connection = self.words(b"connection")
        return b"close" not in connection if self.version == "1.1" else b"keep-alive" in connection


def encode_headers(headers: Headers) -> bytes:
    """Header (or trailer) lines and the empty line after them."""
    return b"".join(key + b": " + value + b"\r\n" for key, value in headers) + b"\r\n"


class _Sink:
    """Takes no events: httptools only validates."""


def _header(line: bytes) -> tuple[bytes, bytes]:
    if line[:1] in (b" ", b"\t"):
        raise ProtocolError("a folded header")
    name, colon, value = line.partition(b":")
    if not colon or not _NAME.fullmatch(name):
        raise ProtocolError("a malformed header line")
    return name, value.strip(b" \t")


def may_begin(byte: bytes) -> bool:
    """Whether a request may begin with it."""
    return _NAME.fullmatch(byte) is not None


def parse_head(raw: bytes, *, request: bool) -> Head:
    """`raw` up to and with the empty line. Raises ProtocolError, or LimitExceeded for too many headers."""
    if _CONTROL.search(raw):
        raise ProtocolError("a control character in a head")
    lines = raw[:-4].split(b"\r\n")
    if not raw.count(b"\r") == raw.count(b"\n") == len(lines) + 1:
        raise ProtocolError("a bare CR or LF in a head")
    if len(lines) - 1 > MAX_HEADERS:
        raise LimitExceeded(f"more than {MAX_HEADERS} headers", limit="headers", value=MAX_HEADERS)
    head = Head(lines[0], [_header(line) for line in lines[1:]])
    if request:
        _request_line(head, raw)
    else:
        status = _STATUS_LINE.fullmatch(head.start)
        if not status:
            raise ProtocolError("a malformed status line")
        head.version, head.status = status[1].decode(), int(status[2])
    return head


def _request_line(head: Head, raw: bytes) -> None:
    line = _REQUEST_LINE.fullmatch(head.start)
    if not line:
        raise ProtocolError("a malformed request line")
    head.method = line[1].decode()
    head.target = line[2].decode("utf-8", "replace")
    head.version = line[3].decode()
    if head.version not in ("1.0", "1.1"):
        raise ProtocolError(f"HTTP/{head.version} in an HTTP/1 message")
    # A word that httptools does not know as a method, or cannot pair with this target, is validated under a common one's name.
    first = raw if head.headers else head.start + b"\r\nHost: x\r\n\r\n"
    try:
        _validate(first)
    except httptools.HttpParserInvalidMethodError:
        try:
            _validate(_STAND_IN + first[len(line[1]) :])
        except httptools.HttpParserError as error:
            raise ProtocolError(f"a malformed head: {error}") from error
    except httptools.HttpParserError as error:
        raise ProtocolError(f"a malformed head: {error}") from error


def _validate(head: bytes) -> None:
    parser: Any = httptools.HttpRequestParser(_Sink())
    with contextlib.suppress(httptools.HttpParserUpgrade):
        parser.feed_data(head)


@dataclass(slots=True)
class Body:
    """Follows a body's framing over chunks of bytes. `kind`: length, chunked, close, none.

    After each `feed`, `payload` holds the decoded parts of what was consumed, and `relay` what of it may be sent on as it came: all,
    but for a trailer section, whose fields are in `trailers` once `done` (they are to be judged like headers first).
    """

    kind: str
    remaining: int = 0
    done: bool = False
    payload: list[memoryview] = field(default_factory=list)
    relay: memoryview = field(default_factory=lambda: memoryview(b""))
    trailers: Headers = field(default_factory=list)
    _state: str = "size"
    _line: bytes = b""
    _trailer_bytes: int = 0

    def feed(self, data: bytes, start: int) -> int:
        """Consume from `data` at `start`; the offset after what belongs to the body. Raises ProtocolError."""
        view = memoryview(data)
        self.payload = []
        end = start
        if self.done or self.kind == "none":
            self.done = True
        elif self.kind == "close":
            end = len(data)
            self.payload.append(view[start:])
        elif self.kind == "length":
            end = start + min(self.remaining, len(data) - start)
            self.remaining -= end - start
            self.done = self.remaining == 0
            self.payload.append(view[start:end])
        else:
            return self._chunked(data, view, start)
        self.relay = view[start:end]
        return end

    def _chunked(self, data: bytes, view: memoryview, start: int) -> int:
        offset, relay_end = start, start
        while offset < len(data) and not self.done:
            if self._state == "data":
                end = offset + min(self.remaining, len(data) - offset)
                self.payload.append(view[offset:end])
                self.remaining -= end - offset
                offset = relay_end = end
                if self.remaining == 0:
                    self._state = "crlf"
                continue
            in_trailers = self._state == "trailer"
            newline = data.find(b"\n", offset, offset + MAX_CHUNK_LINE + 1)
            end = newline + 1 if newline >= 0 else min(len(data), offset + MAX_CHUNK_LINE + 1)
            self._line += data[offset:end]
            offset = end
            if not in_trailers:
                relay_end = end
            if len(self._line) > (MAX_TRAILERS if in_trailers else MAX_CHUNK_LINE):
                raise ProtocolError(f"a line in a chunked body is too long ({self._state})")
            if newline < 0:
                continue
            if self._line[-2:] != b"\r\n":
                raise ProtocolError("a bare LF in a chunked body")
            line, self._line = self._line[:-2], b""
            self._chunk_line(line)
        self.relay = view[start:relay_end]
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
        elif line:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > MAX_TRAILERS:
                raise ProtocolError("the trailers are too long")
            if _CONTROL.search(line) or b"\r" in line:
                raise ProtocolError("a control character in a trailer")
            self.trailers.append(_header(line))
        else:
            self.done = True


def framing(head: Head, *, request: bool, method: str = "") -> Body:
    """RFC 9112 section 6.3. Raises ProtocolError for what peers could read differently."""
    lengths = head.get_all(b"content-length")
    codings = head.get_all(b"transfer-encoding")
    if codings:
        if lengths:
            raise ProtocolError("both Content-Length and Transfer-Encoding")
        if head.version == "1.0":
            raise ProtocolError("Transfer-Encoding in HTTP/1.0")
        if len(codings) != 1 or codings[0].lower() != b"chunked":
            raise ProtocolError("a Transfer-Encoding other than chunked")
    if any(not _LENGTH.fullmatch(value) for value in lengths) or len({int(value) for value in lengths}) > 1:
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
    method: str, target: str, host_header: str | None
) -> tuple[str | None, str, str, tuple[tuple[str, str], ...]]:
    """(host without port, normalised path, raw path, query) of a request target in any of its forms (RFC 9112 section 3.2).
    Raises ProtocolError."""
    host = _host_name(host_header) if host_header is not None else None
    absolute = _ABSOLUTE.fullmatch(target)
    if target.startswith("/") or target == "*":
        rest = target
    elif method == "CONNECT":
        host, rest = _host_name(target), "/"
    elif absolute:
        named = _host_name(absolute[1])
        if host is not None and named != host:
            raise ProtocolError("the target and Host name different hosts")
        host, rest = named, absolute[2] if absolute[2].startswith("/") else "/" + absolute[2]
    else:
        raise ProtocolError("a malformed request target")
    raw_path, _, query = rest.partition("?")
    return host, normal_path(raw_path), raw_path, tuple(parse_qsl(query, keep_blank_values=True))


def _host_name(authority: str) -> str:
    if not _AUTHORITY.fullmatch(authority):
        raise ProtocolError("a malformed host")
    host = authority.partition("]")[0][1:] if authority.startswith("[") else authority.partition(":")[0]
    return host.lower().rstrip(".")


def normal_path(raw: str) -> str:
    """Decoded once, dot segments and doubled slashes removed: what a rule is matched against."""
    return _joined(_without_parameters(unquote(raw, errors="replace").replace("\\", "/")), resolve=True)


def path_readings(raw: str) -> tuple[str, ...]:
    """What else than `normal_path` a server may take the path for: one that routes before it decodes `%2F` (`/items/1%2F..%2Fx` is an
    item), decodes twice, leaves dot segments or `;parameters` where they are, or takes `\\` for a letter. Empty for nearly all."""
    if _ODD_PATH.search(raw) is None:
        return ()
    kept = "".join(
        part.upper() if index % 2 else unquote(part, errors="replace")
        for index, part in enumerate(_STRUCTURAL.split(raw))
    )
    once = unquote(raw, errors="replace")
    found = {kept, once, unquote(once, errors="replace")}
    found |= {_without_parameters(path) for path in found}
    found |= {unquote(path, errors="replace") for path in found}
    found |= {_without_parameters(path) for path in found}
    found |= {path.replace("\\", "/") for path in found}
    readings = {_joined(path, resolve=resolve) for path in found for resolve in (True, False)}
    return tuple(sorted(readings - {normal_path(raw)}))


def _without_parameters(path: str) -> str:
    return _PARAMETERS.sub("", path)


def _joined(path: str, *, resolve: bool) -> str:
    """The path with its doubled slashes made one and, with `resolve`, its dot segments followed."""
    found: list[str] = []
    for segment in path.split("/"):
        if segment == ".." and resolve:
            if found:
                found.pop()
        elif segment and not (segment == "." and resolve):
            found.append(segment)
    tail = "/" if path.endswith("/") and found else ""
    return "/" + "/".join(found) + tail
