"""From a statement's bytes to a decision, as the server would read them; and to the form in which records show them. No I/O.

What the server reads depends on two settings: `client_encoding` (in some, a backslash is the second half of a character) and
`standard_conforming_strings`. Where they are uncertain, or where the grammar at hand cannot follow them, a text that would be read
differently is refused: it cannot be judged. ASCII is ASCII in every encoding that PostgreSQL has; Python's codecs do not all agree
(its `shift_jis_2004` reads a backslash as a yen sign), so that they see the rest only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from sidecar.model.operation import SqlOperation
from sidecar.model.record import OperationPart, Record
from sidecar.model.verdict import Action, CatalogChanges, Engine, MaskPlan, Verdict
from sidecar.policy import masks
from sidecar.policy.builtin_functions import builtin_functions
from sidecar.policy.reach import ANYTHING, CLEAN
from sidecar.policy.sql import constants_differ_only, may_hold_secrets
from sidecar.policy.sql_names import RETURNS_NAMED
from sidecar.session.context import SessionContext, denial_message, verdict_part
from sidecar.session.postgres_catalog import Catalog
from sidecar.session.postgres_definitions import CHECK_NS, NEVER_NS, Definitions, Gate
from sidecar.session.postgres_exchange import Decision, Prepared
from sidecar.session.postgres_lane import COMPILED
from sidecar.session.postgres_reach import refusal

if COMPILED:
    from sidecar.session.postgres_lane import shape

DECISIONS_MAX: Final = 4096
DECISION_TEXT_MAX_BYTES: Final = 16_384
"""Longer texts are judged each time by the engine, which has a cache of its own."""
STANDING_MAX: Final = 256
ATTACH_RULE: Final = "identity.attach"

_AMBIGUOUS: Final = re.compile(rb"\\'|[\x80-\xff]\\")
_LITERAL: Final = re.compile(r"'(?:[^']|'')*'?|\$(\w*)\$.*?(?:\$\1\$|$)|\d+", re.DOTALL)
NOT_RECORDED: Final = "[not recorded: a text that cannot be parsed and may hold a secret]"
_QUOTED: Final = re.compile(r"\".*\"", re.DOTALL)
_NO_ROWS: Final = frozenset(
    {"BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "SET", "DISCARD", "DEALLOCATE", "PREPARE",
     "DECLARE", "CLOSE", "LISTEN", "UNLISTEN", "NOTIFY", "LOCK", "DROP", "ALTER", "CREATE", "COMMENT", "GRANT",
     "REVOKE", "TRUNCATE", "DO", "PREPARE TRANSACTION"}
)  # fmt: skip
_OPAQUE_TEXT: Final = b"DO $$ a statement that was made out of sight $$"
_CODECS: Final = {
    "UTF8": "utf-8", "LATIN1": "latin-1", "LATIN2": "iso8859-2", "LATIN3": "iso8859-3", "LATIN4": "iso8859-4",
    "LATIN5": "iso8859-9", "LATIN6": "iso8859-10", "LATIN7": "iso8859-13", "LATIN8": "iso8859-14", "LATIN9": "iso8859-15",
    "LATIN10": "iso8859-16", "ISO_8859_5": "iso8859-5", "ISO_8859_6": "iso8859-6", "ISO_8859_7": "iso8859-7",
    "ISO_8859_8": "iso8859-8", "WIN866": "cp866", "WIN874": "cp874", "WIN1250": "cp1250", "WIN1251": "cp1251",
    "WIN1252": "cp1252", "WIN1253": "cp1253", "WIN1254": "cp1254", "WIN1255": "cp1255", "WIN1256": "cp1256",
    "WIN1257": "cp1257", "WIN1258": "cp1258", "KOI8R": "koi8-r", "KOI8U": "koi8-u", "EUC_JP": "euc_jp",
    "EUC_KR": "euc_kr", "EUC_CN": "gb2312", "SJIS": "cp932", "BIG5": "cp950", "GBK": "gbk", "GB18030": "gb18030",
    "UHC": "cp949",
}  # fmt: skip
"""By the names of PostgreSQL's manual, section "Character Set Support". In another (SHIFT_JIS_2004, JOHAB, EUC_TW, …) only ASCII can
be judged."""
_ENCODING: Final = frozenset({"client_encoding", "*"})
_OUT_OF_SIGHT: Final = frozenset({"DO", "CALL", "LOAD", "EXECUTE", "FETCH"})
"""Run what is not in the text."""


class Judge:
    """One connection's: database, user and settings are parts of what is judged."""

    def __init__(self, context: SessionContext) -> None:
        self.context = context
        self.facts = context.facts
        self.engine: Engine = context.engine
        self.database: str | None = None
        self.user: str | None = None
        self.replication = False
        self.target: Any = None
        self.strings = True
        self.encoding = "UTF8"
        self.server_encoding = "UTF8"
        self._decisions: dict[bytes, Decision] = {}
        self._by_verdict: dict[int, Decision] = {}
        """By the identity of a verdict, which the engine gives to all texts of one shape; the decision keeps it alive."""
        self._shapes: dict[bytes, Decision] = {}
        """By `postgres_lane.shape`: only where the engine gave one verdict to two texts of that shape, and would to all."""
        self._executed: dict[bytes, Decision] = {}
        self._standing: dict[tuple[Any, ...], Decision] = {}
        self.doubted = 0
        """Names that were given before the message of this number may mean something else now: code ran that nobody saw."""
        self._column_masks: bool | None = None
        self.generation = 0
        """Counts what made earlier decisions void."""
        self.catalog = Catalog()
        self._shared: Definitions | None = None
        self._seen = self._asked = 0
        """Versions of the shared definitions: taken over, and as of the last question to the server."""
        self._asked_ns = 0

    def changed(self, engine: Engine) -> None:
        self.engine = engine
        self.forget()

    def catalog_loaded(self, rows: list[list[bytes | None]]) -> None:
        self.catalog.load(rows, "utf-8" if self.reading == "SQL_ASCII" else _CODECS.get(self.reading))
        self._forget_verdicts()
        shared = self._shared
        if shared is not None:
            shared.seen(self.catalog.fingerprint, self._asked_ns)
            for changes in (*shared.open_elsewhere(id(self)), *shared.since(self._asked)):
                self.catalog.note(changes, elsewhere=True)
            self._seen = shared.version

    # -- definitions of other sessions

    def join(self, gate: Gate | None) -> None:
        """The connection is open, and its database known."""
        self._shared = self.context.databases.of(self.facts.target.address, self.database or "")
        self._shared.gates[id(self)] = gate
        self._seen = self._shared.version

    def leave(self) -> None:
        if self._shared is not None:
            self._shared.leave(id(self))
            self._shared = None

    def outdated(self) -> bool:
        """Takes over what other sessions have changed since; True: the snapshot is older than that."""
        shared = self._shared
        if shared is None or shared.version == self._seen:
            return False
        for changes in shared.since(self._seen):
            self.catalog.note(changes, elsewhere=True)
        self._seen = shared.version
        self._forget_verdicts()
        return True

    def asking(self, now_ns: int) -> None:
        """A question for the catalog or its fingerprint is sent."""
        self._asked_ns = now_ns
        if self._shared is not None:
            self._asked = self._shared.version
            self._shared.checked_ns = max(self._shared.checked_ns, now_ns)  # the others need not ask as well

    def fingerprint_is(self, found: str) -> bool:
        """The answer; False: the snapshot is older."""
        if self._shared is not None:
            self._shared.seen(found, self._asked_ns)
        return found == self.catalog.fingerprint

    def is_to_check(self, now_ns: int) -> bool:
        """Whether definitions may have changed elsewhere, as long as nobody has asked."""
        shared = self._shared
        return shared is not None and now_ns >= shared.checked_ns + CHECK_NS and self.wants_catalog

    def lane_until_ns(self, status: bytes) -> int:
        """When the lane has to ask the session; inside a transaction nobody can ask the server."""
        shared = self._shared
        if shared is None:
            return NEVER_NS
        if shared.version != self._seen:
            return 0
        return shared.checked_ns + CHECK_NS if status == b"I" and self.wants_catalog else NEVER_NS

    def defining(self, decision: Decision) -> bool:
        """A definition is on its way; False: of none that other sessions see."""
        facts = decision.verdict.sql
        shared, changes = self._shared, facts.changes if facts is not None else None
        if shared is None or facts is None or changes is None or changes == CatalogChanges():
            return False
        if changes.temporary or "CALL" in facts.statements:
            return False
        known = shared.version == self._seen
        shared.begin(id(self), CatalogChanges() if "DO" in facts.statements else changes)
        if known:
            self._seen = shared.version
        return True

    def defined(self) -> None:
        """Its transaction is over."""
        if self._shared is not None:
            known = self._shared.version == self._seen
            self._shared.end(id(self))
            if known:
                self._seen = self._shared.version

    def definitions_changed(self, decision: Decision) -> None:
        """By a statement that is on its way: what was decided with the old ones is void."""
        facts = decision.verdict.sql
        if facts is not None and facts.changes is not None and self.catalog.note(facts.changes):
            self._forget_verdicts()

    def _forget_verdicts(self) -> None:
        self._read_anew()
        self._by_verdict.clear()

    def forget(self) -> None:
        self._forget_verdicts()
        self._column_masks = None

    def parameter(self, name: bytes, value: bytes) -> None:
        """A ParameterStatus."""
        if name == b"standard_conforming_strings":
            self.strings = value == b"on"
            self._read_anew()
        elif name == b"client_encoding":
            self.encoding = value.decode("ascii", "replace")
            self._read_anew()
        elif name == b"server_encoding":
            self.server_encoding = value.decode("ascii", "replace")
            self._read_anew()

    def _read_anew(self) -> None:
        self.generation += 1
        self._decisions.clear()
        self._shapes.clear()
        self._executed.clear()
        self._standing.clear()

    @property
    def wants_catalog(self) -> bool:
        """Whether any statement of this connection could have masked columns."""
        if self._column_masks is None:
            plans = [
                self.engine.column_masks(self.facts, self.database, self.user, observing=observing)
                for observing in (False, True)
            ]
            self._column_masks = any(plan.has_columns for plan in plans)
        return self._column_masks

    # -- deciding

    def decide(self, raw: bytes, *, certain: bool = True, encoding_certain: bool = True) -> Decision:
        """`certain` False: an earlier message, not answered yet, may change the settings that texts are read with;
        `encoding_certain` False: it may change the encoding."""
        decision = self._decisions.get(raw)
        if decision is None:
            decision = self._build(raw)
            if len(raw) <= DECISION_TEXT_MAX_BYTES:
                if len(self._decisions) >= DECISIONS_MAX:
                    self._decisions.clear()
                self._decisions[raw] = decision
        if decision.ambiguous and not certain and decision.denial is None:
            return self._unjudged(
                raw, decision.text, decision.verdict, "an earlier message may change how its strings are read"
            )
        if not encoding_certain and decision.denial is None and not raw.isascii():
            return self._unjudged(
                raw, decision.text, decision.verdict, "an earlier message may change the client's encoding"
            )
        return decision

    def alike(self, raw: bytes) -> Decision | None:
        """The decision on this text, or on one that differs from it in literals only and shares its verdict. None: not known yet."""
        found = self._decisions.get(raw)
        if found is None and self._shapes and len(raw) <= DECISION_TEXT_MAX_BYTES:
            key = shape(raw)
            if key is not None:
                found = self._shapes.get(key)
                # Numbers are no secrets; strings may be.
                if found is not None and b"'" in raw and may_hold_secrets(raw.decode("ascii")):
                    return None
        return found

    def shares(self, raw: bytes) -> bool:
        """Whether `alike` has an answer for every text of this shape that holds no strings."""
        key = shape(raw) if COMPILED else None
        return key is not None and key in self._shapes

    def opaque(self) -> Decision:
        """On a statement whose text nobody saw: selectors of the text are unknown."""
        found = self.decide(_OPAQUE_TEXT)
        return dataclasses.replace(
            self._elsewhere(found), rows=True, operation=OperationPart(kind="query"), row_plans={}
        )

    def strictest(
        self,
        statements: Sequence[Prepared],
        resolved: Callable[[Decision], Decision] = lambda decision: decision,
    ) -> Decision:
        """A refusal before a hold before what passes; of several that pass, the masks of all. `resolved` says what FETCH and EXECUTE
        stand for."""
        found = [resolved(self.prepared(item)) for item in statements] or [self.opaque()]
        if len(found) == 1:
            return found[0]
        for decision in found:
            if decision.denial is not None:
                return decision
        for decision in found:
            if not decision.passes:
                return decision
        return dataclasses.replace(
            found[0],
            plan=_merged([decision.plan for decision in found]),
            record_plan=_merged([decision.record_plan for decision in found]),
            reached=True,
            rows=True,
            steady=False,
            unseen=True,
            base=None,
            row_plans={},
        )

    @property
    def reading(self) -> str:
        """The encoding in which the server reads a text of now. Where either side has none (SQL_ASCII), nothing is converted."""
        if self.encoding == "SQL_ASCII":
            return self.server_encoding
        return "SQL_ASCII" if self.server_encoding == "SQL_ASCII" else self.encoding

    def reads_alike(self, prepared: Prepared) -> bool:
        """Whether a text that the server has parsed would be the same if it came now."""
        return prepared.raw is None or prepared.reading == self.reading or prepared.raw.isascii()

    def prepared(self, item: Prepared) -> Decision:
        """On what a name stands for."""
        if item.raw is None or not self.reads_alike(item) or (item.executed and item.order < self.doubted):
            return self.opaque()
        return self._as_executed(item.raw) if item.executed else self.decide(item.raw)

    def _as_executed(self, raw: bytes) -> Decision:
        """The statement inside a PREPARE or DECLARE."""
        found = self._executed.get(raw)
        if found is None:
            if len(self._executed) >= DECISIONS_MAX:
                self._executed.clear()
            found = self._executed[raw] = dataclasses.replace(
                self.decide(raw), rows=True, executed=True, row_plans={}
            )
        return found

    def standing(self, decision: Decision, statements: Sequence[Prepared | None]) -> Decision:
        """FETCH and EXECUTE as the statements that they stand for. None among them: nobody saw it."""
        base = decision.base
        if base is None:
            return decision
        known = [
            (item.executed, item.raw)
            for item in statements
            if item is not None and item.raw is not None and self.reads_alike(item)
        ]
        doubtful = len(known) < len(statements) or any(use.act == "run" for use in base.names)
        doubtful = doubtful or any(item is not None and item.order < self.doubted for item in statements)
        key = (decision, doubtful, tuple(known))
        found = self._standing.get(key)
        if found is None:
            if len(self._standing) >= STANDING_MAX:
                self._standing.clear()
            inner = [self._as_executed(raw) if executed else self.decide(raw) for executed, raw in known]
            found = self._standing[key] = _as_strict(decision if doubtful else base, inner, doubtful)
        return found

    def _build(self, raw: bytes) -> Decision:
        read = self._text(raw)
        if read is None:
            unreadable = f"it is not ASCII, and cannot be read in the client's encoding {self.encoding}"
            return self._unjudged(raw, raw.decode("latin-1"), None, unreadable)
        text = read
        verdict = self.engine.evaluate(
            SqlOperation("query", text, self.database, self.user, None, self.strings, self.catalog.known),
            self.facts,
        )
        ambiguous = b"\\" in raw and _AMBIGUOUS.search(raw) is not None
        alike = self._by_verdict.get(id(verdict))
        if alike is not None and not ambiguous and len(raw) <= DECISION_TEXT_MAX_BYTES:
            key = shape(raw) if COMPILED else None
            if (
                key is not None
                and key not in self._shapes
                and key == shape(alike.text.encode())
                and constants_differ_only(text)
            ):
                if len(self._shapes) >= DECISIONS_MAX:
                    self._shapes.clear()
                self._shapes[key] = alike
            return self._like(alike, text)
        if ambiguous and not self.strings and b"\\'" in raw:
            return self._unjudged(raw, text, verdict, "standard_conforming_strings is off")
        if verdict.action is Action.INVALID and self.replication:
            return self._replication_command(text)
        denial, part = None, verdict_part(verdict)
        if verdict.action is Action.DENY:
            denial = ("42501", denial_message(verdict.rule, verdict.reason), verdict.rule or "default")
        elif verdict.action is Action.INVALID:
            denial = ("42601", verdict.reason, "")
            if self._hides(text):
                part.reason = _QUOTED.sub('"…"', verdict.reason)
        facts = verdict.sql
        resets = False
        if facts is not None and facts.settings and denial is None:
            resets = "*" in facts.settings
            why = self._reserved(verdict, resets)
            if why is not None:
                denial = ("42501", denial_message(ATTACH_RULE, why), ATTACH_RULE)
                part.action, part.rule, part.reason = "deny", ATTACH_RULE, why
        plan = _useful(verdict.masks)
        unread = facts is not None and facts.copy_unread and plan is not None and plan.has_detectors
        if unread and denial is None and plan is not None:
            why = "detectors cannot read what COPY writes to a file, to a program or in binary"
            denial = ("42501", denial_message(plan.rules[0], why), plan.rules[0])
            part.action, part.rule, part.reason = "deny", plan.rules[0], why
        if facts is not None and facts.may_move and denial is None and plan is not None:
            why = refusal(self.engine, self.catalog, plan, text, facts)
            if why is not None:
                denial = ("42501", denial_message(plan.rules[0], why), plan.rules[0])
                part.action, part.rule, part.reason = "deny", plan.rules[0], why
        kinds = frozenset(verdict.statements)
        decision = Decision(
            text=text,
            verdict=verdict,
            operation=self._operation(raw, text, verdict),
            part=part,
            passes=denial is None and verdict.action is not Action.HOLD,
            denial=denial,
            plan=plan,
            record_plan=_useful(verdict.record_masks),
            reached=facts is None,
            rows=not kinds <= _NO_ROWS,
            ddl=facts is not None and facts.may_change_catalog,
            steady=facts is not None
            and not facts.settings
            and not facts.transaction_control
            and not facts.may_change_catalog
            and kinds.isdisjoint(_OUT_OF_SIGHT)
            and all(item.access != "call" for item in verdict.objects)
            and not any(self.catalog.has_function(name) for name in facts.fields),
            ambiguous=ambiguous,
            resets=resets,
            unseen=self._does_unseen(verdict),
        )
        if facts is not None and any(use.act in RETURNS_NAMED for use in facts.names):
            return self._unseen(decision)
        spans = facts is None or facts.password_spans or facts.masked_literal_spans
        if decision.denial is None and not spans and not ambiguous and len(raw) <= DECISION_TEXT_MAX_BYTES:
            if len(self._by_verdict) >= DECISIONS_MAX:
                self._by_verdict.clear()
            self._by_verdict[id(verdict)] = decision
        return decision

    @staticmethod
    def _like(alike: Decision, text: str) -> Decision:
        """Another text of one shape: the same but for what the record shows."""
        operation = alike.operation
        shown = OperationPart(
            kind="query", text=text, objects=operation.objects, statements=operation.statements
        )
        return Decision(
            text, alike.verdict, shown, alike.part, alike.passes, None, alike.plan, alike.record_plan,
            alike.reached, alike.rows, alike.ddl, alike.steady, False, alike.resets, alike.unseen, alike.row_plans,
        )  # fmt: skip

    def encoded(self, text: str) -> bytes | None:
        """As the client would write it; None where nobody can tell."""
        if text.isascii():
            return text.encode()
        codec = _CODECS.get(self.reading)
        try:
            return text.encode(codec) if codec is not None else None
        except UnicodeEncodeError:
            return None

    def _text(self, raw: bytes) -> str | None:
        """As the server will read it; None where nobody can tell."""
        if raw.isascii():
            return raw.decode("ascii")
        reading = self.reading
        if reading == "SQL_ASCII":
            # Bytes without a meaning. Taken for UTF-8, as policies are, or for Latin-1 where nothing in it is UTF-8.
            text = raw.decode("utf-8", "replace")
            if "\ufffd" not in text:
                return text
            return raw.decode("latin-1") if text.replace("\ufffd", "").isascii() else None
        codec = _CODECS.get(reading)
        if codec is None:
            return None
        try:
            return raw.decode(codec)
        except UnicodeDecodeError:
            return raw.decode("latin-1") if reading == "UTF8" else None  # there the server refuses it as well

    def _does_unseen(self, verdict: Verdict) -> bool:
        """Whether the statement may change the encoding of texts behind it, or run what does not stand in its text."""
        facts = verdict.sql
        if facts is None or not _ENCODING.isdisjoint(facts.settings):
            return True
        if not _OUT_OF_SIGHT.isdisjoint(verdict.statements):
            return True
        if any(item.access == "write" and item.name.endswith("pg_settings") for item in verdict.objects):
            return True  # an UPDATE of the view is a SET
        if any(self.catalog.has_function(name) for name in facts.fields):
            return True
        called = (item.name for item in verdict.objects if item.access == "call")
        return any(name not in builtin_functions() or name in self.catalog.own for name in called)

    def _elsewhere(self, decision: Decision) -> Decision:
        """Rows of a statement that nobody saw: every column mask that may be in force on this connection is."""
        plans = [
            self.engine.column_masks(self.facts, self.database, self.user, observing=observing)
            for observing in (False, True)
        ]
        return dataclasses.replace(
            decision,
            plan=_useful(_merged([decision.plan, plans[0]])),
            record_plan=_useful(_merged([decision.record_plan, plans[1]])),
            reached=decision.reached or plans[0].has_columns or plans[1].has_columns,
            row_plans={},
        )

    def _unseen(self, base: Decision) -> Decision:
        """FETCH and EXECUTE, as long as nobody says what they stand for (`standing`)."""
        found = self._elsewhere(base)
        found.base = base
        if found.denial is None and found.plan is not None and found.plan.has_columns:
            why = self.engine.refuses_reach(moved=CLEAN, probed=CLEAN, derived=ANYTHING, copies=False)
            if why is not None:
                rule = found.plan.rules[0]
                found.denial, found.passes = ("42501", denial_message(rule, why), rule), False
                found.part = msgspec.structs.replace(found.part, action="deny", rule=rule, reason=why)
        return found

    def _reserved(self, verdict: Verdict, everything: bool) -> str | None:
        """Why a statement that sets settings is refused: the one that carries the identity is ours."""
        attachment = self.facts.attachment
        reserved = attachment.reserved_setting
        if not reserved or verdict.sql is None:
            return None
        if reserved.lower() in verdict.sql.settings:
            return f"only the inspector sets {reserved}"
        computed = any(item.access == "call" and item.name == "set_config" for item in verdict.objects)
        if attachment.postgres_setting is not None and everything and computed:
            return f"only the inspector sets {reserved}, and which setting this changes cannot be known"
        return None

    def _unjudged(self, raw: bytes, text: str, verdict: Verdict | None, why: str) -> Decision:
        reason = f"the statement cannot be judged: {why}"
        judged = verdict or self.engine.evaluate(
            SqlOperation("query", "SELECT 1", self.database, self.user), self.facts
        )
        part = verdict_part(judged)
        part.action, part.rule, part.reason = "deny", None, reason
        return Decision(
            text=text,
            verdict=judged,
            operation=self._stripped(raw, text),
            part=part,
            passes=False,
            denial=("42501", denial_message(None, reason), "default"),
        )

    def _replication_command(self, text: str) -> Decision:
        """The walsender has a grammar of its own: as opaque as a DO block, and never with masks in force."""
        found = self.opaque()
        reason = "replication commands hand out rows where they cannot be masked"
        if not found.masks_columns or found.denial is not None:
            return dataclasses.replace(
                found, text=text, operation=OperationPart(kind="replication", text=text), row_plans={}
            )
        return self._unjudged(text.encode(), text, found.verdict, reason)

    # -- records

    def request(
        self, decision: Decision, kind: str, parameters: tuple[Any, ...] | None, record_id: str, now_ns: int
    ) -> Record:
        operation = decision.operation
        if kind != "query" or parameters is not None:
            operation = msgspec.structs.replace(
                operation, kind=kind, parameters=self.shown(decision, parameters)
            )
        return Record(
            id=record_id,
            ts_ns=now_ns,
            kind="request",
            flow=self.facts.flow,
            origin=self.context.origin_summary,
            principal=self.context.principal_summary,
            target=self.target,
            operation=operation,
            verdict=decision.part,
        )

    def shown(self, decision: Decision, parameters: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        """Parameters as records and approvers see them."""
        if not parameters:
            return parameters
        facts = decision.verdict.sql
        limit = self.context.limits.record_text_max_bytes
        hidden = facts.masked_parameters if facts is not None else ()
        if not hidden and all(value is None or len(value) <= limit for value in parameters):
            return parameters
        return tuple(
            f"[masked parameter ${index + 1}]"
            if index in hidden
            else value
            if value is None
            else value[:limit]
            for index, value in enumerate(parameters)
        )

    def _operation(self, raw: bytes, text: str, verdict: Verdict) -> OperationPart:
        """Masked literals and passwords replaced by their place, cut to the limit."""
        facts = verdict.sql
        shown = text
        if facts is not None and (facts.password_spans or facts.masked_literal_spans):
            encoded = bytearray(text.encode("utf-8", "surrogateescape"))
            for start, end in sorted({*facts.password_spans, *facts.masked_literal_spans}, reverse=True):
                encoded[start:end] = f"'[masked at {start}]'".encode()
            shown = encoded.decode("utf-8", "replace")
        elif verdict.action is Action.INVALID and self._hides(text):
            return self._stripped(raw, text)
        limit = self.context.limits.record_text_max_bytes
        cut = len(raw) > limit
        return OperationPart(
            kind="query",
            text=shown[:limit] if cut else shown,
            text_bytes=len(raw) if cut else None,
            text_digest=hashlib.sha256(raw).hexdigest() if cut else None,
            truncated=cut,
            objects=verdict.objects,
            statements=verdict.statements,
        )

    def _hides(self, text: str) -> bool:
        """Whether a text that cannot be parsed may hold what no record may."""
        return self.wants_catalog or may_hold_secrets(text)

    def _stripped(self, raw: bytes, text: str) -> OperationPart:
        """Without literals, beside the digest: for a text in which what is masked cannot be found by its place."""
        limit = self.context.limits.record_text_max_bytes
        shown = NOT_RECORDED if may_hold_secrets(text) else _LITERAL.sub("?", text)
        return OperationPart(
            kind="query",
            text=shown[:limit],
            text_bytes=len(raw),
            text_digest=hashlib.sha256(raw).hexdigest(),
            truncated=len(shown) > limit,
        )


def _useful(plan: MaskPlan | None) -> MaskPlan | None:
    return plan if plan is not None and (plan.has_columns or plan.has_detectors) else None


def _as_strict(decision: Decision, inner: Sequence[Decision], doubtful: bool) -> Decision:
    """`decision` made as strict as the strictest of `inner`, with the masks of all."""
    if decision.denial is not None:
        return decision
    strictest = next(
        (item for item in inner if item.denial is not None),
        next((item for item in inner if not item.passes), None) if decision.passes else None,
    )
    masking = next((item for item in inner if item.plan is not None), None)
    chosen = strictest or (masking if decision.passes else None)
    return dataclasses.replace(
        decision,
        verdict=strictest.verdict if strictest is not None else decision.verdict,
        part=chosen.part if chosen is not None else decision.part,
        passes=decision.passes and strictest is None,
        denial=strictest.denial if strictest is not None else None,
        plan=_merged([decision.plan, *(item.plan for item in inner)]),
        record_plan=_merged([decision.record_plan, *(item.record_plan for item in inner)]),
        reached=doubtful or any(item.reached for item in inner),
        steady=not doubtful and all(item.steady for item in inner),
        unseen=doubtful or any(item.unseen for item in inner),
        operation=msgspec.structs.replace(
            decision.operation, prepared=tuple(item.operation.text for item in inner)
        ),
        stands_for=tuple(inner),
        row_plans={},
    )


def _merged(plans: Sequence[MaskPlan | None]) -> MaskPlan | None:
    rows = list({id(plan): plan for plan in plans if plan}.values())
    if len(rows) <= 1:
        return rows[0] if rows else None
    return masks.merge([plan for plan in rows if isinstance(plan, masks.Plan)])
