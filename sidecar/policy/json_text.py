"""Masks in the text of a JSON document: only the masked values are replaced, every other byte stays as it was.

So numbers keep their digits (integers beyond 64 bits, 1e400), strings their escapes, and objects the order of their members, also of
those that stand twice, each of which is masked. Subtrees that no path leads into are skipped by the standard library's C scanner.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.model.verdict import ValueMask

MAX_DEPTH: Final = 200
"""Of objects and lists within each other, along a path."""
_BLANK: Final = re.compile(r"[ \t\n\r]*")

Step = tuple[str, Any]
"""("name", text), ("index", number), ("any", None), or ("deep", text or "*"): at any depth below."""


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER: Final = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_not_json)


class _Number(str):
    """A number's digits."""

    __slots__ = ()


_VALUES: Final = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=_not_json)


@dataclass(frozen=True, slots=True)
class JsonPattern:
    """A path's steps, and the mask of what stands at its end."""

    steps: tuple[Step, ...]
    mask: ValueMask


Active = list[tuple[tuple[Step, ...], ValueMask]]
"""Paths that lead into the value at hand: the steps that are left."""


@dataclass(slots=True)
class _Walk:
    text: str
    detect: Callable[[str], str] | None
    out: list[str] = field(default_factory=list)
    copied: int = 0
    """Up to here the text is in `out`."""

    def blank(self, at: int) -> int:
        if self.text[at : at + 1] not in " \t\n\r":
            return at
        match = _BLANK.match(self.text, at)
        assert match is not None
        return match.end()

    def replace(self, start: int, end: int, by: str) -> None:
        self.out += (self.text[self.copied : start], by)
        self.copied = end

    def value(self, at: int, active: Active, depth: int) -> int:
        """The offset after the value at `at`."""
        if not active and self.detect is None:
            return int(_DECODER.raw_decode(self.text, at)[1])
        for steps, mask in active:
            if not steps:
                found, end = _VALUES.raw_decode(self.text, at)
                if found is not None:
                    self.replace(at, end, json.dumps(_masked(found, mask)))
                return end
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        first = self.text[at : at + 1]
        if first == "{":
            return self._object(at, active, depth)
        if first == "[":
            return self._list(at, active, depth)
        found, end = _VALUES.raw_decode(self.text, at)
        if self.detect is not None and isinstance(found, str):
            masked = self.detect(found)
            if masked != found:
                self.replace(at, end, "null" if isinstance(found, _Number) else json.dumps(masked))
        return int(end)

    def _object(self, at: int, active: Active, depth: int) -> int:
        text = self.text
        at = self.blank(at + 1)
        if text[at : at + 1] == "}":
            return at + 1
        while True:
            if text[at : at + 1] != '"':
                raise ValueError("a name is expected")
            name, at = _DECODER.raw_decode(text, at)
            at = self.blank(at)
            if text[at : at + 1] != ":":
                raise ValueError("a colon is expected")
            at = self.blank(self.value(self.blank(at + 1), _into_member(active, name), depth + 1))
            if text[at : at + 1] == "}":
                return at + 1
            at = self._comma(at)

    def _list(self, at: int, active: Active, depth: int) -> int:
        at = self.blank(at + 1)
        if self.text[at : at + 1] == "]":
            return at + 1
        index = 0
        while True:
            at = self.blank(self.value(at, _into_item(active, index), depth + 1))
            index += 1
            if self.text[at : at + 1] == "]":
                return at + 1
            at = self._comma(at)

    def _comma(self, at: int) -> int:
        if self.text[at : at + 1] != ",":
            raise ValueError("a comma is expected")
        return self.blank(at + 1)


def _into_member(active: Active, name: str) -> Active:
    found: Active = []
    for steps, mask in active:
        (kind, argument), rest = steps[0], steps[1:]
        if (
            kind == "any"
            or (kind == "name" and argument == name)
            or (kind == "deep" and argument in ("*", name))
        ):
            found.append((rest, mask))
        if kind == "deep":
            found.append((steps, mask))
    return found


def _into_item(active: Active, index: int) -> Active:
    found: Active = []
    for steps, mask in active:
        (kind, argument), rest = steps[0], steps[1:]
        if kind == "any" or (kind == "index" and argument == index) or (kind == "deep" and argument == "*"):
            found.append((rest, mask))
        if kind == "deep":
            found.append((steps, mask))
    return found


def _masked(node: Any, mask: ValueMask) -> Any:
    """Strings are masked; numbers and booleans, which cannot hold a mask, become null; objects and lists are masked whole."""
    if isinstance(node, dict):
        return {name: _masked(value, mask) for name, value in node.items()}
    if isinstance(node, list):
        return [_masked(value, mask) for value in node]
    if isinstance(node, str) and not isinstance(node, _Number):
        return mask.apply_str(node)
    return None


def mask_json_text(
    body: bytes, patterns: tuple[JsonPattern, ...], detect: Callable[[str], str] | None
) -> bytes:
    """One document in UTF-8 (a byte order mark may stand before it). The same object where nothing was masked. Where several paths end
    in one value, the first counts. Raises ValueError where it is no JSON, or nested too deeply to be walked."""
    try:
        text = body.decode("utf-8-sig")
        walk = _Walk(text, detect)
        end = walk.blank(walk.value(walk.blank(0), [(item.steps, item.mask) for item in patterns], 0))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if end != len(text):
        raise ValueError("something stands after the document")
    if not walk.out:
        return body
    return "".join((*walk.out, text[walk.copied :])).encode("utf-8", "surrogatepass")
