"""Random queries over the mask corpus' schema: nested, correlated, with aliases that shadow. Most of them are valid."""

from __future__ import annotations

import random
from typing import Final

TABLES: Final = {
    "customers": ["id", "name", "ssn", "card", "note"],
    "public.customers": ["id", "name", "ssn", "card", "note"],
    "staff": ["id", "boss", "salary"],
    "orders": ["id", "customer_id", "total", "ssn"],
    "people": ["id", "name", "secret", "shouted", "size"],
    "of_view": ["s2", "i2"],
    "kept": ["id", "x"],
    "other.customers": ["id", "ssn", "label"],
    "united": ["v"],
}
Ranges = list[tuple[str, list[str]]]
"""(alias, its columns)."""


class RandomQueries:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.count = 0

    def fresh(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def query(self, depth: int, outer: Ranges, ctes: Ranges, width: int) -> str:
        pick, prefix = self.random.random, ""
        if depth > 0 and pick() < 0.2:
            name = self.random.choice(["customers", "people", self.fresh("w")])
            columns = [self.fresh("c"), self.fresh("c")]
            prefix = f"WITH {name}({', '.join(columns)}) AS ({self.query(depth - 1, [], ctes, 2)}) "
            ctes = [*ctes, (name, columns)]
        if depth > 0 and pick() < 0.15:
            arms = [self.texts(self.query(depth - 1, outer, ctes, width), width) for _ in range(2)]
            return f"{prefix}{arms[0]} {self.random.choice(['UNION', 'UNION ALL', 'EXCEPT', 'INTERSECT'])} {arms[1]}"
        ranges: Ranges = []
        sources = [self.source(depth, ctes, ranges) for _ in range(self.random.choice([1, 1, 2]))]
        seen = ranges + (outer if pick() < 0.3 else [])
        names = [self.random.choice(["ssn", "name", self.fresh("o")]) for _ in range(width)]
        values = ", ".join(f"{self.value(depth - 1, seen)} AS {name}" for name in names)
        where = f" WHERE ({self.value(0, seen)}) IS NOT NULL" if pick() < 0.2 else ""
        return f"{prefix}SELECT {values} FROM {', '.join(sources)}{where} LIMIT 5"

    def texts(self, query: str, width: int) -> str:
        names = [self.fresh("k") for _ in range(width)]
        return f"SELECT {', '.join(f'{name}::text' for name in names)} FROM ({query}) q({', '.join(names)})"

    def source(self, depth: int, ctes: Ranges, seen: Ranges) -> str:
        kind, alias = self.random.random(), self.fresh("a")
        if ctes and kind < 0.25:
            name, columns = self.random.choice(ctes)
            seen.append((alias, columns))
            return f"{name} AS {alias}"
        if depth > 0 and kind < 0.55:
            lateral = bool(seen) and kind < 0.4
            columns = [self.fresh("c"), self.fresh("c")]
            query = self.query(depth - 1, list(seen) if lateral else [], ctes, 2)
            seen.append((alias, columns))
            return f"{'LATERAL ' if lateral else ''}({query}) AS {alias}({', '.join(columns)})"
        if seen and kind < 0.62:
            value = self.value(0, seen)
            seen.append((alias, ["u"]))
            return f"unnest(ARRAY[({value})::text]) AS {alias}(u)"
        name = self.random.choice(list(TABLES))
        columns = TABLES[name]
        if any(known == name for known, _ in ctes):
            name, columns = "orders", TABLES["orders"]
        if kind < 0.75:
            columns = [self.fresh("c"), self.fresh("c")][: len(columns)]
            seen.append((alias, columns))
            return f"{name} AS {alias}({', '.join(columns)})"
        seen.append((alias, columns))
        if kind < 0.85 and "id" in columns:
            other = self.fresh("a")
            seen.append((other, TABLES["staff"]))
            return (
                f"{name} AS {alias} {self.random.choice(['LEFT', 'FULL'])} JOIN staff AS {other} USING (id)"
            )
        return f"{name} AS {alias}"

    def value(self, depth: int, ranges: Ranges) -> str:
        alias, columns = self.random.choice(ranges)
        column = self.random.choice(columns)
        if depth <= 0:
            return self.random.choice([f"{alias}.{column}", column, f"({alias}).{column}"])
        inner = self.value(depth - 1, ranges)
        return self.random.choice(
            [
                inner, f"({inner})::text", f"concat({inner}, {self.value(0, ranges)})", f"row_to_json({alias})", alias,
                f"ROW({inner}, 1)", f"to_json({inner})", f"ARRAY[({inner})::text]", f"ARRAY({self.query(depth - 1, ranges, [], 1)})",
                f"CASE WHEN ({inner}) IS NULL THEN '' ELSE ({self.value(0, ranges)})::text END",
                f"(SELECT max(z::text) FROM ({self.query(depth - 1, ranges, [], 1)}) y(z))",
            ]
        )  # fmt: skip
