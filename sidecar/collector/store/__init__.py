"""The collector's store: SQLite in WAL mode. `schema` holds its tables, `summary` what a flow's row says, here is ingest and reading.

Never trusts a host beyond its signature: what a record says of its own place is checked, what it says of anything else is only shown.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sidecar.audit import chain, hostkey
from sidecar.audit.batch import MAX_RECORDS, Batch, Header
from sidecar.audit.encode import decode_record
from sidecar.audit.receipt import RECEIPT, REFUSAL, Said
from sidecar.collector.store.schema import SCHEMA, SCHEMA_VERSION
from sidecar.collector.store.summary import summarise
from sidecar.errors import AuditError

MAX_PAGE: Final = 200
"""Flows in one answer."""
MAX_FLOW_PAGE: Final = 500
"""Records of a flow in one answer."""
DIGITS: Final = 8
"""Of an id's end that are indexed: the short id that people type."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """`repeated`: all of it was known already."""

    header: Header
    repeated: bool


class Refusal(AuditError):
    """A batch that is genuine, and cannot be taken; `last` and `head` are what is held of the stream (-1, empty: nothing)."""

    def __init__(self, message: str, header: Header, last: int = -1, head: bytes = b"") -> None:
        super().__init__(message)
        self.header = header
        self.last = last
        self.head = head


class Unavailable(AuditError):
    """The store cannot take anything at the moment: a full disk, for instance. The batch may be sent again."""


