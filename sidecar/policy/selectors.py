"""Selectors under `when`: each compiled to a function of a subject, answering True, False or None (unknown).

`deny`, `approve` and `mask` fire on True and None, `allow` only on True (design, section 2).
"""

from __future__ import annotations

import datetime
import fnmatch
import ipaddress
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import re2

from sidecar.model.flow import FlowFacts
from sidecar.model.operation import ConnectOperation, HttpOperation, Operation, SqlOperation
from sidecar.policy.cel import Expression
from sidecar.policy.document import When
from sidecar.policy.sql import Analysis, Table

Answer = bool | None

SQL_ONLY: Final = ("statement", "table", "reads", "writes", "function", "without_where", "text")
HTTP_ONLY: Final = ("method", "path", "query", "headers", "request_json")

_RE2_OPTIONS: Final = re2.Options()
_RE2_OPTIONS.log_errors = False  # the error is raised; RE2 would also print it, in its own words

_EPOCH: Final = datetime.datetime.fromtimestamp(0, datetime.UTC)


@dataclass(slots=True)
class Subject:
    """What is judged: an operation of a flow, with the SQL's analysis where it is one. `needs` collects facts that were asked
    for and are not there."""

    operation: Operation
    facts: FlowFacts
    sql: Analysis | None = None
    needs: set[str] = field(default_factory=set)
    now: datetime.datetime = _EPOCH
    every: bool = False
    """An `allow` is asked for: each statement, table and function has to be among those named, not just any."""

    def unknown(self, fact: str) -> None:
        self.needs.add(fact)


@dataclass(frozen=True, slots=True)
class Selector:
    name: str
    test: Callable[[Subject], Answer]


def words(value: Any) -> tuple[Any, ...]:
    return () if value is None else tuple(value) if isinstance(value, tuple | list) else (value,)


def all_of(answers: Iterable[Answer]) -> Answer:
    """Kleene's conjunction."""
    result: Answer = True
    for answer in answers:
        if answer is False:
            return False
        if answer is None:
            result = None
    return result


def _glob(patterns: tuple[str, ...], value: str | None, fact: str, subject: Subject) -> Answer:
    if value is None:
        subject.unknown(fact)
        return None
    return any(fnmatch.fnmatchcase(value, pattern) for pattern in patterns)


def _protocol(patterns: tuple[str, ...]) -> Callable[[Subject], Answer]:
    def test(subject: Subject) -> Answer:
        operation = subject.operation
        if isinstance(operation, SqlOperation):
            return "postgres" in patterns
        if isinstance(operation, HttpOperation):
            return "http" in patterns
        return operation.protocol in patterns

    return test


def _host(patterns: tuple[str, ...]) -> Callable[[Subject], Answer]:
    networks = []
    names = []
    for pattern in patterns:
        try:
            networks.append(ipaddress.ip_network(pattern, strict=False))
        except ValueError:
            names.append(pattern.lower().rstrip("."))

    def test(subject: Subject) -> Answer:
        target = subject.facts.target
        known = {name.lower() for name in target.names}
        claimed = {name.lower() for name in target.claimed}
        if target.host_source != "address":
            (claimed if target.host_source == "sni" else known).add(target.host.lower())
        if isinstance(subject.operation, HttpOperation) and subject.operation.host:
            claimed.add(subject.operation.host.lower())
        if any(fnmatch.fnmatchcase(name, pattern) for name in known for pattern in names):
            return True
        if networks:
            try:
                address = ipaddress.ip_address(target.address.host)
            except ValueError:
                subject.unknown("host")
                return None
            if any(address in network for network in networks if network.version == address.version):
                return True
        if not names:
            return False
        if any(fnmatch.fnmatchcase(name, pattern) for name in claimed for pattern in names):
            # Only the client says so: it may be there, or dial another address under this name.
            subject.unknown("host")
            return None
        if known | claimed and not any(name in target.unresolved for name in names):
            return False
        # No name is known for this address, or one that the rule uses does not resolve at the moment.
        if any("*" in name or name in target.unresolved for name in names) or target.host == "":
            subject.unknown("host")
            return None
        return False

    return test


def _number(
    numbers: tuple[int, ...], fact: str, get: Callable[[Subject], int | None]
) -> Callable[[Subject], Answer]:
    def test(subject: Subject) -> Answer:
        value = get(subject)
        if not value and value != 0:
            subject.unknown(fact)
            return None
        return value in numbers

    return test


def _fact(
    patterns: tuple[str, ...], fact: str, get: Callable[[Subject], str | None]
) -> Callable[[Subject], Answer]:
    return lambda subject: _glob(patterns, get(subject), fact, subject)


