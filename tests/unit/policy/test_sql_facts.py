"""What the syntax tree says, statement by statement."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.policy.sql import Table, analyse


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("SELECT 1", ["SELECT"]),
        ("select 1; drop table x", ["SELECT", "DROP"]),
        ("WITH d AS (DELETE FROM a RETURNING *) SELECT * FROM d", ["SELECT", "DELETE"]),
        ("EXPLAIN ANALYZE DELETE FROM t", ["EXPLAIN", "DELETE"]),
        ("PREPARE p AS DROP TABLE t", None),
        ("PREPARE p AS DELETE FROM t", ["PREPARE", "DELETE"]),
        ("/* x */ DrOp /* y */ TaBlE t", ["DROP"]),
        ("TRUNCATE a, b", ["TRUNCATE"]),
        ("ALTER TABLE a ADD b int", ["ALTER"]),
        ("ALTER TABLE a RENAME TO b", ["ALTER"]),
        ("CREATE TABLE a AS SELECT 1", ["CREATE", "SELECT"]),
        ("INSERT INTO a VALUES (1)", ["INSERT"]),
        ("INSERT INTO a SELECT 1", ["INSERT", "SELECT"]),
        ("DO $$ begin end $$", ["DO"]),
        ("BEGIN", ["BEGIN"]),
        ("COMMIT", ["COMMIT"]),
        ("GRANT ALL ON t TO u", ["GRANT"]),
        ("REVOKE ALL ON t FROM u", ["REVOKE"]),
        ("COPY t TO STDOUT", ["COPY"]),
        ("DROP ROLE x", ["DROP"]),
        ("MERGE INTO t USING s ON t.a = s.a WHEN MATCHED THEN DELETE", ["MERGE", "DELETE"]),
    ],
)
def test_kinds(text: str, kinds: list[str] | None) -> None:
    found = analyse(text)
    if kinds is None:
        assert found.error is not None
    else:
        assert found.statements == kinds


@pytest.mark.parametrize(
    ("text", "reads", "writes"),
    [
        ("SELECT * FROM a.b", {"a.b"}, set()),
        ("SELECT (SELECT 1 FROM x) FROM y JOIN z ON true", {"x", "y", "z"}, set()),
        ("UPDATE t SET a = 1 FROM s WHERE t.id = s.id", {"s"}, {"t"}),
        ("INSERT INTO t SELECT * FROM s", {"s"}, {"t"}),
        ("DELETE FROM public.t USING u WHERE true", {"u"}, {"public.t"}),
        ("WITH t AS (SELECT 1) SELECT * FROM t", set(), set()),
        ("WITH t AS (SELECT 1) SELECT * FROM public.t", {"public.t"}, set()),
        ("SELECT * FROM (WITH t AS (SELECT 1) SELECT * FROM t) q, t", {"t"}, set()),
        ('SELECT * FROM "Customers"', {"Customers"}, set()),
        ("DROP TABLE a, b.c", set(), {"a", "b.c"}),
        ("COPY t FROM STDIN", set(), {"t"}),
    ],
)
def test_tables(text: str, reads: set[str], writes: set[str]) -> None:
    found = analyse(text)
    assert {str(table) for table in found.reads} - {str(t) for t in found.writes} == reads - writes
    assert {str(table) for table in found.writes} == writes


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("DELETE FROM t", True),
        ("DELETE FROM t WHERE true", True),
        ("DELETE FROM t WHERE 1=1", True),
        ("DELETE FROM t WHERE NOT false", True),
        ("DELETE FROM t WHERE id = 1 OR true", True),
        ("DELETE FROM t WHERE 't'::bool", True),
        ("DELETE FROM t WHERE id = 1 AND true", False),
        ("UPDATE t SET a = 1", True),
        ("UPDATE t SET a = 1 WHERE id = 2", False),
        ("WITH x AS (DELETE FROM t RETURNING 1) SELECT 1", True),
    ],
)
def test_without_where(text: str, bare: bool) -> None:
    assert analyse(text).without_where is bare


def test_settings_are_seen_in_every_spelling() -> None:
    assert analyse("SET Workload.Identity = 'x'").settings == {"workload.identity"}
    assert analyse('SET LOCAL "workload"."identity" TO \'x\'').settings == {"workload.identity"}
    assert analyse("SELECT set_config('workload.identity', 'x', true)").settings == {"workload.identity"}
    assert analyse("SELECT set_config('work' || 'load.identity', 'x', true)").settings == {"*"}
    assert analyse("RESET ALL").settings == {"*"}


def test_passwords_are_located() -> None:
    text = "ALTER ROLE bob PASSWORD 'hunter2'"
    ((start, end),) = analyse(text).password_spans
    assert text[start:end] == "'hunter2'"


def test_what_the_grammar_rejects_has_message_and_position() -> None:
    found = analyse("SELECT FROM WHERE")
    assert found.error is not None
    assert "syntax error" in found.error.message
    assert found.error.position > 0


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_no_text_raises(text: str) -> None:
    analyse(text)


def test_a_deep_tree_is_not_judged_but_named() -> None:
    found = analyse("SELECT " + "(" * 300 + "1" + ")" * 300)
    assert found.error is not None or found.too_deep or found.statements == ["SELECT"]


def test_a_table_prints_as_it_was_written() -> None:
    assert str(Table("", "a")) == "a"
    assert str(Table("s", "a")) == "s.a"
