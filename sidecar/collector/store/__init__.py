"""SQLite in WAL mode: streams, batches, records, flows."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from sidecar.audit import hostkey
from sidecar.audit.batch import Batch, Header
from sidecar.audit.chain import genesis
from sidecar.audit.encode import decode_record
from sidecar.errors import AuditError

MAX_PAGE: Final = 200

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS hosts (host TEXT PRIMARY KEY, key BLOB NOT NULL, first_ns INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS streams (stream TEXT PRIMARY KEY, host TEXT NOT NULL, boot TEXT NOT NULL, last INTEGER NOT NULL,
  head BLOB NOT NULL, ended TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS batches (stream TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, header BLOB NOT NULL,
  sig BLOB NOT NULL, PRIMARY KEY (stream, first, last));
CREATE TABLE IF NOT EXISTS records (stream TEXT NOT NULL, seq INTEGER NOT NULL, id TEXT NOT NULL, flow TEXT NOT NULL, kind TEXT NOT NULL,
  ts_ns INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (stream, seq));
CREATE INDEX IF NOT EXISTS records_flow ON records (flow, ts_ns);
CREATE INDEX IF NOT EXISTS records_id ON records (id);
CREATE TABLE IF NOT EXISTS flows (flow TEXT PRIMARY KEY, ts_ns INTEGER NOT NULL, host TEXT NOT NULL,
  who TEXT NOT NULL, process TEXT NOT NULL,
  target TEXT NOT NULL, protocol TEXT NOT NULL, requests INTEGER NOT NULL DEFAULT 0, denied INTEGER NOT NULL DEFAULT 0,
  held INTEGER NOT NULL DEFAULT 0, rows INTEGER NOT NULL DEFAULT 0, closed TEXT NOT NULL DEFAULT '');
CREATE INDEX IF NOT EXISTS flows_time ON flows (ts_ns DESC);
"""


@dataclass(frozen=True, slots=True)
class Accepted:
    header: Header
    repeated: bool


