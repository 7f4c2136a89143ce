"""What OIDs mean: tables, columns, view dependencies and inheritance of one database, and which columns a plan masks.

A snapshot, read in the client's own session through a named statement of ours (design, section 4). What is not in it is masked
while any column mask is in force: unmasked only what is proven clean.
"""

from __future__ import annotations

from typing import Final

from sidecar.codecs.postgres.messages import Column
from sidecar.model.verdict import CatalogChanges, MaskPlan, ValueMask
from sidecar.policy.builtin_functions import builtin_functions
from sidecar.policy.sql_vocabulary import SINKS
from sidecar.session.postgres_functions import Functions

FIRST_USER_OID = 16384
"""FirstNormalObjectId: lower ones are the system's own."""

_STATISTICS: Final = ("most_common_", "histogram_bounds", "range_", "stavalues", "stxd")
"""Columns of the planner's statistics that show values of other tables begin so."""
_STATISTICS_TABLES: Final = ("pg_stats", "pg_statistic")
_MOVE: Final = frozenset({"insert", "update", "merge", "copy", "create", "alter", "notify", "new", *SINKS})
"""Words of code that puts values where others may read them."""
PLANS_MAX: Final = 8
_NONE: Final[frozenset[str]] = frozenset()
_SYSTEM_SCHEMAS: Final = frozenset({"pg_catalog", "information_schema"})


def _summary(table: str, condition: str) -> str:
    """A new row version has a higher xmin than all before it, so that as many rows with the same sum are the same rows."""
    return (
        "(SELECT pg_catalog.concat(pg_catalog.count(*), '/', pg_catalog.sum(s.xmin::pg_catalog.text::pg_catalog.int8))"
        f" FROM pg_catalog.{table} s WHERE {condition})"
    )


def _of_users(column: str) -> str:
    return f"s.{column} OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid"


def _of_relations(column: str) -> str:
    return (
        _of_users(column)
        + f" AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_class c WHERE c.oid OPERATOR(pg_catalog.=) s.{column}"
        " AND c.relpersistence OPERATOR(pg_catalog.=) 't'::pg_catalog.\"char\")"
    )


FINGERPRINT_QUERY = (
    "SELECT 'x', pg_catalog.concat_ws(' ', "
    + ", ".join(
        [
            _summary(
                "pg_class",
                _of_users("oid") + " AND s.relpersistence OPERATOR(pg_catalog.<>) 't'::pg_catalog.\"char\"",
            ),
            _summary("pg_attribute", _of_relations("attrelid")),
            _summary("pg_namespace", "NOT pg_catalog.starts_with(s.nspname::pg_catalog.text, 'pg_')"),
            _summary(
                "pg_type", _of_users("oid") + " AND s.typtype OPERATOR(pg_catalog.=) 'd'::pg_catalog.\"char\""
            ),
            _summary("pg_rewrite", _of_relations("ev_class")),
            _summary("pg_trigger", _of_relations("tgrelid")),
            *(
                _summary(table, _of_users("oid"))
                for table in ("pg_proc", "pg_operator", "pg_cast", "pg_event_trigger")
            ),
            _summary("pg_inherits", "true"),
        ]
    )
    + "), '', '', '', ''"
).encode()
"""What changes with every definition that the snapshot shows, but for temporary ones, which only their own session sees."""

