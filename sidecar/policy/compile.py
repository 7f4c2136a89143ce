"""From the typed document to a Policy; every problem with its line."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable
from typing import Any

import re2

from sidecar.documents import Lines, load_document, nearest, parse_duration, read_document
from sidecar.errors import ConfigurationError
from sidecar.model.verdict import Action, ApproveTerms
from sidecar.policy import masks, never
from sidecar.policy.detectors import DETECTORS, detector
from sidecar.policy.document import PolicyDocument, Rule, When
from sidecar.policy.engine import CompiledException, CompiledRule, Policy
from sidecar.policy.masks import EMPTY, Plan
from sidecar.policy.selectors import HTTP_ONLY, SQL_ONLY, compile_when, on_connect, words
from sidecar.policy.sql import STATEMENT_KINDS

_OF_A_CONFIGURATION = ("steering", "identity", "targets", "audit", "upstream")
_PROTOCOLS = ("postgres", "http", "opaque", "unknown")


class _Compiler:
    def __init__(self, text: str, file: str, hash_key: bytes | None, upstream: bool) -> None:
        self.file = file
        self.lines = read_document(text, file)[1]
        self.hash_key = hash_key
        self.upstream = upstream

    def fail(self, message: str, *path: str | int, hint: str | None = None) -> ConfigurationError:
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        return ConfigurationError(
            message, file=self.file, line=self.lines.get(known, 1), path=".".join(map(str, path)), hint=hint
        )

    def selectors(self, when: When, *path: str | int) -> Any:
        for kind in words(when.statement):
            if kind.upper() not in STATEMENT_KINDS:
                near = nearest(kind.upper(), sorted(STATEMENT_KINDS))
                raise self.fail(
                    f"`{kind}` is no kind of statement",
                    *path,
                    "statement",
                    hint=f"did you mean `{near}`?" if near else None,
                )
        for protocol in words(when.protocol):
            if protocol not in _PROTOCOLS:
                near = nearest(protocol, list(_PROTOCOLS))
                raise self.fail(
                    f"`{protocol}` is no protocol",
                    *path,
                    "protocol",
                    hint=f"did you mean `{near}`?" if near else None,
                )
        sql_names = [name for name in SQL_ONLY if getattr(when, name) is not None]
        http_names = [name for name in HTTP_ONLY if getattr(when, name) is not None]
        protocols = words(when.protocol)
        if sql_names and (http_names or (protocols and "postgres" not in protocols)):
            raise self.fail(
                f"this can never hold: `{sql_names[0]}` is only known for PostgreSQL", *path, sql_names[0]
            )
        if http_names and protocols and "http" not in protocols:
            raise self.fail(
                f"this can never hold: `{http_names[0]}` is only known for HTTP", *path, http_names[0]
            )
        try:
            problem = never.in_when(when)
            if problem:
                raise self.fail(problem.message, *path, *problem.path, hint=problem.hint)
            return compile_when(when)
        except re2.error as error:
            said = error.args[0].decode(errors="replace") if error.args else ""
            raise self.fail(
                f"`text` is no RE2 expression: {said}",
                *path,
                "text",
                hint="look-around and \\1 are not in RE2",
            ) from error
        except ValueError as error:
            raise self.fail(
                f"this condition cannot be compiled: {error}",
                *path,
                "cel",
                hint="CEL: operation.protocol == 'postgres' && target.port == 5432; docs/policy.md lists the names",
            ) from error

    def until(self, text: str | None, *path: str | int) -> datetime.datetime | None:
        if text is None:
            return None
        try:
            found = datetime.datetime.fromisoformat(text)
        except ValueError as error:
            raise self.fail(
                f"{text!r} is no date; write 2026-12-31 or 2026-12-31T12:00:00+00:00", *path
            ) from error
        return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)

    def rule(self, rule: Rule, index: int, default_mode: str) -> CompiledRule:
        here: tuple[str | int, ...] = ("rules", index)
        actions = [
            action
            for action, present in (
                (Action.DENY, rule.deny is not None),
                (Action.HOLD, rule.approve is not None),
                (Action.ALLOW, bool(rule.allow)),
            )
            if present
        ]
        if len(actions) > 1:
            raise self.fail(f"rule `{rule.name}` has more than one of deny, approve, allow", *here)
        if not actions and rule.mask is None:
            raise self.fail(
                f"rule `{rule.name}` does nothing", *here, hint="give it deny, approve, allow or mask"
            )
        action = actions[0] if actions else None
        if rule.until is not None and (action in (Action.DENY, Action.HOLD) or rule.mask is not None):
            raise self.fail(
                f"rule `{rule.name}`: `until` on a deny, approve or mask rule would fail open", *here, "until",
                hint="use `except` with `until` to exempt something for a while",
            )  # fmt: skip
        terms = None
        if rule.approve is not None:
            try:
                terms = ApproveTerms(rule.approve.by, parse_duration(rule.approve.within))
            except ValueError as error:
                raise self.fail(str(error), *here, "approve", "within") from error
        reason = (
            rule.deny if rule.deny is not None else str(rule.allow) if isinstance(rule.allow, str) else ""
        )
        if action is Action.HOLD:
            reason = "needs approval"
        exceptions = tuple(
            CompiledException(
                item.name,
                self.selectors(item.when, *here, "except", number, "when"),
                self.until(item.until, *here, "except", number, "until"),
            )
            for number, item in enumerate(rule.exceptions)
        )
        return CompiledRule(
            name=rule.name,
            selectors=self.selectors(rule.when, *here, "when"),
            on_connect=on_connect(rule.when) and action is not Action.HOLD,
            action=action,
            reason=reason,
            observe=(rule.mode or default_mode) == "observe",
            plan=self.plan(rule, here),
            terms=terms,
            exceptions=exceptions,
            until=self.until(rule.until, *here, "until"),
            severity=rule.severity,
            owner=rule.owner,
            tags=rule.tags,
            looks_at_text=any(
                when.text is not None or when.cel is not None
                for when in (rule.when, *(item.when for item in rule.exceptions))
            ),
        )

    def plan(self, rule: Rule, here: tuple[str | int, ...]) -> Plan:
        mask = rule.mask
        if mask is None:
            return EMPTY
        problem = never.in_mask(mask, rule.when)
        if problem:
            raise self.fail(problem.message, *here, *problem.path, hint=problem.hint)

        def make(spec: Any, part: str, key: str) -> Any:
            try:
                if spec == "hash" and self.hash_key is None and not self.upstream:
                    return masks.strategy(rule.name, spec, _LOCAL_KEY)
                return masks.strategy(rule.name, spec, self.hash_key)
            except ValueError as error:
                raise self.fail(str(error), *here, "mask", part, key) from error

        try:
            columns = tuple(
                masks.column_pattern(key, make(spec, "columns", key)) for key, spec in mask.columns.items()
            )
            json = tuple(masks.json_pattern(key, make(spec, "json", key)) for key, spec in mask.json.items())
        except ValueError as error:
            raise self.fail(str(error), *here, "mask") from error
        detectors = []
        for key, spec in mask.detect.items():
            if key not in DETECTORS:
                near = nearest(key, list(DETECTORS))
                raise self.fail(
                    f"`{key}` is no detector", *here, "mask", "detect", key,
                    hint=f"did you mean `{near}`?" if near else "valid: " + ", ".join(DETECTORS),
                )  # fmt: skip
            detectors.append(detector(key, make(spec, "detect", key).apply_str))
        headers = tuple((key.lower(), make(spec, "headers", key)) for key, spec in mask.headers.items())
        return Plan(
            columns=columns,
            json=json,
            headers=headers,
            detectors=tuple(detectors),
            rules=(rule.name,),
            _names=frozenset(item.column.lower() for item in columns),
        )


_LOCAL_KEY = hashlib.sha256(b"sidecar: hash masks without a key and without an upstream").digest()
"""Without an upstream and without a key, hashes only have to be stable on this host's records."""


