"""How commands print: data on stdout, everything else on stderr, readable without colour.

What comes from jobs (statements, paths, names) is untrusted: `plain` takes the terminal's control characters
out of it.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

import click
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

UNBOUNDED_WIDTH: Final = 400
"""Of tables that are not printed to a terminal: nothing is cut for who reads with grep."""


def emit_json(data: Any) -> None:
    """One JSON document on one line. Bytes that are text become text, others base64."""
    click.echo(msgspec.json.encode(_texts(data), enc_hook=str).decode())


def _texts(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {_texts(key): _texts(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_texts(item) for item in value]
    return value


def line(text: str = "") -> None:
    click.echo(text)


def note(text: str) -> None:
    """For the person, not for a pipe."""
    click.echo(text, err=True)


def error(message: str, hint: str | None) -> None:
    """`sidecar: what failed` and `hint: what to do`, on stderr."""
    click.echo(f"sidecar: {plain(message, newlines=True)}", err=True)
    if hint:
        click.echo(f"hint: {plain(hint, newlines=True)}", err=True)


def console() -> Console:
    """For tables on stdout. rich honours NO_COLOR and TERM=dumb; a pipe gets neither colour nor a width."""
    width = None if sys.stdout.isatty() else UNBOUNDED_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table without frame; columns whose name starts with `>` are numbers, aligned to the right; those with `=` are ids. Neither is
    cut."""
    made = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(
            name.lstrip(">="),
            justify="right" if name.startswith(">") else "left",
            no_wrap=name.startswith((">", "=")),
            overflow="ellipsis" if sys.stdout.isatty() else "fold",
        )
    for row in rows:
        made.add_row(*(Text(plain(cell)) for cell in row))
    return made


def plain(text: str, *, newlines: bool = False) -> str:
    """`text` without control characters: they show as escapes and do nothing to the terminal."""
    return "".join(c if c.isprintable() or (newlines and c == "\n") else _escape(c) for c in text)


def _escape(char: str) -> str:
    number = ord(char)
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char) or (
        f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
    )


def size(count: int) -> str:
    """Bytes as people read them: `812 B`, `1.4 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def duration(nanoseconds: int) -> str:
    """`3 s`, `12 min`, `5 h`, `2 d`; what is over says `0 s`."""
    seconds = max(0, nanoseconds // 1_000_000_000)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def age(then_ns: int) -> str:
    return duration(time.time_ns() - then_ns) if then_ns else "-"


def clock(then_ns: int) -> str:
    """Local time to the second."""
    moment = datetime.datetime.fromtimestamp(then_ns / 1e9, tz=datetime.UTC).astimezone()
    return moment.strftime("%Y-%m-%d %H:%M:%S")