def _sql_fact(name: str, test: Callable[[Analysis, bool], Answer]) -> Selector:
    """False for anything that is not SQL; unknown for what the tree cannot show."""

    def run(subject: Subject) -> Answer:
        if not isinstance(subject.operation, SqlOperation):
            return False
        analysis = subject.sql
        if analysis is None or analysis.too_deep or analysis.unjudged:
            return None
        answer = test(analysis, subject.every)
        return None if analysis.opaque and (answer is False or name != "statement") else answer

    return Selector(name, run)


def table_matches(pattern: str, table: Table, every: bool = False) -> bool:
    """Right-aligned; an unqualified name matches any schema, because search_path may be changed unseen. Where something is allowed
    or exempted (`every`), `staging.*` means the schema's tables: one without its schema may be any."""
    schema, _, name = pattern.rpartition(".")
    if every and schema and not table.schema and ("*" in name or "?" in name):
        return False
    if not fnmatch.fnmatchcase(table.name.lower(), name.lower()):
        return False
    return (
        not schema
        or not table.schema
        or fnmatch.fnmatchcase(table.schema.lower(), schema.rpartition(".")[2].lower())
    )


def _among(answers: Iterable[bool], every: bool) -> bool:
    """Any of them; all of them, and at least one, where an allow asks."""
    found = list(answers)
    return bool(found) and all(found) if every else any(found)


def function_matches(pattern: str, function: str) -> bool:
    """Right-aligned, as tables are."""
    schema, _, name = pattern.lower().rpartition(".")
    called, _, called_name = function.lower().rpartition(".")
    return fnmatch.fnmatchcase(called_name, name) and (
        not schema or not called or fnmatch.fnmatchcase(called, schema)
    )


def _calls(analysis: Analysis, every: bool) -> set[str]:
    """Each function once: with its schema where it has one. `(x).f` and `t.f` may be calls as well; of the latter nearly every one is
    a column, which an allow need not name."""
    qualified = {name for name in analysis.functions if "." in name}
    plain = analysis.functions - {name.rpartition(".")[2] for name in qualified}
    return qualified | plain | analysis.value_fields | (set() if every else analysis.row_fields)


def _tables(patterns: tuple[str, ...], *, read: bool, written: bool) -> Callable[[Analysis, bool], Answer]:
    def test(analysis: Analysis, every: bool) -> Answer:
        tables = (analysis.reads if read else set()) | (analysis.writes if written else set())
        return _among(
            (any(table_matches(pattern, table, every) for pattern in patterns) for table in tables), every
        )

    return test


def path_regex(pattern: str) -> Any:
    """`*` within a segment, `**` over segments; RE2, anchored."""
    parts = []
    index = 0
    while index < len(pattern):
        if pattern.startswith("**", index):
            parts.append(".*")
            index += 2
        elif pattern[index] == "*":
            parts.append("[^/]*")
            index += 1
        else:
            parts.append(re2.escape(pattern[index]))
            index += 1
    return re2.compile("(?s)^" + "".join(parts) + "$")


def _http(name: str, test: Callable[[HttpOperation, Subject], Answer]) -> Selector:
    def run(subject: Subject) -> Answer:
        return test(subject.operation, subject) if isinstance(subject.operation, HttpOperation) else False

    return Selector(name, run)


_METHOD_HEADERS: Final = ("x-http-method-override", "x-http-method", "x-method-override")


def _methods(operation: HttpOperation) -> set[str]:
    """The method, and what frameworks may take for it (`X-HTTP-Method-Override`, `?_method=`)."""
    found = {operation.method.upper()}
    found |= {value.upper() for name, value in operation.headers if name.lower() in _METHOD_HEADERS}
    return found | {value.upper() for name, value in operation.query if name == "_method"}


def _alike(answers: Iterable[bool]) -> Answer:
    """One answer of several readings; unknown where they differ."""
    found = set(answers)
    return found.pop() if len(found) == 1 else None


def _path(patterns: list[Any]) -> Callable[[HttpOperation, Subject], Answer]:
    """Where servers differ in what the path is, the answer is unknown; also for a slash at the end, which an allow has to name."""

    def matches(path: str) -> bool:
        return any(pattern.match(path) is not None for pattern in patterns)

    def test(operation: HttpOperation, subject: Subject) -> Answer:
        readings = [operation.path, *operation.path_readings]
        if not subject.every:
            readings += [path[:-1] for path in readings if len(path) > 1 and path.endswith("/")]
        return _alike(matches(path) for path in readings)

    return test


def _pairs(
    wanted: dict[str, str], get: Callable[[HttpOperation], tuple[tuple[str, str], ...]]
) -> Callable[[HttpOperation, Subject], Answer]:
    lowered = {name.lower(): pattern for name, pattern in wanted.items()}

    def test(operation: HttpOperation, subject: Subject) -> Answer:
        return all(
            any(name.lower() == key and fnmatch.fnmatchcase(value, pattern) for name, value in get(operation))
            for key, pattern in lowered.items()
        )

    return test