SNAPSHOT_QUERY = (
    FINGERPRINT_QUERY
    + b"""
UNION ALL
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
SELECT DISTINCT 'w', r.ev_class::pg_catalog.text, p.proname::pg_catalog.text, '', '', ''
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
SELECT DISTINCT 'b', names.name::pg_catalog.text, l.lanname::pg_catalog.text,
       CASE WHEN p.prokind OPERATOR(pg_catalog.=) 'a'::pg_catalog."char"
            THEN (SELECT pg_catalog.concat_ws(' ', a.aggtransfn::pg_catalog.text, a.aggfinalfn::pg_catalog.text,
                         a.aggcombinefn::pg_catalog.text, a.aggserialfn::pg_catalog.text, a.aggdeserialfn::pg_catalog.text,
                         a.aggmtransfn::pg_catalog.text, a.aggminvtransfn::pg_catalog.text, a.aggmfinalfn::pg_catalog.text)
                    FROM pg_catalog.pg_aggregate a WHERE a.aggfnoid OPERATOR(pg_catalog.=) p.oid)
            WHEN l.lanname OPERATOR(pg_catalog.=) ALL (ARRAY['c']::pg_catalog.name[])
              OR pg_catalog.length(p.prosrc) OPERATOR(pg_catalog.>) 65536 THEN ''
            ELSE p.prosrc END, '', ''
  FROM pg_catalog.pg_proc p
  JOIN pg_catalog.pg_language l ON l.oid OPERATOR(pg_catalog.=) p.prolang
  LEFT JOIN pg_catalog.pg_operator o ON o.oprcode OPERATOR(pg_catalog.=) p.oid,
       LATERAL (VALUES (p.proname), (o.oprname)) names(name)
 WHERE p.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid AND names.name IS NOT NULL
UNION ALL
SELECT DISTINCT 't', t.tgrelid::pg_catalog.text, p.proname::pg_catalog.text, '', '', ''
  FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) t.tgfoid
 WHERE NOT t.tgisinternal
UNION ALL
SELECT DISTINCT 't', '0', p.proname::pg_catalog.text, '', '', ''
  FROM pg_catalog.pg_event_trigger e JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) e.evtfoid
UNION ALL
SELECT 'a', t.typname::pg_catalog.text, p.proname::pg_catalog.text, a.castcontext::pg_catalog.text, '', ''
  FROM pg_catalog.pg_cast a
  JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) a.castfunc
  JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) a.casttarget OR t.typbasetype OPERATOR(pg_catalog.=) a.casttarget
 WHERE p.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
UNION ALL
SELECT 's', c.oid::pg_catalog.text, a.attnum::pg_catalog.text, a.attname::pg_catalog.text, '', ''
  FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) a.attrelid
 WHERE c.oid OPERATOR(pg_catalog.<) 16384::pg_catalog.oid AND a.attnum OPERATOR(pg_catalog.>) 0
   AND c.relname OPERATOR(pg_catalog.=) ANY (ARRAY['pg_stats','pg_stats_ext','pg_stats_ext_exprs','pg_statistic',
                                                   'pg_statistic_ext_data']::pg_catalog.name[])
UNION ALL
SELECT 'v', r.ev_class::pg_catalog.text, s.oid::pg_catalog.text, '0', '', ''
  FROM pg_catalog.pg_rewrite r
  JOIN pg_catalog.pg_class s ON pg_catalog.strpos(r.ev_action::pg_catalog.text,
                                pg_catalog.concat(':relid ', s.oid::pg_catalog.text, ' ')) OPERATOR(pg_catalog.>) 0
 WHERE r.ev_class OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
   AND s.relname OPERATOR(pg_catalog.=) ANY (ARRAY['pg_statistic','pg_statistic_ext_data']::pg_catalog.name[])
   AND s.oid OPERATOR(pg_catalog.<) 16384::pg_catalog.oid
UNION ALL
SELECT 'i', i.inhrelid::pg_catalog.text, i.inhparent::pg_catalog.text, '', '', '' FROM pg_catalog.pg_inherits i
"""
)


UNREADABLE: Final = "\ufffd"


def _name(value: bytes, codec: str | None) -> str:
    if value.isascii():
        return value.decode("ascii")
    return value.decode(codec, "replace") if codec is not None else UNREADABLE