def load_policy(
    text: str,
    file: str,
    *,
    hash_key: bytes | None = None,
    upstream: bool = False,
    now_ns: Callable[[], int] | None = None,
) -> Policy:
    """Parse, check and compile. `now_ns` is the clock for `until`; without one a
    flow's opening time counts. Raises ConfigurationError with file, line and the nearest valid name."""
    try:
        return _load(text, file, hash_key, upstream, now_ns)
    except ConfigurationError as error:
        error.hint = error.hint or "docs/policy.md has every selector, action and mask, with examples"
        raise


def _load(
    text: str, file: str, hash_key: bytes | None, upstream: bool, now_ns: Callable[[], int] | None
) -> Policy:
    data, lines = read_document(text, file)
    strange = next((name for name in _OF_A_CONFIGURATION if isinstance(data, dict) and name in data), None)
    if strange is not None:
        raise ConfigurationError(
            "this is a configuration, not a policy",
            file=file,
            line=lines[(strange,)],
            hint="`sidecar doctor -c FILE` checks a configuration",
        )
    document = load_document(text, file, PolicyDocument)
    compiler = _Compiler(text, file, hash_key, upstream)
    names: set[str] = set()
    for index, rule in enumerate(document.rules):
        if rule.name in names:
            raise compiler.fail(f"two rules are named `{rule.name}`", "rules", index, "name")
        names.add(rule.name)
    for index, case in enumerate(document.tests):
        if case.expect.rule is not None and case.expect.rule not in names:
            near = nearest(case.expect.rule, sorted(names))
            raise compiler.fail(
                f"there is no rule `{case.expect.rule}`",
                "tests",
                index,
                "expect",
                "rule",
                hint=f"did you mean `{near}`?" if near else None,
            )
    rules = tuple(compiler.rule(rule, index, document.mode) for index, rule in enumerate(document.rules))
    whens = [
        when for rule in document.rules for when in (rule.when, *(item.when for item in rule.exceptions))
    ]
    hosts = [host.lower().rstrip(".") for when in whens for host in words(when.host)]
    return Policy(
        revision=hashlib.sha256(text.encode() + b"\0" + (hash_key or b"")).hexdigest()[:16],
        document=document,
        rules=rules,
        warnings=_warnings(document, compiler.lines),
        host_names=frozenset(
            host for host in hosts if "*" not in host and "/" not in host and not _is_address(host)
        ),
        named_hosts=tuple(
            dict.fromkeys(
                host.lower().rstrip(".")
                for when in whens
                if "http" in (words(when.protocol) or ("http",))
                for host in words(when.host)
                if host.strip("*.") and "/" not in host
            )
        ),
        wants_request_json=any(when.request_json is not None for when in whens),
        by_principal=any(when.principal is not None or when.cel is not None for when in whens),
        now_ns=now_ns,
        by_workload=any(when.workload is not None or when.cel is not None for when in whens),
    )


def _is_address(host: str) -> bool:
    return host.replace(".", "").isdigit() or ":" in host


def _warnings(document: PolicyDocument, lines: Lines) -> tuple[str, ...]:
    found = []
    for later, earlier in never.shadowed(document):
        names = document.rules[later].name, document.rules[earlier].name
        found.append(
            f"rule `{names[0]}` (line {lines[('rules', later)]}) never decides: `{names[1]}` (line {lines[('rules', earlier)]}) "
            "stands before it and matches all that it does"
        )
    for rule in document.rules:
        wild = [host for host in words(rule.when.host) if "*" in host]
        http_only = "http" in words(rule.when.protocol) or any(
            getattr(rule.when, name) is not None for name in ("method", "path", "query", "headers")
        )
        if wild and not http_only:
            found.append(
                f"rule `{rule.name}`: the wildcard host {wild[0]} has no source for PostgreSQL in plain text: for a destination "
                "without a known name the rule counts as matching (deny, approve, mask) or not (allow); declare the targets"
            )
    return tuple(found)


def builtin_policy() -> Policy:
    """Without a file: allow everything, record everything."""
    return Policy(revision="builtin", document=PolicyDocument(version=1), rules=())
