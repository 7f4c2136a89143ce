"""The redirect and the listener's protection in nftables: the only module that imports pyroute2.

A pure builder (`table_plan`) says what the table holds; `apply` writes it in one batch and reads the kernel's state back,
because the batch's acknowledgements are not read (pyroute2 0.9.7): order, operands and hooks must be what was asked for.
`differences` compares again at every heartbeat, and when `nft_watch` hears of a change, where the namespace's generation number says
that anybody's table changed (one message of 20 bytes; nothing is dumped on a quiet host, however large its own tables are).

    table inet sidecar_<instance> {
        chain steer   { type nat hook output priority -110;
                        meta l4proto tcp meta mark M redirect to :P }
        chain protect { type filter hook input priority -110;
                        tcp dport P ct status dnat accept
                        tcp dport P reject with tcp reset }
    }

With container networks (`bridges`), for what comes from them, minus what is excluded, and each covered port:

        chain arrive  { type nat hook prerouting priority -110;
                        iifname B tcp dport D redirect to :P }
        chain pass    { type filter hook forward priority -110;
                        ct state established,related accept
                        iifname B tcp dport D reject with tcp reset }
"""

from __future__ import annotations

import ipaddress
import socket
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
META_IIFNAME: Final = 6
META_NFPROTO: Final = 15
META_L4PROTO: Final = 16
NETWORK_HEADER: Final = 1
TRANSPORT_HEADER: Final = 2
CT_STATE: Final = 0
CT_STATUS: Final = 2
CT_ESTABLISHED_OR_RELATED: Final = (1 << 1) | (1 << 2)
NFPROTO_IPV4: Final = 2
NFPROTO_IPV6: Final = 10
IFNAMSIZ: Final = 16
REJECT_TCP_RST: Final = 1
NF_ACCEPT: Final = 1
HOOK_NUMBERS: Final = {"prerouting": 0, "input": 1, "forward": 2, "output": 3}

NETLINK_NETFILTER: Final = 12
NFT_MSG_NEWGEN: Final = (10 << 8) | 15  # NFNL_SUBSYS_NFTABLES
NFT_MSG_GETGEN: Final = (10 << 8) | 16
NFTA_GEN_ID: Final = 1
_REPLY_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class ChainPlan:
    name: str
    hook: str
    kind: str
    priority: int
    rules: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class ContainerRules:
    """What of forwarded traffic is steered: TCP to `ports` that comes in by `bridges` (names of interfaces), but not to `exclude`."""

    bridges: frozenset[str]
    ports: tuple[int, ...]
    exclude: tuple[str, ...]


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


def _any_bit(mask: bytes) -> tuple[Any, ...]:
    """Register 1 has one of these bits."""
    return (_masked(mask), _equals(bytes(len(mask)), op=1))


def _masked(mask: bytes) -> Any:
    return genex(
        "bitwise",
        {
            "sreg": 1,
            "dreg": 1,
            "len": len(mask),
            "mask": {"attrs": [("NFTA_DATA_VALUE", mask)]},
            "xor": {"attrs": [("NFTA_DATA_VALUE", bytes(len(mask)))]},
        },
    )


def _to_port(port: int) -> tuple[Any, ...]:
    return (
        _load_meta(META_L4PROTO),
        _equals(bytes([TCP])),
        genex("payload", {"dreg": 1, "base": TRANSPORT_HEADER, "offset": 2, "len": 2}),
        _equals(struct.pack("!H", port)),
    )


def _redirect(port: int) -> tuple[Any, ...]:
    port_be16 = struct.pack("!H", port)
    return (
        genex("immediate", {"dreg": 1, "data": {"attrs": [("NFTA_DATA_VALUE", port_be16)]}}),
        genex("redir", {"reg_proto_min": 1}),
    )


