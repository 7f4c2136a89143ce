"""One screen: what happened without Sidecar, what happened with it, and the proof."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TextIO

from page import Page
from story import Story

WIDTH = 100
LABEL = 10
COLUMN = 40
TINTS = {"bad": "31", "good": "32", "head": "1", "dim": "2"}


def tint(text: str, name: str) -> str:
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\x1b[{TINTS[name]}m{text}\x1b[0m"


def clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def head(title: str, remark: str = "") -> None:
    print(f"\n{tint(title, 'head')}" + (f"  {tint(remark, 'dim')}" if remark else ""))


def pair(label: str, before: str, after: str) -> None:
    print(f"  {label:<{LABEL}}{clip(before, COLUMN):<{COLUMN + 2}}{clip(after, WIDTH - LABEL - COLUMN - 4)}")


def row(label: str, text: str) -> None:
    for line in text.splitlines() or [""]:
        print(f"  {label:<{LABEL}}{clip(line, WIDTH - LABEL - 2)}")
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
    head("masked", "by table and column, also behind aliases")
    both = [story.part(output, "customers") for output in (story.direct, story.steered)]
    for before, after in list(zip(*both, strict=False))[:2]:
        pair("psql", _short_hash(before), _short_hash(after))
    both = [story.part(output, "totals") for output in (story.direct, story.steered)]
    for before, after in list(zip(*both, strict=False))[:1]:
        pair("psycopg", before, after)
    for before, after in zip(
        *(story.part(output, "customers, from the API") for output in (story.direct, story.steered)),
        strict=False,
    ):
        pair("curl", _first_customer(before), _first_customer(after))


def _first_customer(text: str) -> str:
    try:
        first = json.loads(text)["customers"][0]
    except (ValueError, LookupError):
        return text
    return _short_hash("  ".join(str(first[key]) for key in ("id", "name", "email", "ssn")))


def _short_hash(line: str) -> str:
    """A keyed hash is long; its beginning is enough to see it."""
    return "  ".join(clip(word, 17) for word in line.split("  "))


def _denied(story: Story) -> None:
    head("denied", "an error in the client's own protocol; the same session goes on")
    before = story.part(story.direct, "cleaning up")
    pair("psql", "; ".join(before[:2]), "")
    for line in story.part(story.steered, "cleaning up"):
        row("", line)
    old_client = "an old client, by its old API call"
    pair("curl", " ".join(story.part(story.direct, old_client)), "")
    row("", _problem(" ".join(story.part(story.steered, old_client))))


def _problem(text: str) -> str:
    try:
        document = json.loads(text)
    except ValueError:
        return text
    return f"{document.get('status')} {document.get('title', '')}: {document.get('detail', '')}"


def _held(story: Story) -> None:
    head("held", "until somebody else approves exactly this statement, once")
    for line in story.part(story.steered, "a customer asked to be forgotten"):
        row("psql", line)
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
    posted = [line for line in story.part(story.steered, "totals") if line.startswith("report:")]
    row("servers", f"PostgreSQL saw {story.server_saw or 'nothing'}; API: {' '.join(posted)}")


def _audit(story: Story) -> None:
    head("audit")
    if story.evidence:
        row(
            "records", f"{story.evidence.records} of {story.evidence.flows} connections; no secret among them"
        )
    row("verify", story.verified.splitlines()[-1] if story.verified else "")
    row("altered", story.refused.splitlines()[0] if story.refused else "")
    row("kernel", "nothing left: no hook, table or cgroup" if not story.traces else "; ".join(story.traces))


def _cost(story: Story) -> None:
    head("cost", "medians of a loop over one connection, the far host on this machine")
    for key, label in (("query_us", "query"), ("request_us", "request")):
        before, after = story.direct_loop.get(key, 0.0), story.steered_loop.get(key, 0.0)
        pair(label, f"{before:.0f} µs", f"{after:.0f} µs  (+{after - before:.0f} µs)")


def show_page(page: Page, state: Path, file: TextIO | None = None) -> None:
    out = file or sys.stdout
    print(f"\npage      http://{page.address}/   (stop and remove it: ./scripts/quickstart --stop)", file=out)
    print(f"records   {state}", file=out)
