"""The document of the design, judged: rules in order, three-valued selectors, masks that add up, observing rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecar.errors import ConfigurationError
from sidecar.model.flow import Address, FlowFacts, Target
from sidecar.model.operation import ConnectOperation, HttpOperation, SqlOperation
from sidecar.model.principal import Principal
from sidecar.model.verdict import Action, Verdict
from sidecar.model.workload import Workload
from sidecar.policy import Policy, load_policy
from sidecar.policy.explain import run_tests

EXAMPLE = (Path(__file__).parents[3] / "examples" / "policy.yaml").read_text()


def facts(host: str = "db.internal", principal: Principal | None = None) -> FlowFacts:
    named = bool(host)
    target = Target(
        Address("10.0.0.1", 5432),
        host or "10.0.0.1",
        "target" if named else "address",
        "postgres",
        (host,) if named else (),
    )
    return FlowFacts("f", 1, Address("127.0.0.1", 1), target, None, Workload(), principal)


def judge(policy: Policy, text: str, **more: object) -> Verdict:
    return policy.evaluate(SqlOperation("query", text, "shop", "app"), facts(**more))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(EXAMPLE, "policy.yaml", hash_key=b"k")


@pytest.mark.parametrize(
    ("text", "action", "rule"),
    [
        ("DROP TABLE t", Action.DENY, "no-schema-changes"),
        ("DELETE FROM t", Action.DENY, "no-unfiltered-deletes"),
        ("DELETE FROM customers WHERE id = 1", Action.HOLD, "customer-deletes"),
        ("SELECT 1", Action.MASK, "pii"),
        ("SELEC 1", Action.INVALID, None),
        ("DO $$ begin end $$", Action.DENY, "no-schema-changes"),
        ("COPY public.customers TO STDOUT", Action.DENY, "pii"),
        ("SELECT 1; DROP TABLE t", Action.DENY, "no-schema-changes"),
        ("CREATE TABLE x AS SELECT ssn FROM customers", Action.DENY, "pii"),
    ],
)
def test_statements(policy: Policy, text: str, action: Action, rule: str | None) -> None:
    for _ in range(2):  # the second answer comes from the cache
        verdict = judge(policy, text)
        assert (verdict.action, verdict.rule) == (action, rule)


def test_an_unknown_host_fires_deny(policy: Policy) -> None:
    assert judge(policy, "DROP TABLE t", host="").action is Action.DENY
    assert judge(policy, "DROP TABLE t", host="db.elsewhere").action is Action.MASK


def test_literals_do_not_share_a_verdict_where_they_decide(policy: Policy) -> None:
    assert judge(policy, "DELETE FROM x WHERE id = 1").action is Action.MASK
    assert judge(policy, "DELETE FROM x WHERE 1 = 1").action is Action.DENY
    assert judge(policy, "DELETE FROM x WHERE id = 2").action is Action.MASK


def test_http_rules_look_at_principal_method_and_path(policy: Policy) -> None:
    reports = Principal("https://issuer", "repo:acme/reports:main")
    operation = HttpOperation("POST", "api.internal", "/v1/orders", "/v1/orders", (), ())
    assert policy.evaluate(operation, facts("api.internal", reports)).action is Action.DENY
    assert policy.evaluate(operation, facts("api.internal")).action is Action.MASK


def test_masks_add_up_and_the_first_wins_for_a_column() -> None:
    policy = load_policy(
        "version: 1\nrules:\n"
        "  - {name: a, when: {protocol: postgres}, mask: {columns: {t.x: redact}}}\n"
        "  - {name: b, when: {protocol: postgres}, mask: {columns: {t.x: null, t.y: {keep_last: 2}}}}\n",
        "p",
    )
    masks = judge(policy, "SELECT 1").masks
    first, second = masks.column("public", "t", "x"), masks.column("public", "t", "y")
    assert first is not None
    assert second is not None
    assert (first.rule, second.rule) == ("a", "b")
    assert second.apply_text(b"12345", 25) == b"***45"
    assert second.apply_text(b"12345", 23) is None
    assert masks.column("public", "u", "x") is None


def test_an_observing_rule_never_decides_and_masks_only_the_record() -> None:
    policy = load_policy(
        "version: 1\nrules:\n"
        "  - {name: trial, mode: observe, when: {statement: DROP}, deny: never}\n"
        "  - {name: trial-mask, mode: observe, when: {protocol: postgres}, mask: {columns: {t.x: redact}}}\n"
        "  - {name: real, when: {statement: DROP, table: keep}, deny: kept}\n",
        "p",
    )
    verdict = judge(policy, "DROP TABLE a")
    assert (verdict.action, verdict.would) == (Action.ALLOW, "deny:trial")
    assert not verdict.masks
    assert verdict.record_masks
    assert judge(policy, "DROP TABLE keep").rule == "real"


def test_default_deny_waits_for_parsed_protocols() -> None:
    policy = load_policy(
        "version: 1\ndefault: deny\nrules:\n  - {name: r, when: {statement: SELECT}, allow: reading}\n", "p"
    )
    assert policy.evaluate(ConnectOperation("postgres"), facts()).action is Action.ALLOW
    assert policy.evaluate(ConnectOperation("opaque"), facts()).action is Action.DENY
    assert judge(policy, "SELECT 1").action is Action.ALLOW
    assert judge(policy, "DELETE FROM t").action is Action.DENY


def test_except_exempts_from_one_rule_only() -> None:
    policy = load_policy(
        "version: 1\nrules:\n"
        "  - {name: a, when: {statement: DROP}, deny: a, except: [{name: e, when: {table: tmp}}]}\n"
        "  - {name: b, when: {statement: DROP, table: tmp}, deny: b}\n",
        "p",
    )
    assert judge(policy, "DROP TABLE tmp").rule == "b"
    assert judge(policy, "DROP TABLE other").rule == "a"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("version: 1\nrules:\n  - {name: a, when: {statment: DROP}, deny: x}\n", 3, "statement"),
        ("version: 1\ndefualt: deny\n", 2, "default"),
        ("version: 1\nrules:\n  - {name: a, deny: x}\n  - {name: a, deny: y}\n", 4, ""),
        ("version: 1\nrules:\n  - {name: a, deny: x, until: 2030-01-01}\n", 3, ""),
        ("version: 1\nrules:\n  - {name: a}\n", 3, ""),
        ("version: 1\nrules:\n  - {name: a, mask: {columns: {x: blur}}}\n", 3, ""),
        ("version: 1\nrules:\n  - {name: a, mask: {detect: {credit_crad: redact}}}\n", 3, "credit_card"),
        ("version: 1\nrules:\n  - {name: a, when: {text: '('}, deny: x}\n", 3, ""),
        ("version: 2\n", 1, ""),
        ("[", 1, ""),
    ],
)
def test_errors_name_line_and_nearest_name(text: str, line: int, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_policy(text, "policy.yaml")
    assert caught.value.line == line
    assert says in (caught.value.hint or "")


def test_the_example_passes_its_own_tests(policy: Policy) -> None:
    assert [result.ok for result in run_tests(policy)] == [True]


def test_a_case_that_leaves_out_what_decides_is_undecided() -> None:
    text = EXAMPLE.replace("host: db.internal, ", "")
    (result,) = run_tests(load_policy(text, "p", hash_key=b"k"))
    assert (result.ok, result.message) == (False, "undecided: needs host")
