"""`sidecar flows`: a live table of open flows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

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
        screen = output.console()
        with Live(console=screen, auto_refresh=False, screen=False) as display:
            for rows in _watch(instance):
                display.update(_table(rows, screen.width), refresh=True)
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
        screen = output.console()
        screen.print(_table(rows, screen.width))
    else:
        output.line("no open flows")


def _as_map(instance: str, row: FlowRow) -> dict[str, Any]:
    return {"instance": instance, **msgspec.to_builtins(row)}


COLUMNS: Final[tuple[tuple[str, int, Callable[[FlowRow], str]], ...]] = (
    # name as `output.table` has it, from which width of a terminal on, value
    ("=flow", 0, lambda row: short_id(row.flow)),
    (">age", 80, lambda row: output.age(row.opened_ns)),
    (">pid", 80, lambda row: str(row.pid)),
    ("process", 0, lambda row: row.exe),
    (">uid", 150, lambda row: str(row.uid)),
    ("principal", 100, lambda row: row.principal or "-"),
    ("target", 0, lambda row: row.target),
    ("protocol", 150, lambda row: row.protocol),
    (">requests", 0, lambda row: str(row.requests)),
    (">denied", 0, lambda row: str(row.denied)),
    (">up", 150, lambda row: output.size(row.bytes_up)),
    (">down", 150, lambda row: output.size(row.bytes_down)),
    ("state", 0, lambda row: row.state),
)


def _table(rows: Rows, width: int) -> Table:
    """What fits into `width` columns; a narrow one keeps which flow, who, where to and what became of it."""
    shown = [(name, value) for name, needs, value in COLUMNS if width >= needs]
    return output.table(
        [name for name, _ in shown],
        [
            [
                Path(value(row)).name if name == "process" and width < 180 else value(row)
                for name, value in shown
            ]
            for _, row in sorted(rows, key=lambda pair: pair[1].opened_ns)
        ],
    )