class Store:
    """Thread-safe: one connection behind a lock. Raises AuditError for what must not be stored."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.key = hostkey.load_or_create(directory, "collector.key", "collector.pub")
        self._lock = threading.Lock()
        self._db = sqlite3.connect(
            directory / "collector.sqlite", check_same_thread=False, isolation_level=None
        )
        self._db.row_factory = sqlite3.Row
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.executescript(SCHEMA)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def ingest(self, batch: Batch, now_ns: int) -> Accepted:
        """Verify against what is known of the host and stream, then store. Idempotent."""
        header = batch.check()
        with self._transaction() as db:
            known = db.execute("SELECT key FROM hosts WHERE host = ?", (header.host,)).fetchone()
            if known is None:
                db.execute("INSERT INTO hosts VALUES (?, ?, ?)", (header.host, batch.key, now_ns))
            elif known["key"] != batch.key:
                raise AuditError(
                    f"host {header.host} signs with another key than before: reinstalled, or somebody else"
                )
            stream = db.execute("SELECT * FROM streams WHERE stream = ?", (header.stream,)).fetchone()
            if stream is None:
                if header.first != 0 or header.prev != genesis(batch.key, header.stream, header.boot):
                    raise AuditError("the first batch of a stream does not begin at its start")
                db.execute(
                    "INSERT INTO streams VALUES (?, ?, ?, -1, ?, '')",
                    (header.stream, header.host, header.boot, header.prev),
                )
                last, head, ended = -1, header.prev, ""
            else:
                last, head, ended = stream["last"], stream["head"], stream["ended"]
                if stream["host"] != header.host or stream["boot"] != header.boot:
                    raise AuditError("the stream belongs to another host or boot")
            if header.last <= last and (header.last >= header.first or ended):
                same = db.execute(
                    "SELECT header FROM batches WHERE stream = ? AND first = ? AND last = ?",
                    (header.stream, header.first, header.last),
                ).fetchone()
                if same is None or Header.decode(same["header"]).head != header.head:
                    raise AuditError("the stream was forked: another batch is known for these records")
                return Accepted(header, True)
            if ended:
                raise AuditError("the stream has ended")
            if header.first != last + 1 or header.prev != head:
                raise AuditError(
                    f"the batch does not follow record {last}: records are missing, or were rolled back"
                )
            db.execute(
                "INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?, ?)",
                (header.stream, header.first, header.last, batch.header, batch.signature),
            )
            for offset, body in enumerate(batch.records):
                self._record(db, header, header.first + offset, body)
            db.execute(
                "UPDATE streams SET last = ?, head = ?, ended = ? WHERE stream = ?",
                (header.last, header.head, header.end, header.stream),
            )
        return Accepted(header, False)

    @staticmethod
    def _record(db: sqlite3.Connection, header: Header, seq: int, body: bytes) -> None:
        record = decode_record(body)
        flow, kind = str(record.get("flow", "")), str(record.get("kind", ""))
        db.execute(
            "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)",
            (header.stream, seq, str(record.get("id", "")), flow, kind, int(record.get("ts_ns", 0)), body),
        )
        if not flow:
            return
        if kind == "open":
            origin, target = record.get("origin") or {}, record.get("target") or {}
            principal = record.get("principal") or {}
            process = f"{Path(str(origin.get('exe') or origin.get('comm') or 'unknown')).name} [{origin.get('tgid', '?')}]"
            denied = int((record.get("verdict") or {}).get("action") == "deny")
            db.execute(
                "INSERT OR IGNORE INTO flows (flow, ts_ns, host, who, process, target, protocol, denied) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (flow, record["ts_ns"], header.host, str(principal.get("subject", "")), process,
                 f"{target.get('name') or target.get('host')}:{target.get('port')}", str(target.get("protocol", "")), denied),
            )  # fmt: skip
        elif kind == "request":
            action = (record.get("verdict") or {}).get("action")
            db.execute(
                "UPDATE flows SET requests = requests + 1, denied = denied + ?, held = held + ? WHERE flow = ?",
                (action == "deny", action == "hold", flow),
            )
        elif kind == "response":
            db.execute(
                "UPDATE flows SET rows = rows + ? WHERE flow = ?",
                (int((record.get("response") or {}).get("rows", 0)), flow),
            )
        elif kind == "close":
            db.execute("UPDATE flows SET closed = ? WHERE flow = ?", (str(record.get("reason", "")), flow))

    def receipt(self, accepted: Accepted, now_ns: int) -> dict[str, Any]:
        """Our signed word that we hold the stream up to this head."""
        header = accepted.header
        receipt = {
            "stream": header.stream,
            "last": header.last,
            "head": header.head.hex(),
            "ts_ns": now_ns,
            "v": 1,
        }
        signed = orjson.dumps(receipt, option=orjson.OPT_SORT_KEYS)
        return {"receipt": receipt, "sig": self.key.sign(signed).hex(), "key": self.key.public.hex()}

    def flows(self, text: str = "", limit: int = 100, before_ns: int | None = None) -> list[dict[str, Any]]:
        like = f"%{text}%"
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM flows WHERE (? = '' OR who LIKE ? OR process LIKE ? OR target LIKE ? OR flow LIKE ?)"
                " AND (? IS NULL OR ts_ns < ?) ORDER BY ts_ns DESC LIMIT ?",
                (text, like, like, like, like, before_ns, before_ns, min(limit, MAX_PAGE)),
            ).fetchall()
        return [dict(row) for row in rows]

    def flow(self, flow: str, limit: int = 2000) -> list[dict[str, Any]]:
        with self._lock:
            rows = self._db.execute(
                "SELECT body FROM records WHERE flow = ? ORDER BY ts_ns, stream, seq LIMIT ?", (flow, limit)
            ).fetchall()
        return [decode_record(row["body"]) for row in rows]

    def record(self, record_id: str) -> dict[str, Any] | None:
        with self._lock:
            row = self._db.execute(
                "SELECT body FROM records WHERE id = ? OR id LIKE ? LIMIT 1", (record_id, f"%{record_id}")
            ).fetchone()
        return decode_record(row["body"]) if row else None

    def close(self) -> None:
        with self._lock:
            self._db.close()
