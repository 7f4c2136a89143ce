"""Names that SQL gives: PREPARE and EXECUTE, DECLARE and FETCH are judged and masked as the statements that they stand for.

They share their namespaces with the protocol's statements and portals, and so do we: a Bind may name what PREPARE made, FETCH a
portal that Bind made. PREPARE lives until DEALLOCATE, whatever becomes of its transaction; a cursor ends with its transaction unless it
is WITH HOLD. Where code ran that nobody saw (functions, triggers, DO), a name that was given before may mean something else: what it
returns is then masked as far as anything may be, and stays as strictly judged as the statement that was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sidecar.model.verdict import NameUse
from sidecar.policy.sql_names import RETURNS_NAMED
from sidecar.session.postgres_cycle import Cycles
from sidecar.session.postgres_exchange import (
    Decision,
    Exchange,
    Portal,
    Prepared,
    Version,
    candidates,
    older_than,
    own_name,
)
from sidecar.session.postgres_reach import runs_unseen_code

NAMED_MAX: Final = 1024
"""Names beyond these are not remembered."""
VERSIONS_MAX: Final = 8
"""Of one name, while nobody can tell which of them the server has; beyond, nothing is known of it."""


class Names(Cycles):
    def _resolved(self, decision: Decision) -> Decision:
        """FETCH and EXECUTE as what they stand for; any other as it is."""
        if decision.base is None:
            return decision
        here: dict[tuple[bool, str | None], Prepared | None] = {}
        found: list[Prepared | None] = []
        for use in decision.base.names:
            cursor = use.act in ("declare", "close", "fetch")
            if use.act not in RETURNS_NAMED:
                here[cursor, use.name] = self._made(decision, use, self._order + 1) if use.text else None
            elif (cursor, use.name) in here or (cursor, None) in here:
                found.append(here.get((cursor, use.name)))  # given, or taken away, earlier in this text
            else:
                found += self._meant(cursor, (use.name or "").encode())
        return self.judge.standing(decision, found)

    def _meant(self, cursor: bool, name: bytes) -> Sequence[Prepared | None]:
        """All that a name may stand for."""
        if cursor:
            portals = self._versions(self._portals, name)
            return [item for portal in portals for item in portal.statements] or [None]
        return self._versions(self._statements, name) or [None]

    def _versions(self, table: dict[bytes, Version], name: bytes) -> list[Version]:
        """What the server may have under a name; nothing that is known of a name which may be another's."""
        return candidates(table.get(name), self._segment) if own_name(name) else []

    def _made(self, decision: Decision, use: NameUse, order: int) -> Prepared:
        known = use.text is not None and not decision.ambiguous
        raw = self.judge.encoded(use.text or "") if known else None
        return Prepared(raw, self._segment, order=order, executed=True, reading=self.judge.reading)

    def _name(self, exchange: Exchange, decision: Decision) -> None:
        """What the statement, which is on its way, does to names."""
        names = decision.names
        for use in names:
            if use.act in ("prepare", "deallocate"):
                self._give(exchange, self._statements, use, decision)
            elif use.act in ("declare", "close"):
                self._give(exchange, self._portals, use, decision)
        if names and exchange.kind == "Q":
            self._segment += 1  # what follows is not skipped when this fails, as it is up to a Sync
        if (self._statements or self._portals) and runs_unseen_code(self._catalog, decision):
            self.judge.doubted = exchange.order + (not _only_prepares(decision))

    def _give(self, exchange: Exchange, table: dict[bytes, Any], use: NameUse, decision: Decision) -> None:
        for name in [use.name.encode()] if use.name is not None else [name for name in table if name]:
            older = table.get(name)
            if older is None and (not use.text or not own_name(name) or len(table) >= NAMED_MAX):
                continue
            made: Prepared | Portal = self._made(decision, use, exchange.order)
            if table is self._portals:
                assert isinstance(made, Prepared)
                made = Portal((made,), None, self._segment, order=exchange.order, lasting=use.lasting)
            made.closed = use.act in ("deallocate", "close")
            made.older = older
            if older is not None and older_than(older) >= VERSIONS_MAX:
                made.older = None
                made = _unknown(made)
            table[name] = made
            exchange.named.append((table, name, made))


def _only_prepares(decision: Decision) -> bool:
    """Nothing runs yet."""
    return (
        bool(decision.names) and all(use.act == "prepare" for use in decision.names) and not decision.several
    )


def _unknown(version: Prepared | Portal) -> Prepared | Portal:
    """Too many versions to tell them apart: it may be anything."""
    if isinstance(version, Prepared):
        return Prepared(None, version.segment, order=version.order)
    return Portal((Prepared(None),), None, version.segment, order=version.order, lasting=version.lasting)