def _json_equals(wanted: dict[str, Any]) -> Callable[[HttpOperation, Subject], Answer]:
    def test(operation: HttpOperation, subject: Subject) -> Answer:
        if not operation.body_known:
            subject.unknown("request_json")
            return None
        return all(
            _dig(operation.body_json, key.removeprefix("$.").split(".")) == value
            for key, value in wanted.items()
        )

    return test


def _dig(node: Any, names: list[str]) -> Any:
    for name in names:
        if not isinstance(node, dict) or name not in node:
            return None
        node = node[name]
    return node


def _principal(when: Any) -> Callable[[Subject], Answer]:
    issuers, subjects = words(when.issuer), words(when.subject)
    claims = when.claims or {}

    def test(subject: Subject) -> Answer:
        principal = subject.facts.principal
        if principal is None:
            # Without a token nobody is there, and a rule about somebody does not hold. A token that could not be verified may
            # be anybody's.
            if subject.facts.identity_error in (None, "no_token"):
                return False
            subject.unknown("principal")
            return None
        found = [True]
        if issuers:
            found.append(any(fnmatch.fnmatchcase(principal.issuer, pattern) for pattern in issuers))
        if subjects:
            found.append(any(fnmatch.fnmatchcase(principal.subject, pattern) for pattern in subjects))
        for name, wanted in claims.items():
            value = principal.claims.get(name)
            if isinstance(wanted, str) and isinstance(value, str):
                found.append(fnmatch.fnmatchcase(value, wanted))
            elif isinstance(value, list):
                found.append(wanted in value)
            else:
                found.append(value == wanted)
        return all(found)

    return test


def _workload(when: Any) -> list[Selector]:
    found: list[Selector] = []
    if when.uid is not None:
        found.append(
            Selector("workload.uid", _number(words(when.uid), "workload.uid", lambda s: s.facts.workload.uid))
        )
    for name in ("exe", "cgroup"):
        patterns = words(getattr(when, name))
        if patterns:
            found.append(
                Selector(
                    f"workload.{name}",
                    _fact(patterns, f"workload.{name}", _workload_fact(name)),
                )
            )
    if when.ci is not None:
        for name in ("provider", "repository", "job", "step"):
            patterns = words(getattr(when.ci, name))
            if patterns:
                found.append(
                    Selector(
                        f"workload.ci.{name}",
                        lambda s, n=name, p=patterns: (
                            s.facts.workload.ci is not None  # type: ignore[misc]
                            and any(fnmatch.fnmatchcase(getattr(s.facts.workload.ci, n), x) for x in p)
                        ),
                    )
                )
    if when.container is not None:
        for name in ("image", "name"):
            patterns = words(getattr(when.container, name))
            if patterns:
                found.append(Selector(f"workload.container.{name}", _container_fact(name, patterns)))
        if when.container.labels:
            wanted = tuple(when.container.labels.items())
            found.append(Selector("workload.container.labels", _container_labels(wanted)))
    return found


def _workload_fact(name: str) -> Callable[[Subject], str | None]:
    return lambda subject: getattr(subject.facts.workload, name) or None


def _container_fact(name: str, patterns: tuple[str, ...]) -> Callable[[Subject], Answer]:
    def test(subject: Subject) -> Answer:
        container = subject.facts.workload.container
        if container is None:
            return _in_no_container(subject)
        return _glob(patterns, getattr(container, name) or None, f"workload.container.{name}", subject)

    return test


def _container_labels(wanted: tuple[tuple[str, str], ...]) -> Callable[[Subject], Answer]:
    def test(subject: Subject) -> Answer:
        container = subject.facts.workload.container
        if container is None:
            return _in_no_container(subject)
        if not container.name and not container.labels:  # no engine has described it
            subject.unknown("workload.container.labels")
            return None
        return all(item in container.labels for item in wanted)

    return test


def _in_no_container(subject: Subject) -> Answer:
    """False, or unknown: a process that had gone before its cgroup could be seen may have been in one."""
    origin = subject.facts.origin
    if origin is not None and origin.exited and not origin.cgroup:
        subject.unknown("workload.container")
        return None
    return False


def _cel(text: str) -> Callable[[Subject], Answer]:
    """Raises ValueError. What fails, or costs too much, is unknown."""
    expression = Expression(text)

    def test(subject: Subject) -> Answer:
        answer = expression.evaluate(cel_facts(subject))
        if answer is None:
            subject.unknown("cel")
        return answer

    return test


