"""Rows and their descriptions: what is masked in them, and what of them is recorded."""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Any, Final

from sidecar.codecs.postgres import messages
from sidecar.codecs.postgres.messages import Column
from sidecar.errors import ProtocolError
from sidecar.model.record import ColumnPart
from sidecar.model.verdict import MaskPlan, ValueMask
from sidecar.session.context import SessionContext
from sidecar.session.postgres_catalog import FIRST_USER_OID
from sidecar.session.postgres_exchange import Decision, Exchange, RowPlan
from sidecar.session.postgres_reach import masked_columns, reads_made
from sidecar.session.postgres_startup import Opening

DETECT_TYPES: Final = frozenset({18, 19, 25, 114, 142, 705, 1042, 1043, 3802})
"""Text-like types in which detectors look: char, name, text, json, xml, unknown, bpchar, varchar, jsonb."""
_JSONB: Final = 3802
ROW_PLANS_MAX: Final = 256
NO_COLUMNS: Final = b"\0\0"


class Rows(Opening):
    def __init__(self, context: SessionContext) -> None:
        super().__init__(context)
        self._pending: deque[Exchange] = deque()
        self._catalog = self.judge.catalog
        self._stale = True
        """The catalog's snapshot is older than a definition."""

    def _described(self, current: Exchange, body: bytes) -> bytes | None:
        if current.kind == "D":
            columns = () if body == NO_COLUMNS else messages.parse_row_description(body)
            if current.portal is not None:
                current.portal.columns, current.portal.description = columns, body
            elif current.prepared is not None:
                current.prepared.columns, current.prepared.description = columns, b"S" + body
            self._pending.popleft()
            return b"" if current.hidden else None
        decision = current.decision
        if decision is not None:
            current.row_plan = self._row_plan(decision, body, None)
        return None

    def _row_plan(self, decision: Decision, body: bytes, columns: tuple[Column, ...] | None) -> RowPlan:
        found = decision.row_plans.get(body)
        if self.judge.outdated():
            self._stale = True
        trusted = not (self._stale and decision.masks_columns)
        if found is not None and trusted and found.catalog == self._catalog.version:
            return found
        if columns is None:
            columns = messages.parse_row_description(body)
        plan, record_plan = decision.plan, decision.record_plan
        masks = self._masks(plan, columns, decision, trusted)
        record_masks = (
            masks
            if record_plan is plan or record_plan == plan
            else self._masks(record_plan, columns, decision, trusted)
        )
        detects = any(item is not None and item.has_detectors for item in (plan, record_plan))
        parts = tuple(
            ColumnPart(
                column.name,
                column.type_oid,
                mask.rule if record_masks is not None and (mask := record_masks[index]) else None,
            )
            for index, column in enumerate(columns)
        )
        found = RowPlan(
            columns,
            self._catalog.version,
            masks,
            record_masks,
            parts,
            plain=masks is None and record_masks is None and not detects,
        )
        unknown = any(not self._catalog.is_known(column.table_oid) for column in columns)
        if unknown and decision.masks_columns:
            self._stale = True
        elif trusted:
            if len(decision.row_plans) >= ROW_PLANS_MAX:
                decision.row_plans.clear()
            decision.row_plans[body] = found
        return found

    def _masks(
        self, plan: MaskPlan | None, columns: tuple[Column, ...], decision: Decision, trusted: bool
    ) -> list[ValueMask | None] | None:
        if plan is None or not plan.has_columns:
            return None
        reached = [decision.reached] * len(columns)
        if not decision.reached and any(
            column.table_oid < FIRST_USER_OID or not self._catalog.knows(column) for column in columns
        ):
            reached = masked_columns(self.judge.engine, self._catalog, plan, decision, len(columns))
            if not reads_made(self._catalog, decision):
                # Whose column it is that nobody knows, its statement does not say either.
                reached = [
                    found or not (self._catalog.knows(column) or self._catalog.is_whole(column))
                    for found, column in zip(reached, columns, strict=True)
                ]
        found = [
            self._catalog.mask(plan, column, derived_reached=derived, trusted=trusted)
            for column, derived in zip(columns, reached, strict=True)
        ]
        return found if any(mask is not None for mask in found) else None

    def _row_plan_of_portal(self, current: Exchange) -> RowPlan | None:
        """An Execute's description came earlier, with a Describe."""
        portal, decision = current.portal, current.decision
        if portal is None or decision is None:
            return None
        if portal.columns is not None:
            return self._row_plan(decision, portal.description, portal.columns)
        if decision.masks_columns:
            return None
        for statement in portal.statements:
            if statement.columns is not None and len(portal.statements) == 1:
                return self._row_plan(decision, statement.description, statement.columns)
        return None

    # -- rows

    def _plain(self, current: Exchange) -> bool:
        """Whether the rows of this answer pass as they are."""
        if current.kind not in "QE" or current.decision is None:
            return False
        row_plan = current.row_plan
        if row_plan is not None:
            return row_plan.plain
        if current.kind == "E":
            current.row_plan = row_plan = self._row_plan_of_portal(current)
            if row_plan is not None:
                return row_plan.plain
        return current.decision.plan is None and current.decision.record_plan is None

    def _plain_rows(self, current: Exchange, data: bytes, view: Any, offset: int, end: int) -> int:
        """A run of rows at once: returns where it ends."""
        begin = offset
        samples = self._samples(current)
        while offset + 5 <= end and data[offset] == 0x44:  # D
            after = offset + 1 + int.from_bytes(data[offset + 1 : offset + 5])
            if after > end or after < offset + 5:
                break
            if samples:
                self._sample_row(current, view[offset + 5 : after])
            current.rows += 1
            samples = samples and self._samples(current)
            offset = after
        current.bytes += offset - begin
        if current.digest is None:
            current.digest = hashlib.sha256(view[begin:offset])
        else:
            current.digest.update(view[begin:offset])
        return offset

    def _row(self, current: Exchange, data: bytes, offset: int, after: int, view: Any) -> bytes | None:
        """A row to which masks or detectors may apply."""
        row_plan, decision = current.row_plan, current.decision
        if row_plan is None or decision is None:
            raise ProtocolError("rows without a description, while masks are in force")
        values = messages.parse_row(view[offset + 5 : after])
        masked = self._mask(current, row_plan, decision.plan, row_plan.masks, values)
        recorded = masked
        if row_plan.record_masks is not row_plan.masks or decision.record_plan is not decision.plan:
            recorded = self._mask(current, row_plan, decision.record_plan, row_plan.record_masks, values)
        shown = data[offset:after] if masked is values else messages.row(masked)
        if self._samples(current):
            self._sample(current, recorded)
        current.rows += 1
        current.count(shown)
        return None if masked is values else shown

    def _mask(
        self,
        current: Exchange,
        row_plan: RowPlan,
        plan: MaskPlan | None,
        masks: list[ValueMask | None] | None,
        values: list[bytes | None],
    ) -> list[bytes | None]:
        """`values` itself where nothing applies."""
        columns = row_plan.columns
        if len(columns) != len(values):
            raise ProtocolError("a row has other columns than were described")
        detect = plan is not None and plan.has_detectors
        if masks is None and not detect:
            return values
        bind = current.portal.bind if current.portal is not None else None
        found = list(values)
        for index, value in enumerate(values):
            if value is None:
                continue
            column = columns[index]
            form = bind.format_of(index) if bind is not None else column.format
            mask = masks[index] if masks is not None else None
            if mask is not None:
                found[index] = None if form else mask.apply_text(value, column.type_oid)
            elif detect and column.type_oid in DETECT_TYPES:
                assert plan is not None
                # In binary, a text is itself; jsonb has a version before it.
                skip = 1 if form and column.type_oid == _JSONB else 0
                shown = plan.detect_text(value[skip:])
                found[index] = value[:skip] + shown if skip else shown
        return found

    def _samples(self, current: Exchange) -> bool:
        """Whether the record has room for another row."""
        limits = self.limits
        return (
            current.rows < limits.response_max_rows
            and current.sample_bytes < limits.response_max_bytes
            and current.record_id is not None
        )

    def _sample_row(self, current: Exchange, body: Any, *, streams: bool = False) -> None:
        """A row that passes as it is; of a long one the beginning, the same whether it streams or came whole."""
        limit = self.limits.response_max_bytes
        whole = len(body) <= limit and not streams
        self._sample(current, messages.parse_row(body) if whole else messages.parse_row_start(body[:limit]))

    def _sample(self, current: Exchange, values: list[bytes | None]) -> None:
        shown: list[str | bytes | None] = []
        room = self.limits.response_max_bytes - current.sample_bytes
        for value in values:
            if value is None:
                shown.append(None)
                continue
            part = value[: max(room, 0)]
            room -= len(part)
            current.sample_bytes += len(part)
            try:
                shown.append(part.decode())
            except UnicodeDecodeError:
                shown.append(part)
        current.sample.append(tuple(shown))
