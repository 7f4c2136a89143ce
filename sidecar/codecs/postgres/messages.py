"""Building and taking apart single messages. Framing is the session's (one type byte, then a big-endian length that counts itself).

Source: PostgreSQL documentation, "Message Formats". Raises ProtocolError for what does not fit its own length.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from sidecar.errors import ProtocolError

SSL_REQUEST: Final = 80877103
GSSENC_REQUEST: Final = 80877104
CANCEL_REQUEST: Final = 80877102

AUTH_OK: Final = 0
AUTH_SASL: Final = 10

_INT16 = struct.Struct("!h")
_INT32 = struct.Struct("!i")


def message(kind: bytes, body: bytes) -> bytes:
    return kind + _INT32.pack(len(body) + 4) + body


def fields(kind: bytes, values: dict[str, str]) -> bytes:
    """ErrorResponse or NoticeResponse."""
    parts = [
        code.encode() + value.encode("utf-8", "replace").replace(b"\0", b"?") + b"\0"
        for code, value in values.items()
    ]
    return message(kind, b"".join(parts) + b"\0")


def error(
    sqlstate: str, text: str, *, severity: str = "ERROR", detail: str = "", hint: str = "", position: int = 0
) -> bytes:
    """ErrorResponse with both severities (V is the one that is never translated)."""
    values = {"S": severity, "V": severity, "C": sqlstate, "M": text}
    if detail:
        values["D"] = detail
    if hint:
        values["H"] = hint
    if position:
        values["P"] = str(position)
    return fields(b"E", values)


def notice(text: str, *, detail: str = "", hint: str = "") -> bytes:
    values = {"S": "NOTICE", "V": "NOTICE", "C": "00000", "M": text}
    if detail:
        values["D"] = detail
    if hint:
        values["H"] = hint
    return fields(b"N", values)


def parse_fields(body: bytes) -> dict[str, str]:
    """ErrorResponse and NoticeResponse fields by their code."""
    found: dict[str, str] = {}
    for part in body.split(b"\0"):
        if part:
            found[chr(part[0])] = part[1:].decode("utf-8", "replace")
    return found


def query(text: bytes) -> bytes:
    return message(b"Q", text + b"\0")


def parse(name: bytes, text: bytes) -> bytes:
    return message(b"P", name + b"\0" + text + b"\0\0\0")


FLUSH: Final = b"H\0\0\0\x04"
SYNC: Final = b"S\0\0\0\x04"


def run_named(name: bytes, text: bytes) -> bytes:
    """Parse, Bind, Execute, Close, Sync under a name of our own: leaves the client's unnamed statement alone."""
    return (
        parse(name, text)
        + message(b"B", name + b"\0" + name + b"\0\0\0\0\0\0\0")
        + message(b"E", name + b"\0\0\0\0\0")
        + message(b"C", b"S" + name + b"\0")
        + message(b"C", b"P" + name + b"\0")
        + SYNC
    )


def describe_portal(name: bytes) -> bytes:
    return message(b"D", b"P" + name + b"\0")


def ready_for_query(status: bytes) -> bytes:
    return b"Z\0\0\0\x05" + status


@dataclass(frozen=True, slots=True)
class Startup:
    version: int
    parameters: tuple[tuple[bytes, bytes], ...]

    def get(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.parameters if key == name), None)

    def encode(self) -> bytes:
        body = _INT32.pack(self.version)
        for key, value in self.parameters:
            body += key + b"\0" + value + b"\0"
        body += b"\0"
        return _INT32.pack(len(body) + 4) + body


def parse_startup(body: bytes) -> Startup:
    """`body` without its length."""
    if len(body) < 5 or body[-1] != 0:
        raise ProtocolError("the startup message is not terminated")
    (version,) = _INT32.unpack_from(body)
    if version >> 16 != 3:
        raise ProtocolError(f"protocol {version >> 16}.{version & 0xFFFF} is not supported")
    parts = body[4:-1].split(b"\0")
    if parts and parts[-1] == b"":
        parts.pop()
    if len(parts) % 2:
        raise ProtocolError("the startup message holds a name without a value")
    return Startup(version, tuple(zip(parts[::2], parts[1::2], strict=True)))


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    table_oid: int
    attnum: int
    type_oid: int
    format: int


