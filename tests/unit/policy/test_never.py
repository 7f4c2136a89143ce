"""What can never hold or decide is found when the policy is read."""

from __future__ import annotations

import pytest

from sidecar.errors import ConfigurationError
from sidecar.model.operation import ConnectOperation, HttpOperation, SqlOperation
from sidecar.policy import load_policy
from sidecar.policy.cel import FIELDS
from sidecar.policy.selectors import Subject, cel_facts
from sidecar.policy.sql import analyse
from tests.unit.policy.test_engine import facts


def rule(when: str, action: str = "deny: x") -> str:
    return f"version: 1\nrules:\n  - name: a\n    when: {{{when}}}\n    {action}\n"


@pytest.mark.parametrize(
    ("when", "says"),
    [
        ("statement: []", "`statement` is empty"),
        ("table: []", "`table` is empty"),  # as an allow it would allow everything
        ("query: {}", "`query` is empty"),
        ("workload: {exe: []}", "`exe` is empty"),
        ("host: 10.0.0.0/33", "no host name"),
        ("host: 'db:5432'", "no host name"),
        ("host: 'http://api'", "no host name"),
        ("port: 0", "no TCP port"),
        ("port: [5432, 70000]", "70000"),
        ("path: v1/x", "paths begin with /"),
        ("workload: {exe: psql}", "*/psql"),
        ("workload: {cgroup: ci.slice}", "*/ci.slice"),
        ("""cel: "operation.protocl == 'http'" """, "`operation.protocl`"),
        ("""cel: "operaton.protocol == 'http'" """, "`operaton`"),
        ("""cel: "operation.reads.exists(t, u == 'x')" """, "`u`"),
        ("""cel: "has(target.nam)" """, "`target.nam`"),
        ("""cel: "operation.protocol ==" """, "column"),
    ],
)
def test_a_selector_that_never_holds_is_refused(when: str, says: str) -> None:
    for action in ("deny: x", "allow: x", "mask: {headers: {x: redact}}"):
        with pytest.raises(ConfigurationError) as caught:
            load_policy(rule(when, action), "p")
        assert caught.value.line == 4
        assert caught.value.hint
        assert says in f"{caught.value} {caught.value.hint}"


def test_so_is_one_of_an_exception() -> None:
    text = rule("statement: DROP", "deny: x\n    except: [{name: e, when: {path: v1}}]")
    with pytest.raises(ConfigurationError, match="p:6: `v1` can never match"):
        load_policy(text, "p")


@pytest.mark.parametrize(
    "when",
    [
        "host: [db.internal, '*.internal', 10.0.0.0/8, 10.0.0.1/8, '::1', 'fd00::/8']",
        "path: ['/v1/**', '**', '*']",
        "workload: {exe: ['/usr/bin/psql', '*/psql', '?usr/*'], cgroup: /ci.slice}",
        """cel: "operation.reads.exists(t, t == 'x') && size(operation.statements) > 1" """,
        """cel: "[1, 2].map(n, n + 1).all(m, m > target.port)" """,
        """cel: "operation.headers['x-y'] == principal.subject && workload.uid == 0" """,
    ],
)
def test_what_can_hold_is_not(when: str) -> None:
    assert len(load_policy(rule(when), "p").rules) == 1


@pytest.mark.parametrize(
    ("when", "mask"),
    [
        ("protocol: http", "columns: {t.a: redact}"),
        ("method: GET", "columns: {t.a: redact}"),
        ("protocol: postgres", "json: {$.a: redact}"),
        ("protocol: [postgres, opaque]", "headers: {a: redact}"),
        ("statement: SELECT", "json: {$.a: redact}"),
        ("database: shop", "json: {$.a: redact}"),
    ],
)
def test_a_mask_of_the_other_protocol_is_refused(when: str, mask: str) -> None:
    with pytest.raises(ConfigurationError, match="p:5: this can never apply"):
        load_policy(rule(when, f"mask: {{{mask}}}"), "p")


@pytest.mark.parametrize("when", ["", "protocol: [postgres, http]", "host: x.internal"])
def test_one_rule_may_mask_both(when: str) -> None:
    load_policy(rule(when, "mask: {columns: {t.a: redact}, json: {$.a: redact}}"), "p")


def two(first: str, second: str) -> tuple[str, ...]:
    return load_policy(
        f"version: 1\nrules:\n  - {{name: a, {first}}}\n  - {{name: b, {second}}}\n", "p"
    ).warnings


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("deny: x", "when: {statement: DROP}, deny: y"),
        ("when: {protocol: postgres}, deny: x", "when: {protocol: postgres, statement: SELECT}, allow: y"),
        ("when: {statement: [DROP, ALTER]}, approve: {}", "when: {statement: drop}, deny: y"),
        ("when: {table: 'public.*'}, deny: x", "when: {table: public.orders}, approve: {}"),
        ("allow: true", "when: {statement: DROP}, deny: y"),
    ],
)
def test_a_rule_that_never_decides_is_warned_of(first: str, second: str) -> None:
    (warning,) = two(first, second)
    assert warning.startswith("rule `b` (line 4) never decides: `a` (line 3)")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("when: {statement: DROP}, deny: x", "when: {statement: [DROP, ALTER]}, deny: y"),
        ("when: {statement: DROP}, deny: x", "when: {database: shop}, deny: y"),
        (
            "when: {statement: SELECT}, allow: true",
            "when: {statement: SELECT}, deny: y",
        ),  # of several statements
        ("mode: observe, when: {statement: DROP}, deny: x", "when: {statement: DROP}, deny: y"),
        (
            "when: {statement: DROP}, deny: x, except: [{name: e, when: {user: x}}]",
            "when: {statement: DROP}, deny: y",
        ),
        ("when: {statement: DROP}, deny: x", "when: {statement: DROP}, mask: {columns: {t.a: redact}}"),
        (
            "when: {path: '/v1/*'}, deny: x",
            "when: {path: '/v1/a'}, deny: y",
        ),  # patterns of paths are not compared
        ("when: {text: a}, deny: x", "when: {text: b}, deny: y"),
    ],
)
def test_others_are_not(first: str, second: str) -> None:
    assert two(first, second) == ()


def test_expressions_see_exactly_the_names_that_are_checked() -> None:
    seen: dict[str, set[str]] = {}
    sql = SqlOperation("query", "SELECT 1", "shop", "app")
    for operation, analysis in (
        (sql, analyse("SELECT 1")),
        (HttpOperation("GET", "h", "/", "/", (), ()), None),
        (ConnectOperation("opaque"), None),
    ):
        for root, fields in cel_facts(Subject(operation, facts(), sql=analysis)).items():
            seen.setdefault(root, set()).update(fields)
    assert seen == {root: set(fields) for root, fields in FIELDS.items()}


def test_a_configuration_is_called_one() -> None:
    with pytest.raises(ConfigurationError, match="p:1: this is a configuration, not a policy"):
        load_policy("steering: {scope: all}\n", "p")
