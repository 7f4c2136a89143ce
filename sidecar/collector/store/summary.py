"""A flow's row in the list, kept up with each record. Records of one flow come from two streams (its worker's and the supervisor's)
in any order, so each one only adds what it knows. Fields are shown, never trusted: whatever has another type counts as absent.
"""

from __future__ import annotations

import sqlite3
from pathlib import PurePosixPath
from typing import Any, Final

MAX_TEXT: Final = 500


def _part(record: dict[str, Any], name: str) -> dict[str, Any]:
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str:
    return value[:MAX_TEXT] if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 53 else 0


def process_name(origin: dict[str, Any]) -> str:
    """`psql [4711]`, or `unknown` where the kernel could not say."""
    name = PurePosixPath(_text(origin.get("exe")) or _text(origin.get("comm")) or "unknown").name
    return f"{name} [{origin['tgid']}]" if isinstance(origin.get("tgid"), int) else name


def target_name(target: dict[str, Any]) -> str:
    return (
        f"{_text(target.get('name')) or _text(target.get('host')) or 'unknown'}:{_count(target.get('port'))}"
    )


def summarise(
    db: sqlite3.Connection, record: dict[str, Any], flow: str, kind: str, ts_ns: int, host: str
) -> None:
    """Add one record to its flow's row."""
    db.execute("INSERT OR IGNORE INTO flows (flow, ts_ns, host) VALUES (?, ?, ?)", (flow, ts_ns, host))
    if kind == "open":
        target = _part(record, "target")
        db.execute(
            "UPDATE flows SET ts_ns = ?, who = ?, process = ?, target = ?, protocol = ?, denied = denied + ? WHERE flow = ?",
            (
                ts_ns,
                _text(_part(record, "principal").get("subject")),
                process_name(_part(record, "origin")),
                target_name(target),
                _text(target.get("protocol")),
                _part(record, "verdict").get("action") == "deny",
                flow,
            ),
        )
    elif kind == "request":
        verdict, protocol = _part(record, "verdict"), _text(_part(record, "target").get("protocol"))
        action = verdict.get("action")
        db.execute(
            "UPDATE flows SET requests = requests + 1, denied = denied + ?, held = held + ?, masked = masked + ?,"
            " protocol = CASE WHEN ? IN ('', 'auto', 'unknown') THEN protocol ELSE ? END WHERE flow = ?",
            (action == "deny", action == "hold", bool(verdict.get("masks")), protocol, protocol, flow),
        )
    elif kind == "response":
        db.execute(
            "UPDATE flows SET rows = rows + ? WHERE flow = ?",
            (_count(_part(record, "response").get("rows")), flow),
        )
    elif kind == "close":
        db.execute("UPDATE flows SET closed = ? WHERE flow = ?", (_text(record.get("reason")), flow))
