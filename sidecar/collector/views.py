"""Records as pages show them. What hosts sent is never trusted to have a shape: a field of another type counts as absent."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.collector.approvals import HoldView

MAX_CELL: Final = 80
MAX_BODY: Final = 4_000
MAX_SAMPLE_ROWS: Final = 100


def clock(ts_ns: int) -> str:
    """Local time of day, to the millisecond."""
    return datetime.datetime.fromtimestamp(ts_ns / 1e9).strftime("%H:%M:%S.%f")[:-3]


def day(ts_ns: int) -> str:
    return datetime.datetime.fromtimestamp(ts_ns / 1e9).strftime("%Y-%m-%d %H:%M:%S")


def duration(ns: int) -> str:
    """`840 µs`, `12.4 ms`, `3.1 s`, `4 min`."""
    if ns < 1_000_000:
        return f"{ns / 1e3:.0f} µs"
    if ns < 1_000_000_000:
        return f"{ns / 1e6:.1f} ms"
    return f"{ns / 1e9:.1f} s" if ns < 120_000_000_000 else f"{ns / 60e9:.0f} min"


def size(count: int) -> str:
    return (
        f"{count} B"
        if count < 10_000
        else f"{count / 1024:.0f} KiB"
        if count < 10 << 20
        else f"{count / (1 << 20):.0f} MiB"
    )


@dataclass(slots=True)
class Fact:
    name: str
    value: str
    more: str = ""
    code: bool = False


@dataclass(slots=True)
class Cell:
    text: str
    null: bool = False


@dataclass(slots=True)
class Column:
    name: str
    masked: str


@dataclass(slots=True)
class Entry:
    """One request with what became of it, or (`note`) a record that stands alone."""

    id: str
    ts_ns: int
    action: str = ""
    rule: str = ""
    reason: str = ""
    would: str = ""
    masks: list[str] = field(default_factory=list)
    text: str = ""
    truncated: str = ""
    parameters: list[str] = field(default_factory=list)
    steps: list[tuple[str, str, str]] = field(default_factory=list)
    """Holds and decisions: (time, state, words)."""
    error: str = ""
    outcome: str = ""
    columns: list[Column] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    rows_left: int = 0
    body: str = ""
    note: str = ""
    note_kind: str = ""


@dataclass(slots=True)
class Transcript:
    flow: str
    title: str
    protocol: str
    refused: str
    facts: list[Fact]
    lineage: list[str]
    entries: list[Entry]


def _map(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return "" if value is None else value if isinstance(value, str) else str(value)


def _int(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 63 else 0


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def transcript(flow: str, opened: dict[str, Any] | None, records: list[dict[str, Any]]) -> Transcript:
    """One flow. `opened` is its `open` record, where that has been shipped."""
    opened = opened or {}
    target, verdict = _map(opened.get("target")), _map(opened.get("verdict"))
    entries: list[Entry] = []
    by_id: dict[str, Entry] = {}
    for record in records:
        kind = record.get("kind")
        entry = by_id.get(_text(record.get("request")))
        if kind == "open":
            continue
        if kind == "request":
            by_id[_text(record.get("id"))] = request = _request(record)
            entries.append(request)
        elif kind == "response" and entry is not None:
            _respond(entry, record)
        elif kind in ("hold", "decision") and entry is not None:
            entry.steps.append(_step(record))
        else:
            entries.append(_note(record))
    host = _text(target.get("name")) or _text(target.get("host")) or "unknown"
    return Transcript(
        flow=flow,
        title=f"{host}:{_int(target.get('port'))}" if target else "Flow " + flow[-8:],
        protocol=_text(target.get("protocol")),
        refused=_text(verdict.get("reason")) if verdict.get("action") == "deny" else "",
        facts=_facts(flow, opened, target),
        lineage=_lineage(_map(opened.get("origin"))),
        entries=entries,
    )


def _facts(flow: str, opened: dict[str, Any], target: dict[str, Any]) -> list[Fact]:
    origin, principal = _map(opened.get("origin")), _map(opened.get("principal"))
    workload = _map(opened.get("workload"))
    facts = (
        [Fact("Opened", day(_int(opened.get("ts_ns"))), f"on {_text(opened.get('host'))}")] if opened else []
    )
    facts.append(Fact("Flow", flow, code=True))
    if principal:
        facts.append(
            Fact(
                "Principal", _text(principal.get("subject")), f"verified by {_text(principal.get('issuer'))}"
            )
        )
    elif opened:
        facts.append(
            Fact("Principal", "", f"not verified ({_text(opened.get('identity_error')) or 'no_token'})")
        )
    if origin.get("tgid"):
        facts.append(
            Fact(
                "Process",
                _text(origin.get("exe")) or _text(origin.get("comm")),
                f"pid {_text(origin.get('tgid'))}, uid {_text(origin.get('uid'))}",
            )
        )
        command = " ".join(map(_text, _list(origin.get("cmdline"))))
        if command:
            facts.append(Fact("Command", _cut(command, 400), code=True))
        if origin.get("cgroup"):
            facts.append(Fact("Cgroup", _text(origin.get("cgroup")), code=True))
    elif opened:
        facts.append(Fact("Process", "", "the kernel could not say"))
    ci = _map(workload.get("ci"))
    if ci:
        words = [_text(ci.get(name)) for name in ("repository", "job", "step") if ci.get(name)]
        facts.append(Fact("CI job", " / ".join(words), _text(ci.get("provider"))))
    container = _map(workload.get("container"))
    if container:
        name = _text(container.get("name")) or _text(container.get("id"))[:12]
        facts.append(Fact("Container", name, _text(container.get("image")) or "image not known"))
    if target:
        address = f"{_text(target.get('address'))}, name from {_text(target.get('host_source'))}"
        facts.append(Fact("Target", f"{_text(target.get('host'))}:{_int(target.get('port'))}", address))
    return facts


def _lineage(origin: dict[str, Any]) -> list[str]:
    """The process's ancestors, nearest first."""
    found = []
    for parent in _list(origin.get("ancestors")):
        parent = _map(parent)
        command = " ".join(map(_text, _list(parent.get("cmdline")))) or _text(parent.get("comm"))
        found.append(f"{_text(parent.get('comm'))} [{_text(parent.get('pid'))}]  {_cut(command, 120)}")
    return found


