"""Documents: positions, the nearest valid name, bounds."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest

from sidecar.documents import MAX_DEPTH, MAX_DOCUMENT_BYTES, load_document, parse_duration, parse_size
from sidecar.errors import ConfigurationError


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    level: Literal["low", "high"] = "low"
    count: int = 0
    until: str = ""


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    name: str = ""
    inner: Inner | None = None
    items: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("text", "line", "path", "hint"),
    [
        ("name: a\ninner:\n  levle: low\n", 3, "inner.levle", "level"),
        ("inner: {level: hgih}\n", 1, "inner.level", "high"),
        ("items:\n  - {count: 1}\n  - {cuont: 1}\n", 3, "items.1.cuont", "count"),
        ("items:\n  - count: x\n", 2, "items.0.count", None),
        ("name: a\nname: b\n", 2, None, None),
        ("name: [\n", 2, None, None),
        ("name: &a x\ninner: *a\n", 2, None, None),
        ("name: " + "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), 1, None, None),
        ("[" * 5000, 1, None, None),
        ("#" * (MAX_DOCUMENT_BYTES + 1), None, None, None),
        ("name: !!python/object/apply:os.system [x]\n", 1, "name", None),
    ],
)
def test_problems_are_located(text: str, line: int | None, path: str | None, hint: str | None) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_document(text, "f.yaml", Outer)
    assert caught.value.exit_code == 2
    assert "f.yaml" in str(caught.value)
    if line is not None:
        assert caught.value.line == line
    if path is not None:
        assert caught.value.path == path
    if hint is not None:
        assert hint in (caught.value.hint or "")


def test_a_date_is_text() -> None:
    assert load_document("inner: {until: 2026-12-31}", "f", Outer).inner == Inner(until="2026-12-31")


def test_an_empty_document_has_the_defaults() -> None:
    assert load_document("", "f", Outer) == Outer()


@pytest.mark.parametrize(("text", "size"), [("1GiB", 2**30), ("64 KiB", 65536), ("1.5k", 1500), (7, 7)])
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(("text", "seconds"), [("15m", 900.0), ("500ms", 0.5), ("1d", 86400.0), (3, 3.0)])
def test_durations(text: str | int, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "-1", "1 fortnight", True, -1])
def test_what_is_neither_is_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match="size|negative"):
        parse_size(text)
    with pytest.raises(ValueError, match="duration|negative"):
        parse_duration(text)
