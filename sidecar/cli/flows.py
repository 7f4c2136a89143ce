"""`sidecar flows`: a live table of open flows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click
import msgspec
from rich.live import Live
from rich.table import Table

from sidecar.cli import output
from sidecar.cli.instances import each_client, instance_option, json_option, live_instances
from sidecar.control.client import ControlClient
from sidecar.control.protocol import FlowRow
from sidecar.errors import ControlError
from sidecar.model.ids import short_id

Rows = list[tuple[str, FlowRow]]
"""(instance, flow)"""


@click.command()
@instance_option
@click.option("--once", is_flag=True, help="Print one table and end.")
@click.option(
    "--watch", is_flag=True, help="Go on also where stdout is no terminal (with --json: a line a second)."
)
@json_option
def flows(instance: str | None, once: bool, watch: bool, as_json: bool) -> None:
    """Live table of open flows. On a terminal it refreshes every second; Ctrl-C ends it."""
    if once and watch:
        raise click.UsageError("--once and --watch exclude each other")
    live = watch or (sys.stdout.isatty() and not once and not as_json)
    if not live:
        rows = [(entry.instance, row) for entry, client in each_client(instance) for row in client.flows()]
        _print(rows, as_json)
        if not rows and not as_json and not live_instances():
            output.note("nothing is running")
        return
    if sys.stdout.isatty() and not as_json:
        with Live(console=output.console(), auto_refresh=False, screen=False) as display:
            for rows in _watch(instance):
                display.update(_table(rows), refresh=True)
    else:
        for rows in _watch(instance):
            _print(rows, as_json)
            sys.stdout.flush()


def _watch(only: str | None) -> Iterator[Rows]:
    """All instances' flows, about once a second; instances may come and go. Ends when none is left."""
    streams: dict[str, tuple[ControlClient, Iterator[list[FlowRow]]]] = {}
    try:
        while True:
            for entry in live_instances(only if not streams else None):
                if entry.instance not in streams and only in (None, entry.instance):
                    client = ControlClient(entry.path)
                    streams[entry.instance] = (client, client.watch_flows())
            rows: Rows = []
            for instance, (client, stream) in list(streams.items()):
                try:
                    rows += [(instance, row) for row in next(stream)]
                except (ControlError, StopIteration):
                    client.close()
                    del streams[instance]
            yield rows
            if not streams:
                return
    finally:
        for client, _ in streams.values():
            client.close()


def _print(rows: Rows, as_json: bool) -> None:
    if as_json:
        output.emit_json({"flows": [_as_map(instance, row) for instance, row in rows]})
    elif rows:
        output.console().print(_table(rows))
    else:
        output.line("no open flows")


def _as_map(instance: str, row: FlowRow) -> dict[str, Any]:
    return {"instance": instance, **msgspec.to_builtins(row)}


def _table(rows: Rows) -> Table:
    return output.table(
        [
            "flow",
            ">age",
            ">pid",
            "process",
            ">uid",
            "principal",
            "target",
            "protocol",
            ">requests",
            ">denied",
            ">up",
            ">down",
            "state",
        ],
        [
            (
                short_id(row.flow),
                output.age(row.opened_ns),
                str(row.pid),
                row.exe,
                str(row.uid),
                row.principal or "-",
                row.target,
                row.protocol,
                str(row.requests),
                str(row.denied),
                output.size(row.bytes_up),
                output.size(row.bytes_down),
                row.state,
            )
            for _, row in sorted(rows, key=lambda pair: pair[1].opened_ns)
        ],
    )
