"""Content detectors: what looks like a card number, an IBAN, a key, whatever column or field it stands in. Pure.

The patterns are RE2's, which has none that takes more than linear time. RE2 cannot look around a match, and takes the longest: a number
may be followed by another group that belongs to something else. So where a check sum decides, every run of whole groups is tried.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import re2

CARD_DIGITS: Final = range(13, 20)
"""ISO/IEC 7812-1."""
IBAN_CHARS: Final = range(15, 35)
"""ISO 13616-1: the shortest in use (Norway) to the longest that is possible."""

Spans = Callable[[str], list[tuple[int, int]]]
"""What of a match is a finding: [start, end) in it."""


def _groups(text: str, separators: str) -> list[tuple[int, int]]:
    """[start, end) of the parts between separators."""
    found, start = [], 0
    for index, char in enumerate(text + separators[0]):
        if char in separators:
            if index > start:
                found.append((start, index))
            start = index + 1
    return found


def _runs(text: str, separators: str, sizes: range, starts: range) -> Iterator[tuple[int, int, str]]:
    """Runs of whole groups that hold so many characters, those from the left and the longer ones first, and their text without
    separators. Linear: a run cannot have more groups than characters."""
    groups = _groups(text, separators)
    for first in range(min(len(groups), starts.start), min(len(groups), starts.stop)):
        ends, size = [], 0
        for last in range(first, len(groups)):
            size += groups[last][1] - groups[last][0]
            if size >= sizes.stop:
                break
            if size >= sizes.start:
                ends.append(last)
        for last in reversed(ends):
            parts = groups[first : last + 1]
            yield parts[0][0], parts[-1][1], "".join(text[start:end] for start, end in parts)


def _cards(text: str) -> list[tuple[int, int]]:
    """Luhn's check sum (ISO/IEC 7812-1, annex B)."""
    found: list[tuple[int, int]] = []
    for start, end, digits in _runs(text, " -", CARD_DIGITS, range(len(text))):
        if (not found or start >= found[-1][1]) and _luhn(digits):
            found.append((start, end))
    return found


def _luhn(digits: str) -> bool:
    if digits[0] in "01789" or len(set(digits)) == 1:
        return False  # no issuer's
    numbers = [int(digit) for digit in digits]
    return (sum(numbers[-1::-2]) + sum(sum(divmod(2 * number, 10)) for number in numbers[-2::-2])) % 10 == 0


def _ibans(text: str) -> list[tuple[int, int]]:
    """The remainder by 97 (ISO 7064)."""
    for start, end, compact in _runs(text, " ", IBAN_CHARS, range(1)):
        rotated = compact[4:] + compact[:4]
        if int("".join(str(int(char, 36)) for char in rotated)) % 97 == 1:
            return [(start, end)]
    return []


def _addresses(text: str) -> list[tuple[int, int]]:
    """An IPv6 address has a digit, or C++ would be full of them."""
    if ":" in text and not (any(char.isdigit() for char in text) and text.count(":") > 1):
        return []
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return []
    return [(0, len(text))]


_OCTET: Final = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_CLOUD_KEYS: Final = "|".join(
    (
        r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b",  # AWS, identifiers of keys
        r"(?i:aws.{0,20}secret.{0,20}?)[A-Za-z0-9/+]{40}",  # AWS, the key beside its name
        r"\bAIza[0-9A-Za-z_-]{35}",  # Google, API keys
        r"\bya29\.[0-9A-Za-z_-]{20,}",  # Google, OAuth access tokens
        r"\bGOCSPX-[0-9A-Za-z_-]{28}",  # Google, client secrets
        r"(?i:AccountKey|SharedAccessKey)=[A-Za-z0-9+/]{43,88}={0,2}",  # Azure
        r"\bgh[pousr]_[A-Za-z0-9]{36,255}|\bgithub_pat_[A-Za-z0-9_]{22,255}",  # GitHub
        r"\bdop_v1_[a-f0-9]{64}\b",  # DigitalOcean
    )
)
DETECTORS: Final[Mapping[str, tuple[str, Spans | None]]] = {
    "credit_card": (r"\b\d(?:[ -]?\d){12,}\b", _cards),
    "us_ssn": (r"\b\d{3}-\d{2}-\d{4}\b", None),
    "email": (r"\b[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9.-]{1,253}\.[A-Za-z]{2,24}\b", None),
    "iban": (r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,40}\b", _ibans),
    "phone": (r"\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,5}\d{2,4}\b", None),
    "ip": (rf"\b(?:{_OCTET}\.){{3}}{_OCTET}\b|[0-9A-Fa-f]{{0,4}}(?::[0-9A-Fa-f]{{0,4}}){{2,7}}", _addresses),
    "jwt": (r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*", None),
    "private_key": (
        r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\z)",
        None,
    ),
    "aws_key": (r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", None),
    "cloud_key": (_CLOUD_KEYS, None),
}
"""Name → (RE2 pattern, what of its match counts)."""


@dataclass(frozen=True, slots=True)
class Detector:
    """`replace` makes a finding's mask."""

    pattern: Any
    spans: Spans | None
    replace: Callable[[str], str | None]

    def apply(self, text: bytes) -> bytes:
        """Bytes that are not UTF-8 pass through around what is found."""

        def masked(match: Any) -> bytes:
            found = bytes(match.group(0))
            readable = found.decode("utf-8", "replace")
            if self.spans is None:
                return (self.replace(readable) or "").encode()
            parts, after = [], 0
            for start, end in self.spans(readable):  # these patterns match ASCII only
                parts += [found[after:start], (self.replace(readable[start:end]) or "").encode()]
                after = end
            return b"".join([*parts, found[after:]])

        return bytes(self.pattern.sub(masked, text))


def detector(name: str, replace: Callable[[str], str | None]) -> Detector:
    """Raises KeyError."""
    pattern, spans = DETECTORS[name]
    return Detector(re2.compile(pattern.encode()), spans, replace)
