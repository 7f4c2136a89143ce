"""CEL: what it sees, and that no expression can hold a worker up."""

from __future__ import annotations

import logging
import time

import pytest

from sidecar.policy.cel import MAX_CHARS, MAX_ITEMS, Expression

FACTS = {
    "operation": {"text": "SELECT 1", "statements": ["SELECT"], "reads": ["a", "b"]},
    "target": {"port": 5432},
}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("target.port == 5432", True),
        ("operation.text.startsWith('DROP')", False),
        ("'SELECT' in operation.statements && operation.reads.size() == 2", True),
        ("operation.reads.exists(t, t == 'b')", True),
        ("operation.text.matches('(?i)^select')", True),
        ("operation.nothing == 1", None),
        ("1 / 0 == 1", None),
        ("operation.text", None),
        ("target.port + 1", None),
    ],
)
def test_answers(text: str, answer: bool | None) -> None:
    assert Expression(text).evaluate(FACTS) is answer


@pytest.mark.parametrize(
    "text",
    [
        "a ==", "(" * 3000 + "1" + ")" * 3000, "1 == 1 || " * 500 + "true", "[1, 2].reduce(r, i, 'ab', r + r) == ''",
        "true || " * (MAX_CHARS // 8) + "false",
    ],
)  # fmt: skip
def test_what_is_refused_when_it_is_compiled(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        Expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "[1,2,3,4,5,6,7,8,9].all(a, [1,2,3,4,5,6,7,8,9].all(b, [1,2,3,4,5,6,7,8,9].all(c, "
        "[1,2,3,4,5,6,7,8,9].all(d, [1,2,3,4,5,6,7,8,9].all(e, [1,2,3,4,5,6,7,8,9].all(f, a + b + c + d + e + f > 0))))))",
        "operation.many.all(a, operation.many.all(b, a + b > 0))",
        "operation.many.map(a, operation.many.map(b, a + b)).size() > 0",
        "operation.text.matches('(a+)+$')",
    ],
)  # fmt: skip
def test_a_costly_expression_is_unknown_soon(text: str) -> None:
    many = [1] * MAX_ITEMS
    facts = {"operation": {"text": "a" * 100_000 + "b", "many": many}}
    began = time.process_time()
    answer = Expression(text).evaluate(facts)
    assert time.process_time() - began < 2
    assert answer is None or "matches" in text


def test_longer_lists_are_not_looked_at() -> None:
    facts = {"operation": {"reads": ["t"] * (MAX_ITEMS + 1)}}
    assert Expression("operation.reads.exists(t, t == 't')").evaluate(facts) is None


def test_a_failure_puts_no_value_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert Expression("operation.text < 1").evaluate({"operation": {"text": "hunter2"}}) is None
        assert Expression("operation.text.matches('(')").evaluate({"operation": {"text": "hunter2"}}) is None
    assert "hunter2" not in caplog.text
