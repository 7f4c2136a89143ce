"""Finding the agents that a command talks to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import click

from sidecar.control import client
from sidecar.control.client import ControlClient, Instance
from sidecar.errors import ControlError

instance_option: Callable[[Any], Any] = click.option(
    "--instance", metavar="ID", help="Only this instance (see `sidecar status`)."
)
json_option: Callable[[Any], Any] = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def live_instances(only: str | None = None) -> list[Instance]:
    """All live instances, or the one that was asked for. Raises ControlError where that one does not
    answer."""
    found = client.discover()
    if only is None:
        return found
    chosen = [entry for entry in found if entry.instance == only]
    if not chosen:
        raise ControlError(f"no live instance {only}", hint="sidecar status")
    return chosen


def each_client(only: str | None = None) -> Iterator[tuple[Instance, ControlClient]]:
    """A connection to each live instance in turn; one that has just ended is passed over."""
    for entry in live_instances(only):
        try:
            connection = ControlClient(entry.path)
        except ControlError:
            continue
        with connection:
            yield entry, connection
