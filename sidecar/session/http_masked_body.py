"""A whole response body, its coding undone and its masks applied. What cannot be understood is never passed on."""

from __future__ import annotations

import zlib
from typing import Final

from sidecar.codecs.http1 import Head
from sidecar.model.verdict import MaskPlan

BINARY: Final = (
    b"image/", b"audio/", b"video/", b"font/", b"application/octet-stream", b"application/zip", b"application/gzip",
    b"application/x-gzip", b"application/x-tar", b"application/pdf", b"application/wasm", b"application/zstd",
)  # fmt: skip
"""Types that detectors, which look at text, leave alone. JSON paths know no such exception."""
_CHARSETS: Final = ("", "utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "latin1", "windows-1252")
_BODY_FIELDS: Final = (
    b"content-length", b"transfer-encoding", b"content-encoding", b"etag", b"digest", b"content-md5",
    b"content-digest", b"repr-digest", b"trailer", b"accept-ranges",
)  # fmt: skip
"""What a response's head says of a body that is not passed on as it came."""


class Unmaskable(Exception):
    """Why the body cannot be masked."""


def media_type(head: Head) -> bytes:
    return (head.get(b"content-type") or b"").partition(b";")[0].strip().lower()


def must_be_whole(head: Head, plan: MaskPlan | None) -> bool:
    """Whether the body is read as a whole before any of it is passed on. Raises Unmaskable where that would lead nowhere."""
    if plan is None or not (plan.has_json or plan.has_detectors):
        return False
    kind = media_type(head)
    if not plan.has_json and kind.startswith(BINARY):
        return False
    if head.status == 206:
        raise Unmaskable("it is a part of a body")
    if kind == b"text/event-stream":
        raise Unmaskable("a stream of events is not masked in this version")
    return True


def replace_body_fields(head: Head, size: int) -> None:
    """The head says of its body only that it has `size` bytes."""
    head.without(*_BODY_FIELDS)
    head.headers.append((b"Content-Length", str(size).encode()))


def mask_body(head: Head, plan: MaskPlan, raw: bytes, limit: int) -> bytes:
    """Raises Unmaskable. `limit` bounds the decoded size in bytes."""
    raw = _decoded(head.words(b"content-encoding"), raw, limit)
    if not raw:
        return raw
    kind = media_type(head)
    if not plan.has_json and b"json" not in kind:
        if _charset(head) not in _CHARSETS:
            raise Unmaskable("its character set is not understood")
        return plan.detect_text(raw)
    try:
        if b"ndjson" in kind or b"jsonl" in kind or b"json-lines" in kind:
            return b"\n".join(plan.mask_json(line) if line.strip() else line for line in raw.split(b"\n"))
        return plan.mask_json(raw)
    except ValueError as error:
        raise Unmaskable("the body is not understood as JSON") from error


def _charset(head: Head) -> str:
    _, found, rest = (head.get(b"content-type") or b"").lower().partition(b"charset=")
    return rest.partition(b";")[0].strip(b" \"'").decode("latin-1") if found else ""


def _decoded(codings: list[bytes], raw: bytes, limit: int) -> bytes:
    if codings in ([], [b"identity"]) or not raw:
        return raw
    if len(codings) != 1 or codings[0] not in (b"gzip", b"x-gzip", b"deflate"):
        raise Unmaskable("its content coding is not understood")
    found = bytearray()
    try:
        while raw:  # gzip: a file may have several members (RFC 1952 section 2.2)
            inflate = zlib.decompressobj(47)
            found += inflate.decompress(raw, limit + 1 - len(found))
            if len(found) > limit:
                raise Unmaskable(f"the body inflates to over {limit} bytes")
            if not inflate.eof:
                raise Unmaskable("its compressed form is cut short")
            raw = inflate.unused_data
    except zlib.error as error:
        raise Unmaskable("its compressed form is not understood") from error
    return bytes(found)
