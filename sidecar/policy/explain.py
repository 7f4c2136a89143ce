"""Offline: which rule decides, and why; and the document's own test cases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from sidecar.model.flow import Address, FlowFacts, Target
from sidecar.model.operation import ConnectOperation, HttpOperation, Operation, SqlOperation
from sidecar.model.principal import Principal
from sidecar.model.verdict import Action, Verdict
from sidecar.model.workload import CiJob, Container, Workload
from sidecar.policy import sql
from sidecar.policy.document import Case, Given
from sidecar.policy.engine import Policy
from sidecar.policy.selectors import Answer

_DEFAULT_PORTS = {"postgres": 5432, "http": 80, "opaque": 0}


@dataclass(frozen=True, slots=True)
class RuleTrace:
    """How one rule answered: `matched` True, False or None (unknown), and each selector's own answer."""

    rule: str
    action: str
    matched: Answer
    selectors: tuple[tuple[str, Answer], ...]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    verdict: Verdict
    rules: tuple[RuleTrace, ...]
    needs: tuple[str, ...]
    """Facts that were asked for and are not given."""


@dataclass(frozen=True, slots=True)
class TestResult:
    name: str
    ok: bool
    message: str


def explain(policy: Policy, operation: Operation, facts: FlowFacts) -> Explanation:
    """Judge, and show how every rule came out."""
    analysis = sql.analyse(operation.text) if isinstance(operation, SqlOperation) else None
    traces: list[RuleTrace] = []
    for rule in policy.rules:
        answers = []
        needs: set[str] = set()
        for selector in rule.selectors:
            subject = policy.subject(operation, facts, analysis)
            subject.every = rule.action is Action.ALLOW
            answers.append((selector.name, selector.test(subject)))
            needs |= subject.needs
        action = rule.action.value if rule.action else "mask"
        traces.append(
            RuleTrace(
                rule.name,
                action,
                rule.holds(policy.subject(operation, facts, analysis)),
                tuple(answers),
                tuple(sorted(needs)),
            )
        )
    return Explanation(
        policy.evaluate(operation, facts),
        tuple(traces),
        tuple(sorted({fact for trace in traces for fact in trace.needs})),
    )


def subject_of(given: Given) -> tuple[Operation, FlowFacts]:
    """An operation and facts from a test case's (or the command line's) words. What is not given is unknown."""
    port = given.port if given.port is not None else _DEFAULT_PORTS[given.protocol]
    host = given.host or ""
    principal = None
    if given.principal:
        principal = Principal(
            str(given.principal.get("issuer", "")),
            str(given.principal.get("subject", "")),
            dict(given.principal.get("claims") or {}),
        )
    facts = FlowFacts(
        flow="00000000-0000-7000-8000-000000000000",
        opened_ns=0,
        client=Address("127.0.0.1", 0),
        target=Target(
            Address(host if _is_address(host) else "", port),
            host,
            "target" if host else "address",
            given.protocol,
            (host,) if host else (),
        ),
        origin=None,
        workload=_workload(given.workload or {}),
        principal=principal,
        identity_error=None if given.principal is not None else "not_given",
    )
    if given.statement is not None:
        return SqlOperation("query", given.statement, given.database, given.user), facts
    if given.method is not None or given.path is not None:
        path = given.path or "/"
        raw, _, query = path.partition("?")
        pairs = tuple((given.query or {}).items()) or tuple(parse_qsl(query, keep_blank_values=True))
        return (
            HttpOperation(
                method=(given.method or "GET").upper(),
                host=given.host,
                path=raw,
                raw_path=raw,
                query=pairs,
                headers=tuple((name.lower(), value) for name, value in (given.headers or {}).items()),
                body_json=given.request_json,
                body_known=True,
            ),
            facts,
        )
    return ConnectOperation(given.protocol), facts


def _is_address(host: str) -> bool:
    return host.replace(".", "").isdigit() or ":" in host


def _workload(given: dict[str, Any]) -> Workload:
    ci, container = given.get("ci"), given.get("container")
    return Workload(
        uid=given.get("uid"),
        exe=str(given.get("exe", "")),
        cgroup=str(given.get("cgroup", "")),
        ci=CiJob(**{"provider": "", **ci}) if isinstance(ci, dict) else None,
        container=_container(container) if isinstance(container, dict) else None,
    )


def _container(given: dict[str, Any]) -> Container:
    labels = given.get("labels")
    return Container(
        id="",
        name=str(given.get("name", "")),
        image=str(given.get("image", "")),
        labels=tuple((str(name), str(value)) for name, value in labels.items())
        if isinstance(labels, dict)
        else (),
    )


def run_case(policy: Policy, case: Case) -> TestResult:
    """One case of `tests:`. Undecided where the outcome hangs on a fact that the case leaves out."""
    operation, facts = subject_of(case.given)
    found = explain(policy, operation, facts)
    verdict = found.verdict
    deciding = next((trace for trace in found.rules if trace.rule == verdict.rule), None)
    if (
        deciding is not None
        and deciding.matched is None
        and deciding.needs
        and verdict.action is not Action.INVALID
    ):
        return TestResult(case.name, False, "undecided: needs " + ", ".join(deciding.needs))
    if verdict.action.value != case.expect.action:
        return TestResult(
            case.name,
            False,
            f"expected {case.expect.action}, got {verdict.action.value} by {verdict.rule or 'default'}: {verdict.reason}",
        )
    if case.expect.rule is not None and verdict.rule != case.expect.rule:
        return TestResult(
            case.name, False, f"expected rule {case.expect.rule}, got {verdict.rule or 'default'}"
        )
    return TestResult(case.name, True, f"{verdict.action.value} by {verdict.rule or 'default'}")


def run_tests(policy: Policy) -> list[TestResult]:
    return [run_case(policy, case) for case in policy.document.tests]
