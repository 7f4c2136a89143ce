"""The policy document (design, section 2) as typed structs. docs/policy.md explains every name."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Struct(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    pass


Words = str | tuple[str, ...]
"""One word or a list: any of them."""


class PrincipalWhen(Struct, frozen=True):
    issuer: Words | None = None
    subject: Words | None = None
    claims: dict[str, Any] | None = None


class ContainerWhen(Struct, frozen=True):
    image: Words | None = None
    name: Words | None = None
    labels: dict[str, str] | None = None


class CiWhen(Struct, frozen=True):
    provider: Words | None = None
    repository: Words | None = None
    job: Words | None = None
    step: Words | None = None


class WorkloadWhen(Struct, frozen=True):
    uid: int | tuple[int, ...] | None = None
    exe: Words | None = None
    cgroup: Words | None = None
    container: ContainerWhen | None = None
    ci: CiWhen | None = None


class When(Struct, frozen=True):
    """All that is given must hold."""

    protocol: Words | None = None
    host: Words | None = None
    port: int | tuple[int, ...] | None = None
    database: Words | None = None
    user: Words | None = None
    principal: PrincipalWhen | None = None
    workload: WorkloadWhen | None = None
    statement: Words | None = None
    table: Words | None = None
    reads: Words | None = None
    writes: Words | None = None
    function: Words | None = None
    without_where: bool | None = None
    text: str | None = None
    method: Words | None = None
    path: Words | None = None
    query: dict[str, str] | None = None
    headers: dict[str, str] | None = None
    request_json: dict[str, Any] | None = None
    cel: str | None = None


class Approve(Struct, frozen=True):
    by: tuple[str, ...] = ()
    within: str | int = "15m"


class Mask(Struct, frozen=True):
    columns: dict[str, Any] = {}
    json: dict[str, Any] = {}
    headers: dict[str, Any] = {}
    detect: dict[str, Any] = {}


class Exception_(Struct, frozen=True):
    """`except:`: exempts from this one rule, and from no other."""

    name: str
    when: When
    until: str | None = None


class Rule(Struct, frozen=True):
    name: str
    when: When = When()
    deny: str | None = None
    allow: str | bool | None = None
    approve: Approve | None = None
    mask: Mask | None = None
    mode: Literal["enforce", "observe"] | None = None
    exceptions: tuple[Exception_, ...] = msgspec.field(default=(), name="except")
    until: str | None = None
    severity: str | None = None
    owner: str | None = None
    tags: tuple[str, ...] = ()


class Given(Struct, frozen=True):
    protocol: Literal["postgres", "http", "opaque"]
    host: str | None = None
    port: int | None = None
    database: str | None = None
    user: str | None = None
    statement: str | None = None
    method: str | None = None
    path: str | None = None
    query: dict[str, str] | None = None
    headers: dict[str, str] | None = None
    request_json: Any = None
    principal: dict[str, Any] | None = None
    workload: dict[str, Any] | None = None


class Expect(Struct, frozen=True):
    action: Literal["allow", "deny", "mask", "hold", "invalid"]
    rule: str | None = None


class Case(Struct, frozen=True):
    name: str
    given: Given
    expect: Expect


class PolicyDocument(Struct, frozen=True):
    version: Literal[1]
    default: Literal["allow", "deny"] = "allow"
    on_unparsed: Literal["allow", "deny"] = "deny"
    on_derived: Literal["mask", "deny"] = "mask"
    """A value of the result that is made from a masked column."""
    on_opaque: Literal["mask", "deny", "allow"] = "mask"
    """What comes out of code that is not in the statement, while column masks are in force."""
    predicates: Literal["allow", "deny"] = "allow"
    """Conditions that look at a masked column."""
    mode: Literal["enforce", "observe"] = "enforce"
    rules: tuple[Rule, ...] = ()
    tests: tuple[Case, ...] = ()