class Catalog:
    """One database's facts. `known` False: no snapshot could be taken, everything is judged by name and masked if unsure."""

    def __init__(self) -> None:
        self.known = False
        self.fingerprint = ""
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
        self._calling: dict[int, set[str]] = {}
        """The users' own functions that views call."""
        self._triggers: dict[int, set[str]] = {}
        """Functions that a table's triggers call; under 0 those of event triggers."""
        self._triggered: set[str] = set()
        """Tables that got triggers since; empty: event triggers may have come."""
        self.functions = Functions()
        self._parents: dict[int, set[int]] = {}
        self._casts: dict[str, set[str]] = {}
        """Functions of the users' own in casts, by the type that is made; under the empty name, of casts that need not be written."""
        self._children: dict[int, set[int]] = {}
        self._statistics: set[tuple[int, int]] = set()
        """Columns of the system's own relations that show values of other tables; under 0, of any of a relation."""
        self.own: set[str] = set()
        """Names of the users' own functions and operators; one of PostgreSQL's may have the same."""
        self._made: set[str] = set()
        self._doubtful: set[str] = set()
        self._altered: set[str] = set()
        self._views_doubtful = False
        self._all_doubtful = False
        self._plan: MaskPlan | None = None
        self._masks: dict[tuple[int, int], ValueMask | None] = {}
        self._reading: dict[int, tuple[MaskPlan, frozenset[str], frozenset[str]]] = {}
        """By the identity of a plan: functions that may read what it masks, and relations that show it."""
        self._suspects: frozenset[str] | None = None

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
                self._calling.setdefault(int(first), set()).add(second)
            elif kind == "t":
                self._triggers.setdefault(int(first), set()).add(second)
            elif kind == "b":
                self.functions.add(first, second, "" if UNREADABLE in first + third else third)
            elif kind == "p":
                self.own.add(first)
            elif kind == "a":
                self._casts.setdefault(first, set()).add(second)
                self.own.add(first)  # text(x) is a cast as well
                if third != "e":
                    self._casts.setdefault("", set()).add(second)
            elif kind == "x":
                self.fingerprint = first
            elif kind == "s":
                if third.startswith(_STATISTICS):
                    self._statistics |= {(int(first), int(second)), (int(first), 0)}
            else:
                self._parents.setdefault(int(first), set()).add(int(second))
                self._children.setdefault(int(second), set()).add(int(first))
        self._doubtful |= unreadable
        for oid, number, name in sorted(columns):
            if oid not in self._numbers:
                self._numbers[oid] = {}
                self._by_name.setdefault(self._columns[oid, number][1], []).append(oid)
            self._numbers[oid][name] = number

    def note(self, changes: CatalogChanges, *, elsewhere: bool = False) -> bool:
        """Definitions that a statement changes, before they can be read anew. False: it changes none. `elsewhere`: of another session,
        whose tables may hold anything."""
        if changes == CatalogChanges():
            return False
        if elsewhere:
            self._doubtful |= set(changes.made)
        else:
            self._made |= set(changes.made)
        self._doubtful |= set(changes.redefined)
        self._altered |= set(changes.altered)
        self.own |= {made.name for made in changes.functions}
        for made in changes.functions:
            self.functions.add(made.name, made.language, made.body)
        self._triggered |= set(changes.triggers)
        self._reading.clear()
        self._plan = None
        self._views_doubtful = self._views_doubtful or bool(changes.redefined)
        self._all_doubtful = self._all_doubtful or changes.anything
        return True

    def is_known(self, oid: int) -> bool:
        return oid < FIRST_USER_OID or oid in self._numbers

    def knows(self, column: Column) -> bool:
        """Whether it is a column of the system's or of the snapshot; a whole row (attribute 0) is none."""
        oid = column.table_oid
        return oid < FIRST_USER_OID or column.attnum < 0 or (oid, column.attnum) in self._columns

    def is_whole(self, column: Column) -> bool:
        """Whether it is a row of a known relation: its statement says what is in it."""
        return column.attnum == 0 and self.is_known(column.table_oid)

    def has_function(self, name: str) -> bool:
        """Whether a function that PostgreSQL does not bring may have this name."""
        if not self.known or self._all_doubtful or name in self.own:
            return True
        return self.functions.is_known(name) and name not in builtin_functions()

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
                # Made since, of what was judged: only its own names count.
                if column == "*":
                    return plan.may_mask_table(schema, name)
                return plan.column(schema or None, name, column) is not None
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

    def was_made(self, name: str) -> bool:
        """Whether a relation of this name came after the snapshot, through this session."""
        return name in self._made

    def may_read(self, plan: MaskPlan, function: str) -> bool:
        """Whether a function or operator of this name, which PostgreSQL does not bring, may read a masked column."""
        if not self.known or self._all_doubtful or not self.functions.is_known(function):
            return True
        return function in self._functions_reading(plan)

    def code_may_read(self, plan: MaskPlan, code: str) -> bool:
        """The same of a DO block."""
        if not self.known or self._all_doubtful:
            return True
        functions = self._functions_reading(plan)
        return self.functions.code_reads(code, functions | self._reading[id(plan)][2])

    def casts_by_own(self, plan: MaskPlan, type_name: str) -> bool:
        """Whether a cast to a type of this name (empty: one that nobody wrote) may run a function of the users' own that may read a
        masked column."""
        if not self.known or self._all_doubtful:
            return bool(type_name)
        found = self._casts.get(type_name.lstrip("_"), set())
        return bool(found) and not found.isdisjoint(self._functions_reading(plan))

    def code_names(self, plan: MaskPlan, code: str) -> bool:
        """Whether code that moves values names a relation that shows a masked column, or a function that may read one."""
        if not self.known:
            return True
        if not self.functions.names(code, _MOVE):
            return False
        reading = self._functions_reading(plan)
        functions = {name for name in reading if name in self.own or name not in builtin_functions()}
        views = {
            name
            for name, oids in self._by_name.items()
            if self._views_doubtful and any(oid in self._view_sources for oid in oids)
        }
        return self.functions.names(code, functions | views | self._reading[id(plan)][2])

    def may_fire(self, plan: MaskPlan, schema: str, name: str) -> bool:
        """Whether what a statement does to a relation may run a trigger that reads a masked column."""
        if not self.known or not self._triggered.isdisjoint((name, "")):
            return True
        found = self.named(schema, name) if name else []
        if found is None:
            return True
        fired = [self._triggers[oid] for oid in (0, *found) if oid in self._triggers]
        return bool(fired) and not self._functions_reading(plan).isdisjoint(set().union(*fired))

    def _functions_reading(self, plan: MaskPlan) -> frozenset[str]:
        if self._suspects is not None:
            return self._suspects  # while they are being found
        known = self._reading.get(id(plan))
        if known is None:
            known = self._find_reading(plan)
        return known[1]

    def _find_reading(self, plan: MaskPlan) -> tuple[MaskPlan, frozenset[str], frozenset[str]]:
        """Functions and views make each other suspect, until no more come."""
        if len(self._reading) >= PLANS_MAX:
            self._reading.clear()
        functions: frozenset[str] = frozenset()
        while True:
            self._suspects, self._masks = functions, {}
            try:
                relations = self._doubtful | {
                    name
                    for name, oids in self._by_name.items()
                    if any(
                        self._mask_of(plan, (oid, number)) is not None
                        for oid in oids
                        for number in self._numbers[oid].values()
                    )
                }
            finally:
                self._suspects, self._masks = None, {}
            more = self.functions.reading(relations)
            if more == functions:
                found = self._reading[id(plan)] = (plan, functions, frozenset(relations))
                return found
            functions = more

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
        if column.attnum < 0:
            return None  # ctid, xmin and the like
        if not self.knows(column):
            if not derived_reached:
                return None  # a table that this session made, by the statement's tree
            return plan.column(None, None, column.name) or plan.derived()
        found = self._mask_of(plan, key)
        doubtful = not trusted or self._views_doubtful or self._all_doubtful
        if (doubtful and column.table_oid in self._view_sources) or self._columns[key][1] in self._doubtful:
            return found or plan.derived()
        return found

    def _mask_of(self, plan: MaskPlan, key: tuple[int, int]) -> ValueMask | None:
        if self._plan is not plan:
            self._plan = plan
            self._masks = {}
        if key not in self._masks:
            self._masks[key] = self._resolve(plan, key, frozenset())
        return self._masks[key]

    def _resolve(
        self, plan: MaskPlan, key: tuple[int, int], seen: frozenset[int], *, down: bool = True
    ) -> ValueMask | None:
        """`down`: a table also shows the rows of those that inherit from it, which have masks of their own."""
        if key in self._statistics:
            return plan.derived()
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
                found = self._resolve(plan, (parent, number), seen, down=False)
                if found is not None:
                    return found
        for child in sorted(self._children.get(oid, ())) if down else ():
            number = self._numbers.get(child, {}).get(names[2])
            found = self._resolve(plan, (child, number), seen) if number is not None else None
            if found is not None:
                return found
        origins = self._origins.get(key)
        if origins and (oid, 0) not in self._origins and all(origin[0] for origin in origins):
            masks = [self._resolve(plan, origin, seen) for origin in sorted(origins)]
            return next((mask for mask in masks if mask is not None), None)
        return self._of_view(plan, oid, seen)

    def _of_view(self, plan: MaskPlan, oid: int, seen: frozenset[int]) -> ValueMask | None:
        """A column that a view derives may hold any column that the view uses."""
        called = self._calling.get(oid)
        if called and not called.isdisjoint(self._functions_reading(plan)):
            return plan.derived()
        for source, attnum in self._view_sources.get(oid, ()):
            if source < FIRST_USER_OID:
                if (source, attnum) in self._statistics:
                    return plan.derived()
                continue
            used = [attnum] if attnum > 0 else list(self._numbers.get(source, {}).values())
            if any(self._resolve(plan, (source, number), seen) is not None for number in used):
                return plan.derived()
        return None
