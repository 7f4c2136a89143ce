"""What in a policy can never hold, or can never decide: found when it is read, and said with its line.

A rule that silently never fires is worse than none, because somebody relies on it. Pure; `compile` asks. Source: design, section 2.
"""

from __future__ import annotations

import fnmatch
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec

from sidecar.policy.cel import FIELDS, Expression
from sidecar.policy.document import Mask, PolicyDocument, Rule, When
from sidecar.policy.selectors import HTTP_ONLY, SQL_ONLY, words

MAX_PORT: Final = 65_535
_ABSOLUTE: Final = ("exe", "cgroup")
_EXACT: Final = ("path", "text", "cel")
"""Selectors with patterns of their own, which are not compared word by word."""


@dataclass(frozen=True, slots=True)
class Problem:
    """`path` is relative to `when`, or to the rule for masks."""

    path: tuple[str, ...]
    message: str
    hint: str


def in_when(when: When) -> Problem | None:
    """The first selector that can never hold, whatever is judged; None where there is none."""
    return (
        next(_empty(when, ()), None)
        or _host(when)
        or _port(when)
        or next(_paths(when), None)
        or next(_workload(when), None)
        or _names_of_cel(when)
    )


def _empty(struct: msgspec.Struct, path: tuple[str, ...]) -> Iterator[Problem]:
    """An empty list names nobody; taken for `any` it would allow everything."""
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if isinstance(value, msgspec.Struct):
            yield from _empty(value, (*path, name))
        elif value == () or value == {}:
            yield Problem(
                (*path, name), f"`{name}` is empty: it would match nothing", "name something, or leave it out"
            )


def _host(when: When) -> Problem | None:
    for host in words(when.host):
        try:
            ipaddress.ip_network(host, strict=False)
        except ValueError:
            if "/" in host or ":" in host:
                return Problem(
                    ("host",),
                    f"`{host}` is no host name, wildcard, address or CIDR",
                    "such as db.internal, *.internal or 10.0.0.0/8; the port is a selector of its own",
                )
    return None


def _port(when: When) -> Problem | None:
    for port in words(when.port):
        if not 1 <= port <= MAX_PORT:
            return Problem(("port",), f"{port} is no TCP port", f"1 to {MAX_PORT}")
    return None


def _paths(when: When) -> Iterator[Problem]:
    for path in words(when.path):
        if not path.startswith(("/", "*")):
            yield Problem(("path",), f"`{path}` can never match: paths begin with /", f'such as "/{path}"')


def _workload(when: When) -> Iterator[Problem]:
    for name in _ABSOLUTE if when.workload else ():
        for pattern in words(getattr(when.workload, name)):
            if not pattern.startswith(("/", "*", "?", "[")):
                yield Problem(
                    ("workload", name),
                    f"`{pattern}` can never match: it is a whole path",
                    f'such as "*/{pattern}"',
                )


def _names_of_cel(when: When) -> Problem | None:
    """A misspelt name makes an expression fail for ever, and what fails is unknown: a `deny` would fire on everything."""
    if when.cel is None:
        return None
    for root, field in Expression(when.cel).names:
        known = FIELDS.get(root)
        if known is None:
            return Problem(("cel",), f"`{root}` is not known in an expression", "valid: " + ", ".join(FIELDS))
        if field is not None and field not in known:
            return Problem(
                ("cel",), f"`{root}.{field}` is not known in an expression", "valid: " + ", ".join(known)
            )
    return None


def in_mask(mask: Mask, when: When) -> Problem | None:
    """A part of a mask that the rule's own selectors keep from ever applying."""
    protocols = words(when.protocol)
    sql = any(getattr(when, name) is not None for name in (*SQL_ONLY, "database", "user"))
    http = any(getattr(when, name) is not None for name in HTTP_ONLY)
    if mask.columns and (http or (protocols and "postgres" not in protocols)):
        return Problem(
            ("mask", "columns"),
            "this can never apply: columns are PostgreSQL's, and the rule is not",
            "make it a rule of its own, with protocol: postgres",
        )
    for name in ("json", "headers"):
        if getattr(mask, name) and (sql or (protocols and "http" not in protocols)):
            return Problem(
                ("mask", name),
                f"this can never apply: `{name}` is HTTP's, and the rule is not",
                "make it a rule of its own, with protocol: http",
            )
    return None


def shadowed(document: PolicyDocument) -> Iterator[tuple[int, int]]:
    """(rule, earlier rule) by their places: the earlier one decides whenever the rule matches, so that it never does."""
    for later, rule in enumerate(document.rules):
        if not _acts(rule) or _observes(rule, document):
            continue
        for earlier, other in enumerate(document.rules[:later]):
            if not _observes(other, document) and _decides_first(other, rule):
                yield later, earlier
                break


def _acts(rule: Rule) -> bool:
    return rule.deny is not None or rule.approve is not None or bool(rule.allow)


def _observes(rule: Rule, document: PolicyDocument) -> bool:
    return (rule.mode or document.mode) == "observe"


def _decides_first(earlier: Rule, later: Rule) -> bool:
    """`deny` and `approve` fire on true and unknown; an `allow` has to cover all of a statement, so only one without selectors counts."""
    if not _acts(earlier) or earlier.exceptions or earlier.until is not None:
        return False
    if earlier.allow and earlier.when != When():
        return False
    return all(
        _covers(name, getattr(earlier.when, name), getattr(later.when, name))
        for name in When.__struct_fields__
        if getattr(earlier.when, name) is not None
    )


def _covers(name: str, wide: object, narrow: object) -> bool:
    if narrow is None:
        return False
    if name in _EXACT or isinstance(wide, (dict, bool, msgspec.Struct)):
        return wide == narrow
    wider = [str(word).lower() for word in words(wide)]
    return all(
        word in wider or ("*" not in word and any(fnmatch.fnmatchcase(word, pattern) for pattern in wider))
        for word in (str(word).lower() for word in words(narrow))
    )
