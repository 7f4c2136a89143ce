"""A whole response body, its coding undone and its masks applied. What cannot be understood is never passed on."""

from __future__ import annotations

import zlib

import orjson

from sidecar.codecs.http1 import Head
from sidecar.model.verdict import MaskPlan


class Unmaskable(Exception):
    """Why the body cannot be masked."""


def mask_body(head: Head, plan: MaskPlan, raw: bytes, limit: int) -> bytes:
    """Raises Unmaskable. `limit` bounds the decoded size in bytes."""
    coding = (head.get(b"content-encoding") or b"identity").strip().lower()
    try:
        if coding in (b"gzip", b"x-gzip", b"deflate"):
            inflate = zlib.decompressobj(47)
            raw = inflate.decompress(raw, limit)
            if inflate.unconsumed_tail:
                raise Unmaskable(f"the body inflates to over {limit} bytes")
        elif coding != b"identity":
            raise Unmaskable("its content coding is not understood")
        if b"json" not in (head.get(b"content-type") or b"").lower():
            return plan.detect_text(raw)
        if b"ndjson" in (head.get(b"content-type") or b"").lower():
            return b"\n".join(
                orjson.dumps(plan.apply_json(orjson.loads(line))[0]) if line.strip() else line
                for line in raw.split(b"\n")
            )
        document, changed = plan.apply_json(orjson.loads(raw))
    except (zlib.error, orjson.JSONDecodeError, RecursionError) as error:
        raise Unmaskable(f"the body is not understood ({type(error).__name__})") from error
    return orjson.dumps(document) if changed else raw
