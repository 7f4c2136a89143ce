"""Statements of ours inside the client's session: the assertion and the catalog, under names of ours, unseen by the client."""

from __future__ import annotations

from collections import deque
from typing import Final

from sidecar.codecs.postgres import messages
from sidecar.errors import ProtocolError
from sidecar.model.reasons import GapReason
from sidecar.session.commands import SignAssertion
from sidecar.session.context import SessionContext
from sidecar.session.postgres_catalog import FINGERPRINT_QUERY, SNAPSHOT_QUERY
from sidecar.session.postgres_names import Names
from sidecar.session.postgres_startup import SERVER

INJECTED: Final = b"_sidecar"


class Injections(Names):
    def __init__(self, context: SessionContext) -> None:
        super().__init__(context)
        self._assertion: str | None = None
        self._reassert = False
        self._held_ready: list[bytes] = []
        self._injections: deque[tuple[str, bytes]] = deque()
        self._injected_rows: list[list[bytes | None]] = []
        self._injected_failed = ""

    def _idle(self) -> bool:
        """The server waits for a query, outside any transaction, also an implicit one of extended messages."""
        return (
            not self._pending
            and self._status == b"I"
            and not self._open_segment
            and not self._passing_server
            and not self._skipping
        )

    def _has_to_inject(self, kind: bytes, data: bytes, offset: int, after: int) -> bool:
        """Queues our own statements where they are needed before this message, and possible."""
        if self.judge.outdated():
            self._stale = True
        checks = not self._stale and self.judge.is_to_check(self._now)
        if kind not in b"QPB" or not (self._stale or self._reassert or checks) or not self._idle():
            return False
        if self._reassert:
            self._reassert = False
            self._injections.append(("setting", self._setting()))
        if checks:
            self._injections.append(("check", FINGERPRINT_QUERY))
        elif self._stale and kind == b"B" and self.judge.wants_catalog:
            self._injections.append(("catalog", SNAPSHOT_QUERY))
        elif self._stale and self.judge.wants_catalog:
            if kind == b"Q":
                raw = data[offset + 5 : after - 1]
            else:
                raw = data[data.find(b"\0", offset + 5, after) + 1 : after].partition(b"\0")[0]
            decision = self.judge.decide(raw)
            if (decision.masks_columns and decision.rows) or "BEGIN" in decision.verdict.statements:
                self._injections.append(("catalog", SNAPSHOT_QUERY))
        return bool(self._injections)

    def _setting(self) -> bytes:
        # Both are ours and of a small alphabet; quoted all the same.
        name = (self.facts.attachment.postgres_setting or "").replace("'", "''")
        value = (self._assertion or "").replace("'", "''")
        return f"SELECT pg_catalog.set_config('{name}', '{value}', false)".encode()

    def _inject_next(self) -> bytes:
        """The next one; after the last, what the client was not shown yet."""
        if self._injections:
            self._injecting, text = self._injections.popleft()
            self._injected_rows, self._injected_failed = [], ""
            self.judge.asking(self._now)
            self._send(SERVER, messages.run_named(INJECTED, text))
            return b""
        self._injecting = None
        if self._phase == "inject":
            self._phase = "ready"
            if self._early_client:
                early = bytes(self._early_client)
                self._early_client.clear()
                self._client.keep(early, len(early))
        shown = b"".join(self._held_ready)
        self._held_ready.clear()
        return shown

    def _injected(self, kind: bytes, body: bytes, whole: bytes) -> bytes:
        if kind == b"D":
            self._injected_rows.append(messages.parse_row(body))
        elif kind == b"E":
            values = messages.parse_fields(body)
            if values.get("V") in ("FATAL", "PANIC"):
                return whole
            self._injected_failed = values.get("M", "?")
        elif kind in b"SAN":
            at = len(self._held_ready) - (self._phase == "inject")
            self._held_ready.insert(at, whole)
            if kind == b"S":
                self._parameter(body)
        elif kind == b"Z":
            if self._injected_failed:
                self._gap(
                    GapReason.UNKNOWN_PROTOCOL,
                    f"the injected statement ({self._injecting}) failed: {self._injected_failed}",
                )
            if self._injecting == "check":
                rows = self._injected_rows
                known = len(rows) == 1 and len(rows[0]) > 1
                found = (rows[0][1] or b"").decode("ascii", "replace") if known else ""
                if self._injected_failed or not self.judge.fingerprint_is(found):
                    self._stale = True
                    self._injections.append(("catalog", SNAPSHOT_QUERY))
            if self._injecting == "catalog":
                self._stale = False
                if not self._injected_failed:
                    try:
                        self.judge.catalog_loaded(self._injected_rows)
                    except ValueError as error:
                        raise ProtocolError(
                            "the server answers the question for its catalog with something else"
                        ) from error
            self._injected_rows = []
            return self._inject_next()
        return b""

    def _first_ready(self, whole: bytes) -> bytes:
        self._phase = "inject"
        self._status = b"I"
        self._held_ready = [whole]
        self._stale = self.judge.wants_catalog
        self.judge.join(self._lane)
        if self._stale:
            self._injections.append(("catalog", SNAPSHOT_QUERY))
        if self.facts.attachment.postgres_setting is not None:
            self._out.append(SignAssertion(self._backend_pid))
            return b""
        return self._inject_next()
