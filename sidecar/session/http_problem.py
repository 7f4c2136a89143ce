"""Answers of ours: RFC 9457 problem details that say which rule, which record, and what to do."""

from __future__ import annotations

from typing import Any

import orjson

from sidecar.model.ids import short_id


def problem(
    status: int, detail: str, rule: str, record_id: str, *, close: bool, head_only: bool = False
) -> bytes:
    """RFC 9457 problem details."""
    reasons = {
        400: "Bad Request",
        403: "Forbidden",
        413: "Content Too Large",
        421: "Misdirected Request",
        431: "Request Header Fields Too Large",
        503: "Service Unavailable",
    }
    document: dict[str, Any] = {
        "type": "about:blank",
        "title": reasons[status] if status != 503 else "Sidecar: Service Unavailable",
        "status": status,
        "detail": detail,
    }
    if record_id:
        short = short_id(record_id)
        document |= {
            "instance": f"urn:uuid:{record_id}",
            "rule": rule,
            "record": short,
            "hint": f"sidecar why {short}",
        }
    body = orjson.dumps(document)
    lines = [
        f"HTTP/1.1 {status} {reasons[status]}",
        "Content-Type: application/problem+json",
        f"Content-Length: {len(body)}",
        "Via: 1.1 sidecar",
    ]
    if close:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if head_only else body)
