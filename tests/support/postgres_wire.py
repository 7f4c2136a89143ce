"""Frontend messages by hand, and a client that sends exactly those: for what no client library would do."""

from __future__ import annotations

import socket
import struct
from types import TracebackType

from sidecar.model.flow import Address

SYNC = b"S\0\0\0\x04"
FLUSH = b"H\0\0\0\x04"
TERMINATE = b"X\0\0\0\x04"


def message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


def startup(**parameters: str) -> bytes:
    body = struct.pack("!I", 196608)
    for name, value in parameters.items():
        body += name.encode() + b"\0" + value.encode() + b"\0"
    body += b"\0"
    return struct.pack("!I", len(body) + 4) + body


def query(text: str | bytes) -> bytes:
    return message(b"Q", (text if isinstance(text, bytes) else text.encode()) + b"\0")


def parse(text: str | bytes, name: str = "") -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return message(b"P", name.encode() + b"\0" + raw + b"\0\0\0")


def bind(
    *values: bytes | None, statement: str = "", portal: str = "", formats: tuple[int, ...] = ()
) -> bytes:
    body = portal.encode() + b"\0" + statement.encode() + b"\0\0\0" + struct.pack("!h", len(values))
    for value in values:
        body += b"\xff\xff\xff\xff" if value is None else struct.pack("!i", len(value)) + value
    return message(b"B", body + struct.pack(f"!h{len(formats)}h", len(formats), *formats))


def describe(name: str = "", kind: str = "P") -> bytes:
    return message(b"D", kind.encode() + name.encode() + b"\0")


def execute(portal: str = "", rows: int = 0) -> bytes:
    return message(b"E", portal.encode() + b"\0" + struct.pack("!i", rows))


def close(name: str = "", kind: str = "S") -> bytes:
    return message(b"C", kind.encode() + name.encode() + b"\0")


def row(*values: bytes | None) -> bytes:
    body = struct.pack("!h", len(values))
    for value in values:
        body += b"\xff\xff\xff\xff" if value is None else struct.pack("!i", len(value)) + value
    return message(b"D", body)


def column(name: str, *, table: int = 0, attnum: int = 0, type_oid: int = 25, form: int = 0) -> bytes:
    return name.encode() + b"\0" + struct.pack("!IhIhih", table, attnum, type_oid, -1, -1, form)


def description(*columns: bytes) -> bytes:
    return message(b"T", struct.pack("!h", len(columns)) + b"".join(columns))


def complete(tag: str) -> bytes:
    return message(b"C", tag.encode() + b"\0")


def ready(status: str = "I") -> bytes:
    return message(b"Z", status.encode())


def fields(body: bytes) -> dict[str, str]:
    """Of an ErrorResponse or NoticeResponse."""
    return {part[:1].decode(): part[1:].decode() for part in body.split(b"\0") if part}


def values(body: bytes) -> list[bytes | None]:
    """Of a DataRow."""
    found: list[bytes | None] = []
    offset = 2
    for _ in range(struct.unpack_from("!h", body)[0]):
        (length,) = struct.unpack_from("!i", body, offset)
        offset += 4
        if length < 0:
            found.append(None)
        else:
            found.append(body[offset : offset + length])
            offset += length
    return found


def split(data: bytes) -> list[tuple[str, bytes]]:
    """(kind, body) of whole messages."""
    found, offset = [], 0
    while offset + 5 <= len(data):
        (length,) = struct.unpack_from("!I", data, offset + 1)
        found.append((chr(data[offset]), data[offset + 5 : offset + 1 + length]))
        offset += 1 + length
    assert offset == len(data), "a message is not whole"
    return found


class Wire:
    """A client that says what it is told. Every read has a deadline."""

    def __init__(self, address: Address, *, timeout_s: float = 10.0, **parameters: str) -> None:
        self.socket = socket.create_connection((address.host, address.port), timeout=timeout_s)
        self.buffer = b""
        parameters.setdefault("user", "postgres")
        parameters.setdefault("database", "postgres")
        self.send(startup(**parameters))
        self.greeting = self.until_ready()

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def read(self) -> tuple[str, bytes] | None:
        """One message; None at the end of the stream."""
        while True:
            if len(self.buffer) >= 5:
                (length,) = struct.unpack_from("!I", self.buffer, 1)
                if len(self.buffer) > length:
                    kind, body = chr(self.buffer[0]), self.buffer[5 : length + 1]
                    self.buffer = self.buffer[length + 1 :]
                    return kind, body
            data = self.socket.recv(65536)
            if not data:
                return None
            self.buffer += data

    def until_ready(self, count: int = 1) -> list[tuple[str, bytes]]:
        """Messages up to and with the `count`-th ReadyForQuery, or to the end of the stream."""
        found = []
        while count:
            item = self.read()
            if item is None:
                break
            found.append(item)
            count -= item[0] == "Z"
        return found

    def ask(self, *parts: bytes, count: int = 1) -> list[tuple[str, bytes]]:
        self.send(*parts)
        return self.until_ready(count)

    def silent(self, timeout_s: float = 0.3) -> bool:
        """True where nothing arrives for a while."""
        before = self.socket.gettimeout()
        self.socket.settimeout(timeout_s)
        try:
            return self.read() is None
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(before)

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()


def kinds(found: list[tuple[str, bytes]]) -> str:
    return "".join(kind for kind, _ in found)


def errors(found: list[tuple[str, bytes]]) -> list[dict[str, str]]:
    return [fields(body) for kind, body in found if kind == "E"]


def rows(found: list[tuple[str, bytes]]) -> list[list[bytes | None]]:
    return [values(body) for kind, body in found if kind == "D"]
