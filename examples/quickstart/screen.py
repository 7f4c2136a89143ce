"""One screen: what happened without Sidecar, what happened with it, and the proof."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TextIO

from page import Page
from story import Story

WIDTH = 100
"""Two columns need it; on a narrower terminal what came before stands above what came after."""
MIN_WIDTH = 60
LABEL = 10
COLUMN = 40
HASH_LENGTH = 32
TINTS = {"bad": "31", "good": "32", "head": "1", "dim": "2"}


def tint(text: str, name: str) -> str:
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\x1b[{TINTS[name]}m{text}\x1b[0m"


def clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def width() -> int:
    """What may be printed in one line; a file or a pipe gets all of it."""
    columns = shutil.get_terminal_size((WIDTH, 50)).columns if sys.stdout.isatty() else WIDTH
    return max(MIN_WIDTH, min(WIDTH, columns))


def head(title: str, remark: str = "") -> None:
    print(f"\n{tint(title, 'head')}" + (f"  {tint(remark, 'dim')}" if remark else ""))


def pair(label: str, before: str, after: str) -> None:
    room = width()
    if room < WIDTH:
        print(f"  {label:<{LABEL}}{clip(before, room - LABEL - 2)}".rstrip())
        print(f"  {'->':>{LABEL - 1}} {clip(after, room - LABEL - 2)}")
        return
    print(f"  {label:<{LABEL}}{clip(before, COLUMN):<{COLUMN + 2}}{clip(after, WIDTH - LABEL - COLUMN - 4)}")


def row(label: str, text: str) -> None:
    for line in textwrap.wrap(text, width() - LABEL - 2, break_on_hyphens=False) or [""]:
        print(f"  {label:<{LABEL}}{line}")
        label = ""


def rows(label: str, lines: list[str]) -> None:
    for line in lines:
        row(label, line)
        label = ""


def show(story: Story) -> None:
    print(tint("\nThe nightly report, unchanged".ljust(LABEL + 3), "head"))
    pair("", "without Sidecar", "sidecar exec -- nightly-report.sh")
    _masked(story)
    _denied(story)
    _held(story)
    _who(story)
    _audit(story)
    _cost(story)
    failures = story.failures()
    for failure in failures:
        print(tint(f"  FAILED: {failure}", "bad"))


def _masked(story: Story) -> None:
    head("masked", "by table and column, also behind an alias and in JSON")
    for label, heading, shown in (
        ("psql", "customers", _without_id),
        ("psycopg", "totals", _short),
        ("curl", "customers, from the API", _first_customer),
    ):
        before, after = (story.part(output, heading)[:1] for output in (story.direct, story.steered))
        pair(label, *(shown(lines[0]) if lines else "nothing" for lines in (before, after)))


def _short(line: str) -> str:
    """A keyed hash is long; its beginning is enough to see it."""
    return "  ".join(f"{word[:8]}…" if len(word) == HASH_LENGTH else word for word in line.split("  "))


def _without_id(line: str) -> str:
    return _short(line.partition("  ")[2])


def _first_customer(text: str) -> str:
    try:
        first = json.loads(text)["customers"][0]
    except (ValueError, LookupError):
        return text
    return _short("  ".join(str(first[key]) for key in ("name", "email", "ssn")))


def _denied(story: Story) -> None:
    head("denied", "an error in the client's own protocol; the same session goes on")
    before = story.part(story.direct, "cleaning up")
    row("psql", f"without: {', '.join(before)}")
    rows("", story.part(story.steered, "cleaning up"))
    old_client = "an old client, by its old API call"
    row("curl", f"without: {' '.join(story.part(story.direct, old_client))}")
    row("", _problem(" ".join(story.part(story.steered, old_client))))


def _problem(text: str) -> str:
    try:
        document = json.loads(text)
    except ValueError:
        return text
    return f"{document.get('status')} {document.get('title', '')}: {document.get('detail', '')}"


def _held(story: Story) -> None:
    head("held", "until somebody else approves exactly this statement, once")
    rows("psql", story.part(story.steered, "a customer asked to be forgotten"))
    if story.evidence:
        row(
            "approved",
            f"by {story.evidence.approved_by or 'nobody'} after {story.evidence.held_s:.1f} s"
            f" (rule {story.evidence.held_by_rule})",
        )


def _who(story: Story) -> None:
    evidence = story.evidence
    if evidence is None:
        return
    head("who")
    row("principal", f"{evidence.principal or 'none'}  (verified, issuer {evidence.issuer})")
    row("process", " > ".join(evidence.processes[-5:]))
    row("database", f"knew the session as {story.server_saw or 'nobody'}")
    rows("API", [line for line in story.part(story.steered, "totals") if line.startswith("report:")])


def _audit(story: Story) -> None:
    head("audit")
    if story.evidence:
        row(
            "records", f"{story.evidence.records} of {story.evidence.flows} connections; no secret among them"
        )
    row("verify", story.verified.splitlines()[-1] if story.verified else "")
    row("altered", story.refused.splitlines()[0] if story.refused else "not refused")
    row("kernel", "nothing left: no hook, table or cgroup" if not story.traces else "; ".join(story.traces))


def _cost(story: Story) -> None:
    head("cost", "medians of a loop over one connection, the far host on this machine")
    for key, label in (("query_us", "query"), ("request_us", "request")):
        before, after = story.direct_loop.get(key, 0.0), story.steered_loop.get(key, 0.0)
        pair(label, f"{before:.0f} µs", f"{after:.0f} µs  (+{after - before:.0f} µs)")
    before, after = (loop.get("connect_ms", 0.0) for loop in (story.direct_loop, story.steered_loop))
    pair("connect", f"{before:.0f} ms", f"{after:.0f} ms")


def show_page(page: Page, state: Path, record: str = "ID", file: TextIO | None = None) -> None:
    """Where to look further. `record`: one that was denied, to ask about."""
    sidecar = os.path.relpath(Path(sys.executable).with_name("sidecar"))
    if sidecar.startswith(".."):
        sidecar = str(Path(sys.executable).with_name("sidecar").absolute())
    root = "sudo " if "SUDO_USER" in os.environ else ""
    print(
        f"\npage      http://{page.address}/\n"
        f"records   {state}\n"
        f"why       {root}{sidecar} why {record} --directory {state / 'audit'}\n"
        "stop      ./scripts/quickstart --stop    (ends the page and removes the records)",
        file=file or sys.stdout,
    )
