"""The redirect and the listener's protection in nftables: the only module that imports pyroute2.

A pure builder (`table_plan`) says what the table holds; `apply` writes it in one batch and reads the kernel's state back,
because the batch's acknowledgements are not read (pyroute2 0.9.7); `differences` compares again at every heartbeat.

    table inet sidecar_<instance> {
        chain steer   { type nat hook output priority -110;
                        meta l4proto tcp meta mark M redirect to :P }
        chain protect { type filter hook input priority -110;
                        tcp dport P ct status dnat accept
                        tcp dport P reject with tcp reset }
    }
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.nftables.expressions import genex
from pyroute2.nftables.main import NFTables

from sidecar.errors import SteeringError

INET: Final = 1
"""NFPROTO_INET."""
PRIORITY: Final = -110
"""Before the usual destination NAT (-100), so that a foreign DNAT at its own priority does not come first."""
PREFIX: Final = "sidecar_"
IPS_DST_NAT: Final = 1 << 5
TCP: Final = 6

# linux/netfilter/nf_tables.h; pyroute2 wants the numbers
META_MARK: Final = 3
META_L4PROTO: Final = 16
TRANSPORT_HEADER: Final = 2
CT_STATUS: Final = 2
REJECT_TCP_RST: Final = 1


@dataclass(frozen=True, slots=True)
class ChainPlan:
    name: str
    hook: str
    kind: str
    priority: int
    rules: tuple[tuple[Any, ...], ...]


def table_name(instance: str) -> str:
    return PREFIX + instance


def _load_meta(key: int) -> Any:
    return genex("meta", {"key": key, "dreg": 1})


def _equals(value: bytes, *, op: int = 0) -> Any:
    return genex("cmp", {"sreg": 1, "op": op, "data": {"attrs": [("NFTA_DATA_VALUE", value)]}})


def _verdict(code: int) -> Any:
    return genex(
        "immediate",
        {"dreg": 0, "data": {"attrs": [("NFTA_DATA_VERDICT", {"attrs": [("NFTA_VERDICT_CODE", code)]})]}},
    )


def table_plan(mark: int, port: int) -> tuple[ChainPlan, ...]:
    """What our table holds, as expressions."""
    port_be16 = struct.pack("!H", port)
    is_tcp = (_load_meta(META_L4PROTO), _equals(bytes([TCP])))
    to_listener = (
        *is_tcp,
        genex("payload", {"dreg": 1, "base": TRANSPORT_HEADER, "offset": 2, "len": 2}),
        _equals(port_be16),
    )
    redirect = (
        *is_tcp,
        _load_meta(META_MARK),
        _equals(struct.pack("=I", mark)),
        genex("immediate", {"dreg": 1, "data": {"attrs": [("NFTA_DATA_VALUE", port_be16)]}}),
        genex("redir", {"reg_proto_min": 1}),
    )
    accept = (
        *to_listener,
        genex("ct", {"key": CT_STATUS, "dreg": 1}),
        genex(
            "bitwise",
            {
                "sreg": 1,
                "dreg": 1,
                "len": 4,
                "mask": {"attrs": [("NFTA_DATA_VALUE", struct.pack("=I", IPS_DST_NAT))]},
                "xor": {"attrs": [("NFTA_DATA_VALUE", b"\0\0\0\0")]},
            },
        ),
        _equals(b"\0\0\0\0", op=1),
        _verdict(1),  # NF_ACCEPT
    )
    reject = (*to_listener, genex("reject", {"type": REJECT_TCP_RST, "icmp_code": 0}))
    return (
        ChainPlan("steer", "output", "nat", PRIORITY, (redirect,)),
        ChainPlan("protect", "input", "filter", PRIORITY, (accept, reject)),
    )


def _value_of(node: Any) -> Any:
    """A comparable form of netlink data: nested attributes as sorted tuples."""
    if isinstance(node, dict) and "attrs" in node:
        return tuple(sorted((name, _value_of(value)) for name, value in node["attrs"]))
    if hasattr(node, "value") and not isinstance(node, bytes | str | int):
        return str(node.value)
    return node if isinstance(node, int) else str(node)


def expression_names(expressions: Iterable[Any]) -> tuple[str, ...]:
    return tuple(dict(expression["attrs"])["NFTA_EXPR_NAME"] for expression in expressions)


def _read_rule(message: Any) -> tuple[Any, ...]:
    return tuple(_value_of(expression) for expression in message.get_attr("NFTA_RULE_EXPRESSIONS") or ())


class Table:
    """Our table in the current network namespace. Not thread-safe."""

    def __init__(self, instance: str, mark: int, port: int) -> None:
        self.name = table_name(instance)
        self._plan = table_plan(mark, port)
        self._seen: dict[str, tuple[Any, ...]] = {}

    def apply(self) -> None:
        """Write the table anew and read it back. Raises SteeringError where the kernel holds something else."""
        with NFTables(nfgen_family=INET) as nft:
            if self.name in _tables(nft):
                nft.table("del", name=self.name)
            try:
                nft.begin()
                nft.table("add", name=self.name)
                for chain in self._plan:
                    nft.chain(
                        "add",
                        table=self.name,
                        name=chain.name,
                        hook=chain.hook,
                        type=chain.kind,
                        priority=chain.priority,
                        policy=1,
                    )
                    for rule in chain.rules:
                        nft.rule("add", table=self.name, chain=chain.name, expressions=(rule,))
                nft.commit()
            except NetlinkError as error:
                raise SteeringError(
                    f"nftables refused the table {self.name}: {error}", hint="sidecar doctor"
                ) from error
        state = self._read()
        for chain in self._plan:
            rules = state.get(chain.name)
            want = [expression_names(rule) for rule in chain.rules]
            have = [tuple(dict(e)["NFTA_EXPR_NAME"] for e in rule) for rule in (rules or ())[1:]]
            if rules is None or have != want:
                raise SteeringError(
                    f"nftables holds something else than was written in {self.name}/{chain.name}: {have} for {want}",
                    hint="is nf_tables with NAT built into this kernel? sidecar doctor",
                )
        self._seen = state

    def differences(self) -> list[str]:
        """What has changed since `apply`; empty where all stands as written."""
        try:
            state = self._read()
        except NetlinkError as error:
            return [f"the table cannot be read: {error}"]
        if state == self._seen:
            return []
        if not state:
            return ["the table is gone"]
        return [
            f"chain {name} {'is gone' if name not in state else 'was changed'}"
            for name in sorted(self._seen.keys() | state.keys())
            if state.get(name) != self._seen.get(name)
        ]

    def _read(self) -> dict[str, tuple[Any, ...]]:
        """Chain name → (hook facts, rule, rule, …)."""
        with NFTables(nfgen_family=INET) as nft:
            state: dict[str, tuple[Any, ...]] = {}
            for chain in nft.get_chains():
                if chain.get_attr("NFTA_CHAIN_TABLE") == self.name:
                    facts = (str(chain.get_attr("NFTA_CHAIN_TYPE")), str(chain.get_attr("NFTA_CHAIN_HOOK")))
                    state[str(chain.get_attr("NFTA_CHAIN_NAME"))] = (facts,)
            for rule in nft.get_rules():
                if rule.get_attr("NFTA_RULE_TABLE") == self.name:
                    name = str(rule.get_attr("NFTA_RULE_CHAIN"))
                    state[name] = (*state.get(name, ()), _read_rule(rule))
            return state

    def delete(self) -> bool:
        return delete(self.name)


def _tables(nft: Any) -> list[str]:
    return [str(message.get_attr("NFTA_TABLE_NAME")) for message in nft.get_tables()]


def tables() -> list[str]:
    """Names of all instances' tables in the current network namespace."""
    with NFTables(nfgen_family=INET) as nft:
        return sorted(name for name in _tables(nft) if name.startswith(PREFIX))


def delete(name: str) -> bool:
    """False where there was no such table."""
    with NFTables(nfgen_family=INET) as nft:
        if name not in _tables(nft):
            return False
        nft.table("del", name=name)
        return name not in _tables(nft)
