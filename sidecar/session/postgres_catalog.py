"""What OIDs mean: tables, columns, view dependencies and inheritance of one database, and which columns a plan masks.

A snapshot, read in the client's own session through a named statement of ours (design, section 4). What is not in it is masked
while any column mask is in force: unmasked only what is proven clean.
"""

from __future__ import annotations

from typing import Final

from sidecar.codecs.postgres.messages import Column
from sidecar.model.verdict import CatalogChanges, MaskPlan, ValueMask

FIRST_USER_OID = 16384
"""FirstNormalObjectId: lower ones are the system's own."""

_STATISTICS: Final = ("most_common_", "histogram_bounds", "range_", "stavalues", "stxd")
"""Columns of the planner's statistics that show values of other tables begin so."""
_STATISTICS_TABLES: Final = ("pg_stats", "pg_statistic")
_SYSTEM_SCHEMAS: Final = frozenset({"pg_catalog", "information_schema"})

SNAPSHOT_QUERY = b"""
SELECT 'c', c.oid::pg_catalog.text, n.nspname::pg_catalog.text, c.relname::pg_catalog.text,
       a.attnum::pg_catalog.text, a.attname::pg_catalog.text
  FROM pg_catalog.pg_attribute a
  JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) a.attrelid
  JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
 WHERE a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped
   AND c.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
   AND c.relkind OPERATOR(pg_catalog.=) ANY (ARRAY['r','v','m','f','p','S','t']::pg_catalog."char"[])
UNION ALL
SELECT 'v', r.ev_class::pg_catalog.text, d.refobjid::pg_catalog.text,
       d.refobjsubid::pg_catalog.text, '', ''
  FROM pg_catalog.pg_depend d
  JOIN pg_catalog.pg_rewrite r ON r.oid OPERATOR(pg_catalog.=) d.objid
 WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_rewrite'::pg_catalog.regclass
   AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_class'::pg_catalog.regclass
   AND r.ev_class OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
   AND r.ev_class OPERATOR(pg_catalog.<>) d.refobjid
UNION ALL
SELECT DISTINCT 'o', r.ev_class::pg_catalog.text, pg_catalog.split_part(u.part, ' ', 1),
       pg_catalog.split_part(pg_catalog.split_part(u.part, ':resorigtbl ', 2), ' ', 1),
       pg_catalog.split_part(pg_catalog.split_part(u.part, ':resorigcol ', 2), ' ', 1), ''
  FROM pg_catalog.pg_rewrite r,
       LATERAL (SELECT pg_catalog.left(p.part, 300) AS part, p.at
                  FROM pg_catalog.unnest(pg_catalog.string_to_array(r.ev_action::pg_catalog.text, ':resno '))
                       WITH ORDINALITY p(part, at)) u
 WHERE r.ev_class OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid AND r.ev_type OPERATOR(pg_catalog.=) '1'::pg_catalog."char"
   AND u.at OPERATOR(pg_catalog.>) 1
UNION ALL
SELECT DISTINCT 'w', r.ev_class::pg_catalog.text, '', '', '', ''
  FROM pg_catalog.pg_depend d
  JOIN pg_catalog.pg_rewrite r ON r.oid OPERATOR(pg_catalog.=) d.objid
  JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) d.refobjid
  JOIN pg_catalog.pg_language l ON l.oid OPERATOR(pg_catalog.=) p.prolang
 WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_rewrite'::pg_catalog.regclass
   AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass
   AND p.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
   AND l.lanname OPERATOR(pg_catalog.<>) ALL (ARRAY['c','internal']::pg_catalog.name[])
UNION ALL
SELECT DISTINCT 'p', names.name::pg_catalog.text, '', '', '', ''
  FROM pg_catalog.pg_proc p
  JOIN pg_catalog.pg_language l ON l.oid OPERATOR(pg_catalog.=) p.prolang
  LEFT JOIN pg_catalog.pg_operator o ON o.oprcode OPERATOR(pg_catalog.=) p.oid,
       LATERAL (VALUES (p.proname), (o.oprname)) names(name)
 WHERE p.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid AND names.name IS NOT NULL
   AND (l.lanname OPERATOR(pg_catalog.<>) ALL (ARRAY['c','internal']::pg_catalog.name[])
     OR p.prokind OPERATOR(pg_catalog.=) 'a'::pg_catalog."char" AND NOT EXISTS (
       SELECT 1 FROM pg_catalog.pg_depend e
        WHERE e.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass
          AND e.objid OPERATOR(pg_catalog.=) p.oid AND e.deptype OPERATOR(pg_catalog.=) 'e'::pg_catalog."char"))
UNION ALL
SELECT 'i', i.inhrelid::pg_catalog.text, i.inhparent::pg_catalog.text, '', '', '' FROM pg_catalog.pg_inherits i
"""