def parse_row_description(body: bytes) -> tuple[Column, ...]:
    try:
        (count,) = _INT16.unpack_from(body)
        offset, found = 2, []
        for _ in range(count):
            end = body.index(b"\0", offset)
            table, attnum, kind, _, _, form = struct.unpack_from("!IhIhih", body, end + 1)
            found.append(Column(body[offset:end].decode("utf-8", "replace"), table, attnum, kind, form))
            offset = end + 19
    except (struct.error, ValueError) as error_:
        raise ProtocolError("a RowDescription is malformed") from error_
    return tuple(found)


def parse_row(body: bytes | memoryview) -> list[bytes | None]:
    """DataRow values; None is NULL."""
    try:
        (count,) = _INT16.unpack_from(body)
        offset = 2
        found: list[bytes | None] = []
        for _ in range(count):
            (length,) = _INT32.unpack_from(body, offset)
            offset += 4
            if length < 0:
                found.append(None)
                continue
            if offset + length > len(body):
                raise ProtocolError("a DataRow is shorter than its values")
            found.append(bytes(body[offset : offset + length]))
            offset += length
    except struct.error as error_:
        raise ProtocolError("a DataRow is malformed") from error_
    return found


def parse_row_start(body: bytes | memoryview) -> list[bytes | None]:
    """As `parse_row`, of a DataRow of which only the beginning is at hand: a value may be cut, those behind it are missing."""
    found: list[bytes | None] = []
    offset, end = 2, len(body)
    while offset + 4 <= end:
        (length,) = _INT32.unpack_from(body, offset)
        offset += 4
        found.append(None if length < 0 else bytes(body[offset : offset + length]))
        offset += max(length, 0)
    return found


def row(values: list[bytes | None]) -> bytes:
    parts = [_INT16.pack(len(values))]
    for value in values:
        if value is None:
            parts.append(b"\xff\xff\xff\xff")
        else:
            parts.append(_INT32.pack(len(value)))
            parts.append(value)
    return message(b"D", b"".join(parts))


@dataclass(slots=True)
class Bind:
    portal: bytes
    statement: bytes
    parameters: tuple[str | bytes | None, ...]
    result_formats: tuple[int, ...]

    def format_of(self, index: int) -> int:
        formats = self.result_formats
        if not formats:
            return 0
        return formats[0] if len(formats) == 1 else formats[index] if index < len(formats) else 0


def parse_bind(body: bytes) -> Bind:
    """Parameters in text format become str (bytes where not UTF-8), binary ones bytes, NULL None."""
    try:
        end = body.index(b"\0")
        portal = body[:end]
        second = body.index(b"\0", end + 1)
        statement = body[end + 1 : second]
        offset = second + 1
        (count,) = _INT16.unpack_from(body, offset)
        if count < 0:
            raise ProtocolError("a Bind is malformed")
        formats = struct.unpack_from(f"!{count}h", body, offset + 2)
        offset += 2 + 2 * count
        (number,) = struct.unpack_from("!H", body, offset)
        offset += 2
        values: list[str | bytes | None] = []
        for index in range(number):
            (length,) = _INT32.unpack_from(body, offset)
            offset += 4
            if length < 0:
                values.append(None)
                continue
            if offset + length > len(body):
                raise ProtocolError("a Bind is shorter than its parameters")
            raw = body[offset : offset + length]
            offset += length
            form = 0 if count == 0 else formats[0] if count == 1 else formats[index] if index < count else 0
            if form:
                values.append(raw)
            else:
                try:
                    values.append(raw.decode())
                except UnicodeDecodeError:
                    values.append(raw)
        (count,) = _INT16.unpack_from(body, offset)
        results = struct.unpack_from(f"!{max(count, 0)}h", body, offset + 2)
    except (struct.error, ValueError) as error_:
        raise ProtocolError("a Bind is malformed") from error_
    return Bind(portal, statement, tuple(values), results)


def strip_channel_binding(body: bytes) -> bytes:
    """AuthenticationSASL without -PLUS mechanisms: the client's hop is plain, and libpq refuses PLUS there."""
    names = [name for name in body[4:].split(b"\0") if name and not name.endswith(b"-PLUS")]
    return body[:4] + b"".join(name + b"\0" for name in names) + b"\0"
