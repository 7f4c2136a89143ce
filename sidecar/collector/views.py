"""Records as a page shows them."""

from __future__ import annotations

import datetime
from typing import Any


def clock(ts_ns: int) -> str:
    return datetime.datetime.fromtimestamp(ts_ns / 1e9).strftime("%Y-%m-%d %H:%M:%S")


def transcript(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The `open` record's facts, and one entry a request with its response, holds and decisions."""
    opened = next((record for record in records if record["kind"] == "open"), {})
    entries: list[dict[str, Any]] = []
    by_id: dict[str, dict[str, Any]] = {}
    for record in records:
        kind = record["kind"]
        if kind == "request":
            entry: dict[str, Any] = {"request": record, "response": None, "holds": [], "text": _text(record)}
            by_id[record["id"]] = entry
            entries.append(entry)
        elif kind in ("response", "hold", "decision") and record.get("request") in by_id:
            entry = by_id[record["request"]]
            if kind == "response":
                entry["response"] = record
            else:
                entry["holds"].append(record)
        elif kind not in ("open",):
            entries.append({"note": record})
    return {"opened": opened, "entries": entries, "flow": opened.get("flow") or records[0].get("flow", "")}


def _text(record: dict[str, Any]) -> str:
    operation = record.get("operation") or {}
    text = operation.get("text")
    if text is None:
        text = f"{operation.get('method') or operation.get('kind', '')} {operation.get('path') or ''}".strip()
    return text if isinstance(text, str) else repr(text)