class Store:
    """Thread-safe: one connection behind a lock. Raises AuditError for what must not be stored."""

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.key = hostkey.load_or_create(directory, "collector.key", "collector.pub")
            self._lock = threading.Lock()
            self._db = sqlite3.connect(
                directory / "collector.sqlite", check_same_thread=False, isolation_level=None
            )
            self._db.row_factory = sqlite3.Row
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
                self._db.execute(f"PRAGMA {pragma}")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            made = self._db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'streams'").fetchone()[0]
            if version != SCHEMA_VERSION and (version or made):
                raise AuditError(
                    f"{directory} was written by another version (store {version}, this is {SCHEMA_VERSION})",
                    hint="name another directory with --data",
                )
            self._db.executescript(SCHEMA)
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        except OSError as error:
            raise AuditError(
                f"the store in {directory} cannot be used: {error.strerror or error}",
                hint="run it as the directory's owner, or name another with --data",
            ) from error
        except sqlite3.Error as error:
            raise AuditError(f"the store in {directory} cannot be used: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite ends it itself where the disk is full
                    self._db.execute("ROLLBACK")
                raise

    # -- ingest

    def ingest(self, batch: Batch, now_ns: int) -> Accepted:
        """Verify against what is known of the host and stream, then store; on disk when it returns. Idempotent, also where
        the batch's bounds differ from those of the first time. Raises Refusal, Unavailable, or AuditError for what is not
        genuine."""
        if len(batch.records) > MAX_RECORDS:
            raise AuditError(f"a batch holds at most {MAX_RECORDS} records")
        header = batch.check()
        try:
            with self._transaction() as db:
                self._pin(db, batch, header, now_ns)
                return self._ingest(db, batch, header)
        except (sqlite3.DataError, OverflowError) as error:
            raise AuditError(f"the batch cannot be stored: {error}") from error
        except sqlite3.Error as error:
            raise Unavailable(f"the store takes nothing: {error}") from error

    @staticmethod
    def _pin(db: sqlite3.Connection, batch: Batch, header: Header, now_ns: int) -> None:
        """A host is known by the key that it came with first."""
        known = db.execute("SELECT key FROM hosts WHERE host = ?", (header.host,)).fetchone()
        if known is None:
            db.execute("INSERT INTO hosts VALUES (?, ?, ?)", (header.host, batch.key, now_ns))
        elif known["key"] != batch.key:
            raise Refusal(
                f"host {header.host} is known with another key: it was reinstalled, or is somebody else",
                header,
            )

    def _ingest(self, db: sqlite3.Connection, batch: Batch, header: Header) -> Accepted:
        stream = db.execute("SELECT * FROM streams WHERE stream = ?", (header.stream,)).fetchone()
        if stream is None:
            start = chain.genesis(batch.key, header.stream, header.boot)
            if header.first != 0:
                raise Refusal(
                    f"nothing is held of this stream and the batch begins with record {header.first}: "
                    "this collector was rolled back, or records were lost",
                    header,
                )
            if header.prev != start:
                raise Refusal("the stream does not begin at its genesis", header)
            db.execute(
                "INSERT INTO streams VALUES (?, ?, ?, -1, ?, '')",
                (header.stream, header.host, header.boot, start),
            )
            last, head, ended = -1, start, ""
        else:
            last, head, ended = stream["last"], stream["head"], stream["ended"]
            if stream["host"] != header.host or stream["boot"] != header.boot:
                raise Refusal("the stream belongs to another host or boot", header, last, head)
        if header.first > last + 1:
            raise Refusal(
                f"records {last + 1} to {header.first - 1} are missing: this collector was rolled back, or they were lost",
                header, last, head,
            )  # fmt: skip
        if not self._continues(db, batch, header, last, head):
            raise Refusal("the stream was forked: other records are held in this place", header, last, head)
        fresh = header.last > last
        if ended and (fresh or header.end not in ("", ended)):
            raise Refusal("the stream has ended", header, last, head)
        if not fresh and (ended or not header.end):
            return Accepted(header, True)
        db.execute(
            "INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?, ?)",
            (header.stream, header.first, header.last, batch.header, batch.signature),
        )
        for seq in range(last + 1, header.last + 1):
            self._insert(db, header, seq, batch.records[seq - header.first])
        db.execute(
            "UPDATE streams SET last = ?, head = ?, ended = ? WHERE stream = ?",
            (max(header.last, last), header.head if fresh else head, header.end, header.stream),
        )
        return Accepted(header, False)

    @staticmethod
    def _continues(db: sqlite3.Connection, batch: Batch, header: Header, last: int, head: bytes) -> bool:
        """Whether batch and store agree on the last record that both know."""
        if header.last >= last:
            known = header.prev
            for record in batch.records[: last + 1 - header.first]:
                known = chain.link(known, record)
            return known == head
        reached = header.head
        for row in db.execute(
            "SELECT body FROM records WHERE stream = ? AND seq > ? ORDER BY seq", (header.stream, header.last)
        ):
            reached = chain.link(reached, row["body"])
        return reached == head

    @staticmethod
    def _insert(db: sqlite3.Connection, header: Header, seq: int, body: bytes) -> None:
        record = decode_record(body)
        if (record.get("stream"), record.get("seq"), record.get("host")) != (header.stream, seq, header.host):
            raise Refusal(f"record {seq} names another place than it stands at", header, seq - 1)
        identity, flow, kind = (str(record.get(name, "")) for name in ("id", "flow", "kind"))
        ts_ns = record.get("ts_ns")
        if not isinstance(ts_ns, int) or not 0 <= ts_ns < 1 << 63:
            raise Refusal(f"record {seq} has no time", header, seq - 1)
        db.execute(
            "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (header.stream, seq, identity, identity[-DIGITS:], flow, kind, ts_ns, body),
        )
        if flow:
            summarise(db, record, flow, kind, ts_ns, header.host)

    def receipt(self, accepted: Accepted, now_ns: int) -> dict[str, Any]:
        """Our signed word that we hold the stream up to this head."""
        header = accepted.header
        return Said(
            RECEIPT, header.host, header.stream, header.last, header.head.hex(), bool(header.end), "", now_ns
        ).sign(self.key)

    def refusal(self, refused: Refusal, now_ns: int) -> dict[str, Any]:
        """Our signed word that we cannot take the stream, and what we hold of it."""
        header = refused.header
        return Said(
            REFUSAL,
            header.host,
            header.stream,
            refused.last,
            refused.head.hex(),
            False,
            refused.message,
            now_ns,
        ).sign(self.key)

    # -- reading

    def flows(self, text: str = "", limit: int = 100, before_ns: int | None = None) -> list[dict[str, Any]]:
        """Newest first; `text` is looked for in principal, process, target, host and flow id."""
        like = "%" + text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM flows WHERE (?1 = '' OR who LIKE ?2 ESCAPE '\\' OR process LIKE ?2 ESCAPE '\\'"
                " OR target LIKE ?2 ESCAPE '\\' OR host LIKE ?2 ESCAPE '\\' OR flow LIKE ?2 ESCAPE '\\')"
                " AND (?3 IS NULL OR ts_ns < ?3) ORDER BY ts_ns DESC LIMIT ?4",
                (text, like, before_ns, max(1, min(limit, MAX_PAGE))),
            ).fetchall()
        return [dict(row) for row in rows]

    def summary(self, flow: str) -> dict[str, Any] | None:
        with self._lock:
            row = self._db.execute("SELECT * FROM flows WHERE flow = ?", (flow,)).fetchone()
        return dict(row) if row else None

    def opening(self, flow: str) -> dict[str, Any] | None:
        """The flow's `open` record."""
        with self._lock:
            row = self._db.execute(
                "SELECT body FROM records WHERE flow = ? AND kind = 'open' ORDER BY ts_ns LIMIT 1", (flow,)
            ).fetchone()
        return decode_record(row["body"]) if row else None

    def flow(self, flow: str, limit: int = MAX_FLOW_PAGE, offset: int = 0) -> list[dict[str, Any]]:
        """Records in order of time."""
        with self._lock:
            rows = self._db.execute(
                "SELECT body FROM records WHERE flow = ? ORDER BY ts_ns, stream, seq LIMIT ? OFFSET ?",
                (flow, max(1, min(limit, MAX_FLOW_PAGE)), max(0, offset)),
            ).fetchall()
        return [decode_record(row["body"]) for row in rows]

    def record(self, record_id: str) -> dict[str, Any] | None:
        """By full id or by its last eight digits; None where there is none or several."""
        short = record_id[-DIGITS:]
        with self._lock:
            rows = self._db.execute(
                "SELECT body FROM records WHERE short = ? AND id LIKE ? LIMIT 2", (short, f"%{record_id}")
            ).fetchall()
        return decode_record(rows[0]["body"]) if len(rows) == 1 else None

    def close(self) -> None:
        with self._lock:
            self._db.close()