UNREADABLE: Final = "\ufffd"


def _name(value: bytes, codec: str | None) -> str:
    if value.isascii():
        return value.decode("ascii")
    return value.decode(codec, "replace") if codec is not None else UNREADABLE


class Catalog:
    """One database's facts. `known` False: no snapshot could be taken, everything is judged by name and masked if unsure."""

    def __init__(self) -> None:
        self.known = False
        self.version = 0
        """Counts snapshots."""
        self._columns: dict[tuple[int, int], tuple[str, str, str]] = {}
        self._numbers: dict[int, dict[str, int]] = {}
        """A relation's columns by name, in their order."""
        self._by_name: dict[str, list[int]] = {}
        self._view_sources: dict[int, set[tuple[int, int]]] = {}
        self._origins: dict[tuple[int, int], set[tuple[int, int]]] = {}
        """What the rule of a view says its columns are: another relation's own, or (0, 0). A rule is kept as a tree (pg_node_tree), in
        which every entry of a target list ends in `:resno 1 :resname a :ressortgroupref 0 :resorigtbl 0 :resorigcol 0`; names have
        their spaces escaped. Those of queries inside are among them: a column is another's own only where all of its number are."""
        self._calling: set[int] = set()
        """Views that call functions of the users' own."""
        self._parents: dict[int, set[int]] = {}
        self.own: set[str] = set()
        """Names of the users' own functions and operators; one of PostgreSQL's may have the same."""
        self._made: set[str] = set()
        self._doubtful: set[str] = set()
        self._altered: set[str] = set()
        self._views_doubtful = False
        self._all_doubtful = False
        self._plan: MaskPlan | None = None
        self._masks: dict[tuple[int, int], ValueMask | None] = {}

    def load(self, rows: list[list[bytes | None]], codec: str | None = "utf-8") -> None:
        """Replace all facts by a snapshot's rows, of which the client's encoding is `codec` (Python's name). What cannot be decoded
        is not known, and so masked; None: nothing but ASCII can be."""
        version = self.version
        self.__init__()  # type: ignore[misc]
        self.known, self.version = True, version + 1
        columns: list[tuple[int, int, str]] = []
        unreadable: set[str] = set()
        for values in rows:
            kind, first, second, third, fourth, fifth = (_name(value or b"", codec) for value in values)
            if kind == "c" and UNREADABLE in second + third + fifth:
                unreadable.add(third)
            elif kind == "c":
                self._columns[(int(first), int(fourth))] = (second, third, fifth)
                columns.append((int(first), int(fourth), fifth))
            elif kind == "v":
                self._view_sources.setdefault(int(first), set()).add((int(second), int(third)))
            elif kind == "o":
                known = second.isdigit() and third.isdigit() and fourth.isdigit()
                origin = (int(third), int(fourth)) if known else (0, 0)
                self._origins.setdefault((int(first), int(second) if known else 0), set()).add(origin)
            elif kind == "w":
                self._calling.add(int(first))
            elif kind == "p":
                self.own.add(first)
            else:
                self._parents.setdefault(int(first), set()).add(int(second))
        self._doubtful |= unreadable
        for oid, number, name in sorted(columns):
            if oid not in self._numbers:
                self._numbers[oid] = {}
                self._by_name.setdefault(self._columns[oid, number][1], []).append(oid)
            self._numbers[oid][name] = number

    def note(self, changes: CatalogChanges) -> bool:
        """Definitions that a statement changes, before they can be read anew. False: it changes none."""
        if changes == CatalogChanges():
            return False
        self._made |= set(changes.made)
        self._doubtful |= set(changes.redefined)
        self._altered |= set(changes.altered)
        self.own |= set(changes.functions)
        self._views_doubtful = self._views_doubtful or bool(changes.redefined)
        self._all_doubtful = self._all_doubtful or changes.anything
        return True

    def is_known(self, oid: int) -> bool:
        return oid < FIRST_USER_OID or oid in self._numbers

    # -- by name, for the lineage (policy.reach.Relations, see postgres_reach)

    def named(self, schema: str, name: str) -> list[int] | None:
        """The relations that a name may mean, whatever search_path says; None: nobody can tell."""
        if not self.known or self._all_doubtful or name in self._doubtful:
            return None
        found = self._by_name.get(name, [])
        if schema and schema != "pg_temp":
            found = [oid for oid in found if self._schema(oid) == schema]
        if self._views_doubtful and any(oid in self._view_sources for oid in found):
            return None
        return found

    def _schema(self, oid: int) -> str:
        return next((self._columns[oid, number][0] for number in self._numbers[oid].values()), "")

    def columns(self, schema: str, name: str) -> tuple[str, ...] | None:
        found = self.named(schema, name)
        if not found or name in self._made or name in self._altered:
            return None
        lists = {tuple(self._numbers[oid]) for oid in found}
        return lists.pop() if len(lists) == 1 else None

    def may_have(self, schema: str, name: str, column: str) -> bool:
        found = self.named(schema, name)
        if not found or name in self._made or name in self._altered:
            return True
        return any(column in self._numbers[oid] for oid in found)

    def may_mask(self, plan: MaskPlan, schema: str, name: str, column: str) -> bool:
        """Whether a column (`*`: any) of a relation so named may be masked, or not be known."""
        found = self.named(schema, name)
        if found is None:
            return True
        if not found:
            if name in self._made:
                return False  # made since, of what was judged
            system = schema in _SYSTEM_SCHEMAS or (not schema and name.startswith("pg_"))
            if not system:
                return True
            statistics = name.startswith(_STATISTICS_TABLES)
            return statistics and (column == "*" or column.startswith(_STATISTICS))
        numbers = [
            (oid, number)
            for oid in found
            for label, number in self._numbers[oid].items()
            if column in ("*", label)
        ]
        if not numbers:
            return name not in self._altered
        return any(self._mask_of(plan, key) is not None for key in numbers)

    def may_call(self, name: str) -> bool:
        """Whether reading a relation of this name may run a function of the users' own, as far as the snapshot says."""
        found = self.named("", name)
        return found is None or any(self._calls(oid, frozenset()) for oid in found)

    def _calls(self, oid: int, seen: frozenset[int]) -> bool:
        if oid in self._calling:
            return True
        sources = {source for source, _ in self._view_sources.get(oid, ())} - seen
        return any(self._calls(source, seen | {oid}) for source in sources)

    # -- by OID, for descriptions

    def mask(
        self, plan: MaskPlan, column: Column, *, derived_reached: bool, trusted: bool = True
    ) -> ValueMask | None:
        """What to do with one result column. `trusted` False: definitions may have changed since the snapshot, so that a view,
        which keeps its OID when it is replaced, may show anything."""
        if column.table_oid == 0:
            return (plan.column(None, None, column.name) or plan.derived()) if derived_reached else None
        if column.table_oid < FIRST_USER_OID:
            if derived_reached or column.name.startswith(_STATISTICS):
                return plan.derived()
            return plan.column("pg_catalog", None, column.name)
        key = (column.table_oid, column.attnum)
        if not self.is_known(column.table_oid) or key not in self._columns:
            return plan.column(None, None, column.name) or plan.derived()
        found = self._mask_of(plan, key)
        if not trusted and column.table_oid in self._view_sources:
            return found or plan.derived()
        return found

    def _mask_of(self, plan: MaskPlan, key: tuple[int, int]) -> ValueMask | None:
        if self._plan is not plan:
            self._plan = plan
            self._masks = {}
        if key not in self._masks:
            self._masks[key] = self._resolve(plan, key, frozenset())
        return self._masks[key]

    def _resolve(self, plan: MaskPlan, key: tuple[int, int], seen: frozenset[int]) -> ValueMask | None:
        names = self._columns.get(key)
        oid = key[0]
        if names is None or oid in seen:
            return None if oid < FIRST_USER_OID else plan.derived() if names is None else None
        if names[0] == "pg_toast":
            return plan.derived()  # raw values of some table's
        direct = plan.column(*names)
        if direct is not None:
            return direct
        seen = seen | {oid}
        for parent in self._parents.get(oid, ()):
            number = self._numbers.get(parent, {}).get(names[2])
            if number is not None:
                found = self._resolve(plan, (parent, number), seen)
                if found is not None:
                    return found
        origins = self._origins.get(key)
        if origins and (oid, 0) not in self._origins and all(origin[0] for origin in origins):
            masks = [
                self._resolve(plan, origin, seen) for origin in sorted(origins) if origin[0] >= FIRST_USER_OID
            ]
            return next((mask for mask in masks if mask is not None), None)
        return self._of_view(plan, oid, seen)

    def _of_view(self, plan: MaskPlan, oid: int, seen: frozenset[int]) -> ValueMask | None:
        """A column that a view derives may hold any column that the view uses."""
        if oid in self._calling:
            return plan.derived()
        for source, attnum in self._view_sources.get(oid, ()):
            if source < FIRST_USER_OID:
                continue
            used = [attnum] if attnum > 0 else list(self._numbers.get(source, {}).values())
            if any(self._resolve(plan, (source, number), seen) is not None for number in used):
                return plan.derived()
        return None
