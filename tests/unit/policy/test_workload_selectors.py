"""Rules on containers: what no engine has described is unknown, and denies rather than passes."""

from __future__ import annotations

import pytest

from sidecar.model.flow import Address, FlowFacts, Target
from sidecar.model.operation import SqlOperation
from sidecar.model.origin import Origin
from sidecar.model.verdict import Action
from sidecar.model.workload import Container, Workload
from sidecar.policy import load_policy

POLICY = """\
version: 1
default: allow
rules:
  - {name: by-image, when: {statement: [SELECT], workload: {container: {image: "untrusted/*"}}}, deny: x}
  - {name: by-label, when: {statement: [UPDATE], workload: {container: {labels: {team: data, tier: "1"}}}}, deny: x}
  - {name: trusted-only, when: {statement: [DELETE], workload: {container: {labels: {team: data}}}}, allow: true}
  - {name: no-other, when: {statement: [DELETE]}, deny: x}
tests:
  - {name: an image, given: {protocol: postgres, statement: SELECT 1, workload: {container: {image: untrusted/a}}}, expect: {action: deny, rule: by-image}}
  - {name: labels, given: {protocol: postgres, statement: "UPDATE t SET a = 1 WHERE b", workload: {container: {labels: {team: data, tier: "1", more: x}}}}, expect: {action: deny, rule: by-label}}
  - {name: one label only, given: {protocol: postgres, statement: "UPDATE t SET a = 1 WHERE b", workload: {container: {labels: {team: data}}}}, expect: {action: allow}}
"""
SELECT, UPDATE, DELETE = "SELECT 1", "UPDATE t SET a = 1 WHERE b", "DELETE FROM t WHERE b"
TRUSTED = Container("c1", "job", "acme/job:1", (("team", "data"),))


def origin(*, cgroup: str, exited: bool) -> Origin:
    return Origin(1, 1, 0, 0, "psql", "", (), cgroup, 7, 0, exited=exited)


def action(text: str, container: Container | None, seen: Origin | None = None) -> Action:
    target = Target(Address("10.0.0.1", 5432), "db", "target", "postgres", ("db",))
    facts = FlowFacts("f", 1, Address("127.0.0.1", 1), target, seen, Workload(container=container))
    return (
        load_policy(POLICY, "policy.yaml").evaluate(SqlOperation("query", text, "shop", "app"), facts).action
    )


def test_the_documents_own_cases() -> None:
    results = load_policy(POLICY, "policy.yaml").run_tests()
    assert [result for result in results if not result.ok] == []


@pytest.mark.parametrize(
    ("text", "container", "expected"),
    [
        (SELECT, Container("c1", "job", "untrusted/a"), Action.DENY),
        (SELECT, TRUSTED, Action.ALLOW),
        (SELECT, Container("c1"), Action.DENY),
        (SELECT, None, Action.ALLOW),
        (UPDATE, Container("c1", "job", "i", (("team", "data"), ("tier", "1"))), Action.DENY),
        (UPDATE, TRUSTED, Action.ALLOW),
        (UPDATE, Container("c1"), Action.DENY),
        (DELETE, TRUSTED, Action.ALLOW),
        (DELETE, Container("c1"), Action.DENY),
        (DELETE, None, Action.DENY),
    ],
)
def test_known_unknown_and_none(text: str, container: Container | None, expected: Action) -> None:
    assert action(text, container, origin(cgroup="/x", exited=False)) is expected


def test_a_process_that_had_gone_may_have_been_in_any_container() -> None:
    gone, known = origin(cgroup="", exited=True), origin(cgroup="/system.slice", exited=True)
    assert action(SELECT, None, gone) is Action.DENY
    assert action(UPDATE, None, gone) is Action.DENY
    assert action(DELETE, None, gone) is Action.DENY
    assert action(SELECT, None, known) is Action.ALLOW