def table_plan(mark: int, port: int, containers: ContainerRules | None = None) -> tuple[ChainPlan, ...]:
    """What our table holds, as expressions."""
    redirect = (
        _load_meta(META_L4PROTO),
        _equals(bytes([TCP])),
        _load_meta(META_MARK),
        _equals(struct.pack("=I", mark)),
        *_redirect(port),
    )
    accept = (
        *_to_port(port),
        genex("ct", {"key": CT_STATUS, "dreg": 1}),
        *_any_bit(struct.pack("=I", IPS_DST_NAT)),
        _verdict(NF_ACCEPT),
    )
    reset = genex("reject", {"type": REJECT_TCP_RST, "icmp_code": 0})
    plan = (
        ChainPlan("steer", "output", "nat", PRIORITY, (redirect,)),
        ChainPlan("protect", "input", "filter", PRIORITY, (accept, (*_to_port(port), reset))),
    )
    if containers is None or not containers.bridges:
        return plan
    left_alone = tuple((*_within(network), _verdict(NF_ACCEPT)) for network in containers.exclude)
    covered = [
        (_load_meta(META_IIFNAME), _equals(bridge.encode().ljust(IFNAMSIZ, b"\0")), *_to_port(number))
        for bridge in sorted(containers.bridges)
        for number in containers.ports
    ]
    known = (
        genex("ct", {"key": CT_STATE, "dreg": 1}),
        *_any_bit(struct.pack("=I", CT_ESTABLISHED_OR_RELATED)),
        _verdict(NF_ACCEPT),
    )
    arrive = (*left_alone, *((*match, *_redirect(port)) for match in covered))
    onward = (known, *left_alone, *((*match, reset) for match in covered))
    return (
        *plan,
        ChainPlan("arrive", "prerouting", "nat", PRIORITY, arrive),
        ChainPlan("pass", "forward", "filter", PRIORITY, onward),
    )


def _within(network: str) -> tuple[Any, ...]:
    """The destination is in this network."""
    found = ipaddress.ip_network(network, strict=False)
    family, offset = (NFPROTO_IPV4, 16) if found.version == 4 else (NFPROTO_IPV6, 24)
    return (
        _load_meta(META_NFPROTO),
        _equals(bytes([family])),
        genex(
            "payload", {"dreg": 1, "base": NETWORK_HEADER, "offset": offset, "len": len(found.netmask.packed)}
        ),
        _masked(found.netmask.packed),
        _equals(found.network_address.packed),
    )


def _value_of(node: Any) -> Any:
    """A comparable form of netlink data: nested attributes as sorted tuples."""
    if isinstance(node, dict) and "attrs" in node:
        return tuple(sorted((name, _value_of(value)) for name, value in node["attrs"]))
    if hasattr(node, "value") and not isinstance(node, bytes | str | int):
        return str(node.value)
    return node if isinstance(node, int) else str(node)


def _read_rule(message: Any) -> tuple[Any, ...]:
    return tuple(_value_of(expression) for expression in message.get_attr("NFTA_RULE_EXPRESSIONS") or ())


def _operands(node: Any) -> tuple[str, ...]:
    """The bytes that an expression compares with or loads, wherever they are nested."""
    if not isinstance(node, tuple):
        return ()
    if len(node) == 2 and node[0] == "NFTA_DATA_VALUE":
        return (str(node[1]),)
    return tuple(operand for part in node for operand in _operands(part))


