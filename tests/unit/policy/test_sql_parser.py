"""Texts that nest without end do not end the process, and what people write is not taken for one."""

from __future__ import annotations

import random
import time
from typing import Any

import postgast
import pytest

from sidecar.policy import sql
from sidecar.policy.sql_parser import LEVELS_MAX, levels, normalise
from sidecar.policy.sql_secrets import find_passwords
from sidecar.policy.sql_tree import repeated, unwrap

LONG = {
    "sum": ("SELECT ", "1+", "1"),
    "concatenation": ("SELECT ", "a||", "a"),
    "casts": ("SELECT 1", "::int", ""),
    "joins": ("SELECT 1 FROM t", " JOIN t ON a=1 AND b=2", ""),
    "unions": ("SELECT 1, 2", " UNION ALL SELECT 1, 2", ""),
    "postfix": ("SELECT 1", " IS NULL BETWEEN 1 AND 2", ""),
    "not": ("SELECT ", "NOT ", "true"),
    "parentheses": ("SELECT ", "(", "1"),
}


@pytest.mark.parametrize("name", LONG)
def test_a_text_that_nests_without_end_is_not_parsed(name: str) -> None:
    before, part, after = LONG[name]
    text = before + part * 50_000 + after
    assert levels(text) > LEVELS_MAX
    assert sql.analyse(text).too_deep
    assert normalise(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "SELECT " + " || ".join(["a"] * 150),
        "SELECT 1 FROM t" + " JOIN t USING (a)" * 150,
        "SELECT " + "(" * 300 + "1" + ")" * 300,
        "INSERT INTO t VALUES " + ", ".join(["(1, 'a, (b', 1+1)"] * 20_000),
        "SELECT * FROM t WHERE " + " AND ".join(["a BETWEEN 1 AND 2 OR b = 'x'"] * 2_000),
        "SELECT * FROM t WHERE a IN (" + ", ".join(["1"] * 50_000) + ")",
        "SELECT CASE a " + "WHEN 1 THEN 'b' " * 10_000 + "END",
        "SELECT 1;" * 10_000,
    ],
    ids=lambda text: text[:30],
)
def test_long_and_flat_texts_are_judged(text: str) -> None:
    found = sql.analyse(text)
    assert not found.too_deep
    assert found.error is None


def _depth(node: Any) -> int:
    children = [0]
    for descriptor, value in node.ListFields():
        if descriptor.type == descriptor.TYPE_MESSAGE:
            children += [_depth(unwrap(child)) for child in (value if repeated(value) else (value,))]
    return 1 + max(children)


def test_the_bound_is_one() -> None:
    """Random expressions: the tree never has more levels of operators than were counted (each is one or two nodes)."""
    dice = random.Random(7)

    def expression(size: int) -> str:
        if size <= 1:
            return dice.choice(["a", "1", "'x'"])
        left = dice.randint(1, size - 1)
        one, two = expression(left), expression(size - left)
        return dice.choice(
            ["{0}+{1}", "{0} AND {1}", "{0} OR {1}", "{0} IS NULL", "NOT {0}", "({0})", "f({0}, {1})", "{0}::int",
             "CASE WHEN {0} THEN {1} ELSE {0} END", "{0} BETWEEN 1 AND {1}", "ARRAY[{0}, {1}]", "(SELECT {0} UNION SELECT {1}, 2)",
             "{0} IN ({1}, 1)", "(SELECT 1 FROM t JOIN t ON {0} JOIN t ON {1}, t)"]
        ).format(one, two)  # fmt: skip

    seen = 0
    for _ in range(400):
        text = "SELECT " + expression(dice.randint(1, 12))
        try:
            tree = postgast.parse(text)
        except postgast.PgQueryError:
            continue
        seen += 1
        assert _depth(unwrap(tree.stmts[0].stmt)) <= 3 * levels(text) + 6, text
    assert seen > 100


def test_literals_that_speak_of_addresses_cost_no_more_than_their_length() -> None:
    begun = time.monotonic()
    find_passwords("SELECT '://" + ":" * 200_000 + "'", sql.Analysis())
    assert time.monotonic() - begun < 2


def test_comments_in_comments_cost_no_more_than_their_length() -> None:
    begun = time.monotonic()
    assert sql.analyse("/*" * 500_000).too_deep
    assert not sql.analyse("/*" + "=" * 100_000 + "*/ SELECT 1").too_deep
    assert time.monotonic() - begun < 2
