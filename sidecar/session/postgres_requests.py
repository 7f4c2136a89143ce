"""What the client asks: its messages taken apart, judged, and awaited under their names. Untouched bytes leave as slices of them."""

from __future__ import annotations

import struct
from typing import Final

from sidecar.codecs.postgres import messages
from sidecar.errors import LimitExceeded, ProtocolError
from sidecar.session.context import SessionContext, denial_message
from sidecar.session.postgres_exchange import (
    Decision,
    Exchange,
    Portal,
    Prepared,
)
from sidecar.session.postgres_refusal import Refusals
from sidecar.session.postgres_startup import SERVER

PREPARED_MAX: Final = 65_536
"""Names of statements, and of portals, that one connection may have at once."""

_head = struct.Struct("!cI").unpack_from
_ENDS_PORTALS: Final = frozenset({"CLOSE", "COMMIT", "ROLLBACK", "PREPARE TRANSACTION", "DISCARD"})
_WHOLE: Final = b"QPBFDEC"
"""Types that have to be whole to be judged."""


class Requests(Refusals):
    def __init__(self, context: SessionContext) -> None:
        super().__init__(context)
        self._copy_run: Exchange | None = None
        self._passing_client = 0

    def _client_messages(self, data: bytes) -> None:
        if self._held is not None:
            self._read_ahead(data)
            return
        if self._passing_client:
            take = min(self._passing_client, len(data))
            self._send(SERVER, memoryview(data)[:take])
            self._passing_client -= take
            data = data[take:]
            if not data:
                return
        if self._injecting is not None:
            self._client.keep(data, len(self._client) + len(data))
            if len(self._client) > self.limits.statement_max_bytes:
                raise LimitExceeded(
                    "too much was sent ahead",
                    limit="statement_max_bytes",
                    value=self.limits.statement_max_bytes,
                )
            return
        joined = self._client.join(data)
        if joined is not None:
            self._scan(joined)

    def _scan(self, data: bytes) -> None:
        self._view = memoryview(data)
        self._from = offset = 0
        end = len(data)
        while offset + 5 <= end:
            kind, length = _head(data, offset)
            if length < 4:
                raise ProtocolError(f"a client message of length {length}")
            after = offset + 1 + length
            if after > end:
                if kind in _WHOLE or (self._skipping and kind in b"dcf"):
                    if length > self.limits.statement_max_bytes:
                        raise LimitExceeded(
                            f"a message of {length} bytes",
                            limit="statement_max_bytes",
                            value=self.limits.statement_max_bytes,
                        )
                    break
                self._other_message(kind, length)
                self._flush(end)
                self._passing_client = after - end
                return
            if self._skipping and kind in b"QPBFDECdcf":
                self._flush(offset)  # the server would ignore it
                self._from = after
            elif kind == b"S":
                self._sync(offset, after)
            elif kind in _WHOLE:
                if self._copying:
                    raise ProtocolError("a message other than copy data in COPY FROM STDIN")
                self._copy_run = None
                if self._has_to_inject(kind, data, offset, after):
                    self._flush(offset)
                    self._client.keep(data[offset:], end - offset)
                    shown = self._inject_next()
                    if shown:
                        self._to_client(shown)
                    return
                self._message(kind, data, offset, after)
                if self._held is not None:
                    self._read_ahead(data[after:])
                    return
            else:
                self._other_message(kind, length)
            offset = after
        self._flush(offset)
        if offset < end:
            rest = end - offset
            need = 5 if rest < 5 else 1 + int.from_bytes(data[offset + 1 : offset + 5])
            self._client.keep(data[offset:] if offset else data, need)

    def _sync(self, offset: int, after: int) -> None:
        self._segment += 1
        self._open_segment = self._skipping = False
        run = self._copy_run
        if run is not None and not run.ended:
            raise ProtocolError("Sync inside copy data")
        self._copy_run = None
        if not self._copying:  # there the server ignores it
            self._expect("S")

    def _other_message(self, kind: bytes, length: int) -> None:
        """Copy data, Flush, Terminate, and what is not known: byte for byte."""
        if kind in b"dcf":
            run = self._copy_run
            if run is None or run.ended:
                self._copy_run = run = self._expect("d")
            if kind == b"d":
                run.bytes += length - 4
            else:
                run.ended = True
                self._copying = False
        elif kind == b"H":
            self._open_segment = True

    def _message(self, kind: bytes, data: bytes, offset: int, after: int) -> None:
        body = offset + 5
        if kind == b"Q":
            self._simple(data, offset, after)
            return
        if kind == b"F":
            self._function_call(offset, after)
            return
        self._open_segment = True
        if kind == b"B":
            self._bind(messages.parse_bind(data[body:after]))
        elif kind == b"E":
            self._execute(data, offset, after)
        elif kind == b"P":
            self._parse(data, offset, after)
        else:
            if after < body + 2 or data[body] not in b"SP" or data[after - 1] != 0:
                raise ProtocolError("a Describe or Close is malformed")
            name = data[body + 1 : after - 1]
            if kind == b"D":
                self._describe(data[body] == 0x53, name)
            else:
                self._close_name(data[body] == 0x53, name)

    def _certain(self) -> bool:
        """No message that is still to be answered can change how a text is read."""
        return all(
            exchange.decision.settled if exchange.decision is not None else exchange.kind != "F"
            for exchange in self._pending
        )

    def _decide(self, raw: bytes) -> Decision:
        """On a text that the client sends now."""
        decision = self.judge.decide(raw)
        if decision.ambiguous and not self._certain():
            return self.judge.decide(raw, certain=False)
        if self._pending and not raw.isascii():
            anew = any(
                item.decision.unseen if item.decision is not None else item.kind == "F"
                for item in self._pending
            )
            return self.judge.decide(raw, encoding_certain=not anew)
        return decision

    def _simple(self, data: bytes, offset: int, after: int) -> None:
        if data[after - 1] != 0:
            raise ProtocolError("a Query is not terminated")
        decision = self._resolved(self._decide(data[offset + 5 : after - 1]))
        record_id = self.context.ids.new(self._now)
        self._record(self.judge.request(decision, "query", None, record_id, self._now))
        if decision.passes:
            self._expect_query(decision, record_id)
            return
        self._flush(offset)
        self._from = after
        if decision.denial is not None:
            self._refuse("Q", record_id, decision.denial, data[offset + 5 : after - 1])
        else:
            self._hold("Q", data[offset:after], decision, None, None, record_id)

    def _expect_query(self, decision: Decision, record_id: str) -> Exchange:
        exchange = self._expect("Q")
        exchange.record_id, exchange.decision = record_id, decision
        self._note(decision)
        self._name(exchange, decision)
        return exchange

    def _note(self, decision: Decision) -> None:
        if decision.ddl and self.judge.defining(decision):
            self._defining = self._order
        if decision.ddl and self.judge.wants_catalog:
            self._stale = True
            self.judge.definitions_changed(decision)
        if decision.resets and self._assertion is not None:
            self._reassert = True
        self._note_portals(decision)

    def _note_portals(self, decision: Decision) -> None:
        """The end of a transaction frees the names of portals, and code that nobody saw may give them to others: what then stands
        under one is judged as a statement that nobody saw."""
        facts = decision.verdict.sql
        if facts is None:
            return
        if decision.unseen:
            for name, portal in list(self._portals.items()):
                if portal.in_doubt:
                    self._portals[name] = Portal((Prepared(None),), None, confirmed=True)
        if not _ENDS_PORTALS.isdisjoint(facts.statements):
            for portal in self._portals.values():
                portal.in_doubt = True

    def _parse(self, data: bytes, offset: int, after: int) -> None:
        body = offset + 5
        end = data.find(b"\0", body, after)
        stop = data.find(b"\0", end + 1, after) if end >= 0 else -1
        if stop < 0:
            raise ProtocolError("a Parse is not terminated")
        name, raw = data[body:end], data[end + 1 : stop]
        decision = self._resolved(self._decide(raw))
        if decision.denial is not None:
            record_id = self.context.ids.new(self._now)
            self._record(self.judge.request(decision, "parse", None, record_id, self._now))
            self._flush(offset)
            self._from = after
            self._refuse("P", record_id, decision.denial, raw)
            return
        older = self._statements.get(name)
        if older is None and len(self._statements) >= PREPARED_MAX:
            raise LimitExceeded(
                f"{PREPARED_MAX} prepared statements", limit="prepared_statements", value=PREPARED_MAX
            )
        exchange = self._expect("P")
        exchange.name = name
        exchange.version = self._statements[name] = Prepared(
            raw, self._segment, older=older, reading=self.judge.reading, order=exchange.order
        )

    def _bind(self, bind: messages.Bind) -> None:
        statements = self._versions(self._statements, bind.statement)
        older = self._portals.get(bind.portal)
        if older is None and len(self._portals) >= PREPARED_MAX:
            raise LimitExceeded(f"{PREPARED_MAX} portals", limit="portals", value=PREPARED_MAX)
        exchange = self._expect("B")
        exchange.name = bind.portal
        exchange.version = self._portals[bind.portal] = Portal(
            tuple(statements) or (Prepared(None),), bind, self._segment, older=older, order=exchange.order
        )

    def _describe(self, statement: bool, name: bytes) -> None:
        exchange = self._expect("D")
        if statement:
            found = self._versions(self._statements, name)
            exchange.prepared = found[0] if len(found) == 1 else None
        else:
            portals = self._versions(self._portals, name)
            if len(portals) == 1:
                exchange.portal = portals[0]
                portals[0].described = True

    def _close_name(self, statement: bool, name: bytes) -> None:
        exchange = self._expect("C")
        exchange.name = name
        if statement:
            older = self._statements.get(name)
            if older is not None:
                exchange.version = self._statements[name] = Prepared(
                    None, self._segment, closed=True, older=older
                )
        else:
            portal = self._portals.get(name)
            if portal is not None:
                exchange.version = self._portals[name] = Portal(
                    (), None, self._segment, closed=True, older=portal, order=exchange.order
                )

    def _execute(self, data: bytes, offset: int, after: int) -> None:
        end = data.find(b"\0", offset + 5, after)
        if end < 0:
            raise ProtocolError("an Execute is not terminated")
        portals = self._versions(self._portals, data[offset + 5 : end])
        if len(portals) == 1:
            portal = portals[0]
            decision = self.judge.strictest(portal.statements, self._resolved)
        else:
            # None: made in SQL (a cursor), or not there at all. Several: as strict as the strictest.
            statements = tuple(item for found in portals for item in found.statements) or (Prepared(None),)
            portal = Portal(statements, portals[0].bind if portals else None)
            decision = self.judge.strictest(statements, self._resolved)
        parameters = portal.bind.parameters if portal.bind is not None else None
        record_id = self.context.ids.new(self._now)
        self._record(self.judge.request(decision, "execute", parameters, record_id, self._now))
        if decision.passes:
            self._expect_execute(decision, portal, record_id, data[offset + 5 : end], offset)
            return
        self._flush(offset)
        self._from = after
        if decision.denial is not None:
            self._refuse("E", record_id, decision.denial)
        else:
            self._hold("E", data[offset:after], decision, parameters, portal, record_id)

    def _expect_execute(
        self,
        decision: Decision,
        portal: Portal,
        record_id: str,
        name: bytes,
        offset: int = 0,
    ) -> Exchange:
        if (
            (decision.plan is not None or decision.record_plan is not None)
            and decision.rows
            and not portal.described
            and (decision.masks_columns or all(item.columns is None for item in portal.statements))
        ):
            # Rows without a description cannot be masked: ask for it, unseen by the client. What was said of the statement
            # earlier does not count: search_path may have changed since.
            self._flush(offset)
            self._send(SERVER, messages.describe_portal(name))
            hidden = self._expect("D")
            hidden.hidden, hidden.portal = True, portal
            portal.described = True
        exchange = self._expect("E")
        exchange.record_id, exchange.decision, exchange.portal = record_id, decision, portal
        self._note(decision)
        self._name(exchange, decision)
        return exchange

    def _function_call(self, offset: int, after: int) -> None:
        """Fast-path calls say nothing that a rule could look at: judged as an opaque statement."""
        decision = self.judge.opaque()
        record_id = self.context.ids.new(self._now)
        self._record(self.judge.request(decision, "function_call", None, record_id, self._now))
        if decision.passes and decision.plan is None:
            exchange = self._expect("F")
            exchange.record_id = record_id
            return
        self._flush(offset)
        self._from = after
        rule = decision.verdict.rule or "default"
        text = denial_message(rule, "function calls by fast path cannot be judged")
        self._refuse("Q", record_id, ("42501", text, rule))

    def _resume_client(self) -> None:
        """What the client sent while a statement of ours ran."""
        if self._phase == "ready" and self._injecting is None and self._held is None and len(self._client):
            waiting = self._client.joined()
            if waiting is not None:
                self._scan(waiting)