def cel_facts(subject: Subject) -> dict[str, Any]:
    """What an expression sees: `operation`, `target`, `principal`, `workload`."""
    operation, facts = subject.operation, subject.facts
    if isinstance(operation, SqlOperation):
        found: dict[str, Any] = {
            "protocol": "postgres",
            "text": operation.text,
            "database": operation.database or "",
            "user": operation.user or "",
        }
        if subject.sql is not None:
            found["statements"] = list(subject.sql.statements)
            found["reads"] = [str(table) for table in subject.sql.reads]
            found["writes"] = [str(table) for table in subject.sql.writes]
            found["functions"] = sorted(subject.sql.functions)
    elif isinstance(operation, HttpOperation):
        found = {
            "protocol": "http",
            "method": operation.method,
            "host": operation.host or "",
            "path": operation.path,
            "query": dict(operation.query),
            "headers": dict(operation.headers),
        }
    else:
        found = {"protocol": operation.protocol}
    principal = facts.principal
    return {
        "operation": found,
        "target": {
            "host": facts.target.host,
            "port": facts.target.address.port,
            "address": facts.target.address.host,
            "name": facts.target.name or "",
        },
        "principal": {"issuer": principal.issuer, "subject": principal.subject}
        if principal
        else {"issuer": "", "subject": ""},
        "workload": {
            "uid": facts.workload.uid if facts.workload.uid is not None else -1,
            "exe": facts.workload.exe,
            "cgroup": facts.workload.cgroup,
        },
    }


def compile_when(when: When) -> tuple[Selector, ...]:
    """In the order in which they are cheap. Raises ValueError for what cannot be compiled."""
    found: list[Selector] = []
    if when.protocol is not None:
        found.append(Selector("protocol", _protocol(words(when.protocol))))
    if when.port is not None:
        found.append(
            Selector("port", _number(words(when.port), "port", lambda s: s.facts.target.address.port or None))
        )
    if when.database is not None:
        found.append(
            Selector(
                "database",
                _fact(words(when.database), "database", lambda s: getattr(s.operation, "database", None)),
            )
        )
    if when.user is not None:
        found.append(
            Selector("user", _fact(words(when.user), "user", lambda s: getattr(s.operation, "user", None)))
        )
    if when.method is not None:
        methods = frozenset(word.upper() for word in words(when.method))
        found.append(_http("method", lambda op, s: _alike(method in methods for method in _methods(op))))
    if when.path is not None:
        patterns = [path_regex(pattern) for pattern in words(when.path)]
        found.append(_http("path", _path(patterns)))
    if when.query is not None:
        found.append(_http("query", _pairs(when.query, lambda op: op.query)))
    if when.headers is not None:
        found.append(_http("headers", _pairs(when.headers, lambda op: op.headers)))
    if when.statement is not None:
        kinds = {word.upper() for word in words(when.statement)}
        found.append(
            _sql_fact("statement", lambda a, every: _among((kind in kinds for kind in a.statements), every))
        )
    if when.without_where is not None:
        wanted = when.without_where
        found.append(_sql_fact("without_where", lambda a, every: a.without_where == wanted))
    for name, read, written in (("table", True, True), ("reads", True, False), ("writes", False, True)):
        patterns_ = words(getattr(when, name))
        if patterns_:
            found.append(_sql_fact(name, _tables(patterns_, read=read, written=written)))
    if when.function is not None:
        names = words(when.function)
        found.append(
            _sql_fact(
                "function",
                lambda a, every: _among(
                    (any(function_matches(n, f) for n in names) for f in _calls(a, every)), every
                ),
            )
        )
    if when.text is not None:
        pattern = re2.compile(when.text, _RE2_OPTIONS)
        found.append(
            Selector(
                "text",
                lambda s: (
                    pattern.search(s.operation.text) is not None
                    if isinstance(s.operation, SqlOperation)
                    else False
                ),
            )
        )
    if when.host is not None:
        found.append(Selector("host", _host(words(when.host))))
    if when.principal is not None:
        found.append(Selector("principal", _principal(when.principal)))
    if when.workload is not None:
        found += _workload(when.workload)
    if when.request_json is not None:
        found.append(_http("request_json", _json_equals(when.request_json)))
    if when.cel is not None:
        found.append(Selector("cel", _cel(when.cel)))
    return tuple(found)


def on_connect(when: When) -> bool:
    """False: a rule with statement or HTTP selectors does not hold on `connect`."""
    return all(getattr(when, name) is None for name in (*SQL_ONLY, *HTTP_ONLY, "database", "user"))


__all__ = [
    "Answer",
    "ConnectOperation",
    "Selector",
    "Subject",
    "all_of",
    "compile_when",
    "on_connect",
    "table_matches",
    "words",
]
