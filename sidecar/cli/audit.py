"""`sidecar audit`: follow, show, export and verify the records."""

from __future__ import annotations

import datetime
import os
import sys
import time
from pathlib import Path
from typing import Any

import click
import orjson

from sidecar.audit import read
from sidecar.audit.report import Report, report_map
from sidecar.audit.verify import verify as verify_directory
from sidecar.cli import output
from sidecar.cli.options import config_option
from sidecar.errors import AuditError


def _directory(given: Path | None, config_file: Path | None) -> Path:
    if given is not None:
        return given
    from sidecar.config import load_config

    return Path(load_config(config_file).audit.directory)


def _json(value: Any) -> str:
    return orjson.dumps(value, default=_fallback, option=orjson.OPT_NON_STR_KEYS).decode()


def _fallback(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    raise TypeError(type(value).__name__)


def _clock(ts_ns: int) -> str:
    """Local time; with the date where that is not today's."""
    moment = datetime.datetime.fromtimestamp(ts_ns / 1e9)
    day = "" if moment.date() == datetime.date.today() else moment.strftime("%Y-%m-%d ")
    return day + moment.strftime("%H:%M:%S.%f")[:-3]


@click.group()
def audit() -> None:
    """Follow, show, export and verify the records."""


_directory_option = click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False, readable=False),
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


class _Damage:
    """Tells what does not hold, on stderr, once; the command goes on with the rest and ends with 1."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, error: AuditError) -> None:
        if error.message not in self._said:
            self._said.add(error.message)
            output.error(error.message, error.hint)

    def leave(self) -> None:
        if self._said:
            sys.exit(AuditError.exit_code)


@audit.command()
@_directory_option
@config_option
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now.")
@click.option("-n", "--lines", default=50, show_default=True, type=click.IntRange(0, 100_000))
@click.option("--json", "as_json", is_flag=True, help="JSON lines, each with who and where of its flow.")
def tail(directory: Path | None, config_file: Path | None, follow: bool, lines: int, as_json: bool) -> None:
    """The newest records."""
    place, damage = _directory(directory, config_file), _Damage()
    follower = read.Follower(place, damage)
    join = read.Joiner(place, look_back=True)
    rows = follower.newest(lines)
    while True:
        for record in rows:
            full = join(record)
            click.echo(_json(full) if as_json else output.plain(_line(full)))
        if not follow:
            damage.leave()
            return
        time.sleep(read.FOLLOW_INTERVAL_S)
        rows = follower.new()


@audit.command()
@click.argument("flow")
@_directory_option
@config_option
@click.option("--json", "as_json", is_flag=True, help="The flow's records as JSON lines.")
def show(flow: str, directory: Path | None, config_file: Path | None, as_json: bool) -> None:
    """One flow as a transcript.

    Who, from where, each statement, and what came back.

    FLOW is its id, the last digits of it, or the id of one of its records.
    """
    damage = _Damage()
    rows = read.flow_records(_directory(directory, config_file), flow, damage)
    if not rows:
        damage.leave()
        raise AuditError(f"there is no flow {flow}", hint="sidecar audit tail")
    if as_json:
        for record in rows:
            click.echo(_json(record))
        damage.leave()
        return
    opened = next((record for record in rows if record["kind"] == "open"), None)
    if opened is not None:
        _print_opening(opened)
    for record in rows:
        if record["kind"] != "open":
            _say(_line(record))
        for values in (record.get("response") or {}).get("sample") or ():
            _say(
                "             │ "
                + " │ ".join("NULL" if value is None else _short(value, 40) for value in values)
            )
    damage.leave()


def _print_opening(opened: dict[str, Any]) -> None:
    origin, target = opened.get("origin") or {}, opened.get("target") or {}
    _say(f"flow       {opened['flow']}")
    _say(f"opened     {output.clock(int(opened.get('ts_ns') or 0))} on {opened.get('host', '?')}")
    _say(
        f"target     {target.get('name') or target.get('host')}:{target.get('port')} ({target.get('protocol')}, {target.get('address')})"
    )
    principal = opened.get("principal")
    _say(
        f"principal  {principal['subject']} of {principal['issuer']}"
        if principal
        else f"principal  none ({opened.get('identity_error', 'no_token')})"
    )
    _say(
        f"process    {origin.get('exe') or origin.get('comm')} pid {origin.get('tgid')} uid {origin.get('uid')} "
        f"cgroup {origin.get('cgroup')}"
    )
    _say(f"command    {_short(' '.join(origin.get('cmdline') or ()))}")
    _print_workload(opened.get("workload") or {})
    for depth, parent in enumerate(origin.get("ancestors") or ()):
        _say(
            f"           {'  ' * depth}└ {parent['comm']}[{parent['pid']}] {_short(' '.join(parent['cmdline']), 80)}"
        )
    _say("")


def _print_workload(workload: dict[str, Any]) -> None:
    container, ci = workload.get("container"), workload.get("ci")
    if container:
        image = container.get("image") or "image not known"
        _say(
            f"container  {container.get('name') or '-'} {container['id'][:12]} {image} {container.get('image_id', '')}".rstrip()
        )
    if ci:
        words = [
            f"{name} {ci[name]}" for name in ("repository", "workflow", "run", "job", "step") if ci.get(name)
        ]
        _say(f"ci job     {ci['provider']}: {', '.join(words)}")


@audit.command()
@_directory_option
@config_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file, which only its owner can read; default standard output.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines, which it always prints.")
def export(directory: Path | None, config_file: Path | None, out: Path | None, as_json: bool) -> None:
    """All records as JSON lines.

    Each with who and where of its flow.
    """
    del as_json
    damage = _Damage()
    rows = read.joined(_directory(directory, config_file), damage)
    if out is None:
        for record in rows:
            click.echo(_json(record))
    else:
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            for record in rows:
                file.write(_json(record) + "\n")
    damage.leave()


@audit.command()
@click.argument("directory", required=False, type=click.Path(path_type=Path, file_okay=False, readable=False))
@click.option(
    "--directory",
    "named",
    type=click.Path(path_type=Path, file_okay=False, readable=False),
    help="The same as DIRECTORY; default from the configuration.",
)
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(directory: Path | None, named: Path | None, config_file: Path | None, as_json: bool) -> None:
    """Check chains, signatures, receipts and gaps.

    Offline. Exit status 1 when anything is missing or altered.
    """
    report = verify_directory(_directory(directory or named, config_file))
    if as_json:
        click.echo(_json(report_map(report)))
    else:
        _print_report(report)
    sys.exit(0 if report.ok else 1)


def _say(text: str) -> None:
    """What jobs and servers wrote does nothing to the terminal."""
    click.echo(output.plain(text))


def _print_report(report: Report) -> None:
    for finding in report.findings:
        where = (
            f"stream {finding.stream}"
            + (f", record {finding.seq}" if finding.seq >= 0 else "")
            + (f" ({finding.record})" if finding.record else "")
        )
        _say(f"BAD  {where}: {finding.problem}" if finding.stream else f"BAD  {finding.problem}")
    for note in report.notes:
        _say(f"note {note}")
    if report.gaps:
        counted = ", ".join(f"{count} {reason}" for reason, count in sorted(report.gaps.items()))
        _say(f"gaps recorded when they happened: {counted}")
    streams = report.streams
    _say(
        f"{'ok' if report.ok else 'NOT OK'}: {report.records} records in {len(streams)} streams, "
        f"{sum(stream.signed for stream in streams)} signed, {sum(stream.receipted for stream in streams)} receipted, "
        f"{sum(stream.unsigned for stream in streams)} not signed yet"
    )