def essence(rule: Iterable[Any]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """What of a rule reads the same in the plan and in the kernel's answer: each expression's name and operands."""
    return tuple((dict(expression)["NFTA_EXPR_NAME"], _operands(expression)) for expression in rule)


def generation() -> int:
    """The current namespace's number of nftables transactions (linux/netfilter/nf_tables.h, NFT_MSG_GETGEN).

    Raises OSError where netlink does not answer.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as sock:
        sock.settimeout(_REPLY_TIMEOUT_S)
        sock.bind((0, 0))
        sock.send(struct.pack("=IHHII", 20, NFT_MSG_GETGEN, 1, 1, 0) + bytes(4))  # NLM_F_REQUEST, nfgenmsg
        reply = sock.recv(4096)
    if struct.unpack_from("=H", reply, 4)[0] != NFT_MSG_NEWGEN:
        raise OSError("nf_tables does not tell its generation")
    offset = 20
    while offset + 4 <= len(reply):
        size, kind = struct.unpack_from("=HH", reply, offset)
        if kind == NFTA_GEN_ID:
            return int(struct.unpack_from("!I", reply, offset + 4)[0])
        offset += max(4, (size + 3) & ~3)
    raise OSError("nf_tables does not tell its generation")


class Table:
    """Our table in the current network namespace. Not thread-safe."""

    def __init__(self, instance: str, mark: int, port: int, containers: ContainerRules | None = None) -> None:
        self.name = table_name(instance)
        self._mark = mark
        self._port = port
        self._plan = table_plan(mark, port, containers)
        self._seen: dict[str, tuple[Any, ...]] = {}
        self._generation = -1

    def cover(self, containers: ContainerRules) -> None:
        """From the next `apply` on, steer these networks."""
        self._plan = table_plan(self._mark, self._port, containers)

    def apply(self) -> None:
        """Write the table anew, in one transaction, and read it back. Raises SteeringError where the kernel holds
        something else."""
        with NFTables(nfgen_family=INET) as nft:
            try:
                nft.begin()
                nft.table("add", name=self.name)  # so that there is one to delete
                nft.table("del", name=self.name)
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
        self._generation = -1
        state = self._read()
        for chain in self._plan:
            standing = state.get(chain.name, (None,))
            hook = (chain.kind, HOOK_NUMBERS[chain.hook], chain.priority, NF_ACCEPT)
            want = [hook, *(essence(_value_of(e) for e in rule) for rule in chain.rules)]
            have = [standing[0], *(essence(rule) for rule in standing[1:])]
            if have != want:
                raise SteeringError(
                    f"nftables holds something else than was written in {self.name}/{chain.name}: {have} for {want}",
                    hint="is nf_tables with NAT built into this kernel? sidecar doctor",
                )
        self._seen = state

    def differences(self) -> list[str]:
        """What has changed since `apply`; empty where all stands as written."""
        try:
            now = generation()
            if now == self._generation:
                return []
            state = self._read()
        except (NetlinkError, OSError) as error:
            return [f"the table cannot be read: {error}"]
        if state == self._seen:
            self._generation = now
            return []
        if not state:
            return ["the table is gone or dormant"]
        return [
            f"chain {name} {'is gone' if name not in state else 'was changed'}"
            for name in sorted(self._seen.keys() | state.keys())
            if state.get(name) != self._seen.get(name)
        ]

    def _read(self) -> dict[str, tuple[Any, ...]]:
        """Chain name → (hook facts, rule, rule, …). A dormant table reads as none: it does nothing."""
        with NFTables(nfgen_family=INET) as nft:
            state: dict[str, tuple[Any, ...]] = {}
            if not any(_is_awake(message, self.name) for message in nft.get_tables()):
                return state
            for chain in nft.get_chains():
                if chain.get_attr("NFTA_CHAIN_TABLE") == self.name:
                    hook = chain.get_attr("NFTA_CHAIN_HOOK")
                    facts = (
                        chain.get_attr("NFTA_CHAIN_TYPE"),
                        hook.get_attr("NFTA_HOOK_HOOKNUM") if hook is not None else None,
                        hook.get_attr("NFTA_HOOK_PRIORITY") if hook is not None else None,
                        chain.get_attr("NFTA_CHAIN_POLICY"),
                    )
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


def _is_awake(message: Any, name: str) -> bool:
    return message.get_attr("NFTA_TABLE_NAME") == name and not _flags(message.get_attr("NFTA_TABLE_FLAGS"))


def _flags(value: Any) -> int:
    return int(getattr(value, "value", value) or 0)


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