def _request(record: dict[str, Any]) -> Entry:
    operation, verdict = _map(record.get("operation")), _map(record.get("verdict"))
    text = _text(operation.get("text"))
    if not text:
        path = _text(operation.get("path"))
        text = f"{_text(operation.get('method'))} {path}".strip() or _text(operation.get("kind"))
    full = _int(operation.get("text_bytes")) or _int(operation.get("body_bytes"))
    return Entry(
        id=_text(record.get("id")),
        ts_ns=_int(record.get("ts_ns")),
        action=_text(verdict.get("action")),
        rule=_text(verdict.get("rule")),
        reason=_text(verdict.get("reason")),
        would=_text(verdict.get("would")),
        masks=[_text(name) for name in _list(verdict.get("masks"))],
        text=text,
        truncated=f"recorded in part, {size(full)} in full" if operation.get("truncated") else "",
        parameters=[_parameter(value) for value in _list(operation.get("parameters"))],
    )


def _parameter(value: Any) -> str:
    return "NULL" if value is None else _cut(_text(value), MAX_CELL)


def _respond(entry: Entry, record: dict[str, Any]) -> None:
    response, timing = _map(record.get("response")), _map(record.get("timing"))
    error = _map(response.get("error"))
    if error:
        entry.error = (
            f"{_text(error.get('sqlstate') or error.get('code'))} {_text(error.get('message'))}".strip()
        )
    parts = [_text(response.get("status"))] if response.get("status") is not None else []
    if response.get("rows"):
        count = _int(response.get("rows"))
        parts.append(f"{count} row" if count == 1 else f"{count} rows")
    if response.get("bytes"):
        parts.append(size(_int(response.get("bytes"))))
    for name, word in (("upstream_ns", "upstream"), ("held_ns", "held"), ("inspector_ns", "inspected in")):
        if _int(timing.get(name)):
            parts.append(f"{word} {duration(_int(timing.get(name)))}")
    entry.outcome = " · ".join(part for part in parts if part)
    entry.columns = [
        Column(_text(_map(column).get("name")), _text(_map(column).get("masked")))
        for column in _list(response.get("columns"))
    ]
    sample = _list(response.get("sample"))
    entry.rows = [
        [
            Cell("NULL" if value is None else _cut(_text(value), MAX_CELL), value is None)
            for value in _list(row)
        ]
        for row in sample[:MAX_SAMPLE_ROWS]
    ]
    entry.rows_left = max(_int(response.get("rows")) - len(entry.rows), 0) if entry.rows else 0
    entry.body = _cut(_text(response.get("body")), MAX_BODY)


def _step(record: dict[str, Any]) -> tuple[str, str, str]:
    held = _map(record.get("hold"))
    words = f"by {_text(held.get('by'))}" if held.get("by") else ""
    if held.get("reason"):
        words += (": " if words else "") + _text(held.get("reason"))
    return clock(_int(record.get("ts_ns"))), _text(held.get("state")) or "pending", words


def _note(record: dict[str, Any]) -> Entry:
    kind = _text(record.get("kind"))
    words = " ".join(part for part in (_text(record.get("reason")), _text(record.get("detail"))) if part)
    sent, received = _int(record.get("bytes_client")), _int(record.get("bytes_server"))
    if kind == "close" and (sent or received):
        words += f" · {size(sent)} sent, {size(received)} received"
    return Entry(id=_text(record.get("id")), ts_ns=_int(record.get("ts_ns")), note=words, note_kind=kind)


@dataclass(slots=True)
class Hold:
    """A hold as its card shows it."""

    id: str
    short: str
    state: str
    rule: str
    reason: str
    statement: str
    parameters: list[str]
    target: str
    principal: str
    process: str
    opened: str
    expires: str
    flow: str
    decided: str


def hold(view: HoldView) -> Hold:
    decided = f"by {view.decided_by}" if view.decided_by else ""
    if view.decision_reason:
        decided += (": " if decided else "") + view.decision_reason
    return Hold(
        id=view.id,
        short=view.id[-8:],
        state=view.state,
        rule=view.rule,
        reason=view.reason,
        statement=view.statement,
        parameters=[_parameter(value) for value in view.parameters or ()],
        target=view.target,
        principal=view.principal,
        process=view.process,
        opened=clock(view.opened_ns),
        expires=clock(view.expires_ns)[:8],
        flow=view.flow,
        decided=decided,
    )
