"""The names that a leaf may carry, and what the authority is constrained to (RFC 5280 sections 4.2.1.6 and 4.2.1.10).

A name reaches us from a client's hello or from an address it dialled: nothing of it is believed before it is checked here.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from sidecar.errors import TrustError

MAX_NAMES: Final = 16
"""Of one leaf: a flow has its host name and its address, a gateway a handful."""
MAX_NAME_CHARS: Final = 253
"""RFC 1035 section 2.3.4, without the last dot."""

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Underscores stand in no host name of RFC 952, and in many of container networks.
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


def valid_name(text: str) -> str:
    """One DNS name (a-labels, in lower case, without the last dot) or IP address, in its one spelling.

    Raises TrustError: wildcards, letters beyond ASCII, and everything else that is no name.
    """
    address = as_address(text)
    if address is not None:
        if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
            raise TrustError("a scoped address cannot stand in a certificate")
        return str(address)
    name = text.lower().removesuffix(".")
    shown = ascii(text[:MAX_NAME_CHARS])
    if "*" in name:
        raise TrustError(f"{shown} is a wildcard: certificates are made for single names")
    if not name.isascii():
        raise TrustError(f"{shown} is no ASCII name", hint="international names in their xn-- form")
    labels = name.split(".")
    if not name or len(name) > MAX_NAME_CHARS or not all(_LABEL.fullmatch(label) for label in labels):
        raise TrustError(f"{shown} is no host name")
    if labels[-1].isdecimal() or re.fullmatch(r"0x[0-9a-f]*", labels[-1]):
        raise TrustError(
            f"{shown} is an address that is written in an uncommon way"
        )  # many resolvers take it for one
    return name


def valid_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """All of them, checked, each once, in the order given. Raises TrustError."""
    if not 1 <= len(names) <= MAX_NAMES:
        raise TrustError(f"a certificate is for 1 to {MAX_NAMES} names, not {len(names)}")
    return tuple(dict.fromkeys(valid_name(name) for name in names))


def as_address(text: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Permitted:
    """What the authority may vouch for. Both empty: everything. One empty: nothing of that kind."""

    domains: tuple[str, ...] = ()
    """Each with all names below it."""
    networks: tuple[IPNetwork, ...] = ()

    @classmethod
    def parse(cls, entries: tuple[str, ...]) -> Permitted:
        """Domains, addresses and CIDRs. Raises TrustError."""
        domains: list[str] = []
        networks: list[IPNetwork] = []
        for entry in entries:
            try:
                networks.append(ipaddress.ip_network(entry))
                continue
            except ValueError as error:
                if "/" in entry:
                    raise TrustError(f"{entry!r} is no CIDR: {error}") from error
            if entry.startswith("*."):
                raise TrustError(f"{entry!r} has no `*.`", hint=f"{entry[2:]} covers itself and all below")
            domains.append(valid_name(entry))
        return cls(tuple(dict.fromkeys(domains)), tuple(dict.fromkeys(networks)))

    @property
    def everything(self) -> bool:
        return not self.domains and not self.networks

    def covers(self, name: str) -> bool:
        """`name` as `valid_name` gives it."""
        if self.everything:
            return True
        address = as_address(name)
        if address is not None:
            return any(address in network for network in self.networks)
        return any(name == domain or name.endswith("." + domain) for domain in self.domains)

    def texts(self) -> tuple[str, ...]:
        return (*self.domains, *map(str, self.networks))
