"""`sidecar audit`: follow, show, export and verify the records."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import click
import orjson

from sidecar.audit import read
from sidecar.audit import verify as verification
from sidecar.errors import AuditError


def _directory(given: Path | None) -> Path:
    if given is not None:
        return given
    from sidecar.config import load_config

    return Path(load_config(None).audit.directory)


def _json(value: Any) -> str:
    return orjson.dumps(value, default=_fallback, option=orjson.OPT_NON_STR_KEYS).decode()


def _fallback(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    raise TypeError(type(value).__name__)


def _clock(ts_ns: int) -> str:
    return datetime.datetime.fromtimestamp(ts_ns / 1e9).strftime("%H:%M:%S.%f")[:-3]


@click.group()
def audit() -> None:
    """Follow, show, export and verify the records."""


_option = click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="The spool; default from the configuration.",
)


def _who(record: dict[str, Any]) -> str:
    principal, origin = record.get("principal"), record.get("origin") or {}
    name = principal["subject"] if principal else "-"
    return (
        f"{name} {Path(str(origin.get('exe') or origin.get('comm') or '?')).name}[{origin.get('tgid', '?')}]"
    )


def _where(target: dict[str, Any]) -> str:
    return f"{target.get('host')}:{target.get('port')}"


def _line(record: dict[str, Any]) -> str:
    head = f"{_clock(record.get('ts_ns', 0))} {record['kind']:<9} {str(record.get('flow', ''))[-8:]:<8} "
    operation, verdict, response = (
        record.get("operation") or {},
        record.get("verdict") or {},
        record.get("response") or {},
    )
    target = record.get("target") or {}
    if record["kind"] == "open":
        return (
            head
            + f"{_who(record)} → {target.get('host')}:{target.get('port')} {target.get('protocol')} {verdict.get('action', '')}"
        )
    if record["kind"] == "request":
        text = (
            operation.get("text")
            or f"{operation.get('method', '')} {operation.get('path', '')}".strip()
            or operation.get("kind")
        )
        rule = f" [{verdict.get('rule')}]" if verdict.get("rule") else ""
        return head + f"{verdict.get('action', '')!s:<5}{rule} {_short(text)}"
    if record["kind"] == "response":
        error = response.get("error")
        return head + (
            f"error {error.get('sqlstate', '')} {error.get('message', '')}"
            if error
            else f"{response.get('status')} rows {response.get('rows', 0)} bytes {response.get('bytes', 0)}"
        )
    if record["kind"] in ("hold", "decision"):
        hold = record.get("hold") or {}
        return head + " ".join(
            part
            for part in (
                hold.get("state", "pending"),
                str(hold.get("id", ""))[-8:],
                f"by {hold['by']}" if hold.get("by") else "",
                hold.get("reason", ""),
            )
            if part
        )
    return head + f"{record.get('reason', '')} {record.get('detail') or ''}".rstrip()


def _short(text: Any, width: int = 140) -> str:
    flat = " ".join((text if isinstance(text, str) else repr(text)).split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


@audit.command()
@_option
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now.")
@click.option("-n", "--lines", default=50, show_default=True, type=click.IntRange(0, 100_000))
@click.option("--json", "as_json", is_flag=True)
def tail(directory: Path | None, follow: bool, lines: int, as_json: bool) -> None:
    """The newest records."""
    place = _directory(directory)
    rows = list(read.joined(place))[-lines:] if lines else []
    for record in rows:
        click.echo(_json(record) if as_json else _line(record))
    if follow:
        for record in read.follow(place):
            click.echo(_json(record) if as_json else _line(record))


@audit.command()
@click.argument("flow")
@_option
@click.option("--json", "as_json", is_flag=True)
def show(flow: str, directory: Path | None, as_json: bool) -> None:
    """One flow as a transcript: who, from where, each statement, what came back."""
    rows = read.flow_records(_directory(directory), flow)
    if not rows:
        raise AuditError(f"there is no flow {flow}", hint="sidecar audit tail")
    if as_json:
        for record in rows:
            click.echo(_json(record))
        return
    opened = next((record for record in rows if record["kind"] == "open"), None)
    if opened is not None:
        _print_opening(opened)
    for record in rows:
        if record["kind"] != "open":
            click.echo(_line(record))
        for values in (record.get("response") or {}).get("sample") or ():
            click.echo(
                "             │ "
                + " │ ".join("NULL" if value is None else _short(value, 40) for value in values)
            )


def _print_opening(opened: dict[str, Any]) -> None:
    origin, target = opened.get("origin") or {}, opened.get("target") or {}
    click.echo(f"flow       {opened['flow']}")
    click.echo(
        f"target     {target.get('name') or target.get('host')}:{target.get('port')} ({target.get('protocol')}, {target.get('address')})"
    )
    principal = opened.get("principal")
    click.echo(
        f"principal  {principal['subject']} of {principal['issuer']}"
        if principal
        else f"principal  none ({opened.get('identity_error', 'no_token')})"
    )
    click.echo(
        f"process    {origin.get('exe') or origin.get('comm')} pid {origin.get('tgid')} uid {origin.get('uid')} "
        f"cgroup {origin.get('cgroup')}"
    )
    click.echo(f"command    {_short(' '.join(origin.get('cmdline') or ()))}")
    for depth, parent in enumerate(origin.get("ancestors") or ()):
        click.echo(
            f"           {'  ' * depth}└ {parent['comm']}[{parent['pid']}] {_short(' '.join(parent['cmdline']), 80)}"
        )
    click.echo("")


@audit.command()
@_option
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="A file; default standard output."
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines, which it always prints.")
def export(directory: Path | None, out: Path | None, as_json: bool) -> None:
    """All records as JSON lines, each with who and where of its flow."""
    stream = out.open("w", encoding="utf-8") if out else sys.stdout
    try:
        for record in read.joined(_directory(directory)):
            stream.write(_json(record) + "\n")
    finally:
        if out:
            stream.close()


@audit.command()
@click.argument("directory", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option("--directory", "named", type=click.Path(path_type=Path, file_okay=False))
@click.option("--json", "as_json", is_flag=True)
def verify(directory: Path | None, named: Path | None, as_json: bool) -> None:
    """Check chains, signatures, receipts and gaps, offline. Exit status 1 when anything is missing or altered."""
    report = verification.verify(_directory(directory or named))
    if as_json:
        click.echo(
            _json(
                {
                    "ok": report.ok,
                    "directory": report.directory,
                    "host_key": report.host_key,
                    "records": report.records,
                    "streams": [
                        {
                            "stream": s.stream,
                            "records": s.records,
                            "signed": s.signed,
                            "receipted": s.receipted,
                            "unsigned": s.unsigned,
                            "end": s.end,
                        }
                        for s in report.streams
                    ],
                    "findings": [
                        {"stream": f.stream, "seq": f.seq, "record": f.record, "problem": f.problem}
                        for f in report.findings
                    ],
                }
            )
        )
    else:
        for finding in report.findings:
            where = (
                f"stream {finding.stream}"
                + (f", record {finding.seq}" if finding.seq >= 0 else "")
                + (f" ({finding.record})" if finding.record else "")
            )
            click.echo(f"BAD  {where}: {finding.problem}" if finding.stream else f"BAD  {finding.problem}")
        unsigned = sum(stream.unsigned for stream in report.streams)
        receipted = sum(stream.receipted for stream in report.streams)
        click.echo(
            f"{'ok' if report.ok else 'NOT OK'}: {report.records} records in {len(report.streams)} streams, "
            f"{sum(stream.signed for stream in report.streams)} signed, {receipted} receipted, {unsigned} not signed yet"
        )
    sys.exit(0 if report.ok else 1)
