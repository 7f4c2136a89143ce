"""`sidecar down`: remove every kernel trace, idempotent, also after a crash."""

from __future__ import annotations

import os
import time
from typing import Final

import click

from sidecar.cli import output
from sidecar.cli.instances import json_option
from sidecar.control import client
from sidecar.control.client import ControlClient, Instance
from sidecar.control.server import is_live
from sidecar.errors import ControlError, PrerequisiteError

STOP_TIMEOUT_S: Final = 20.0
"""For a live agent to end its flows; after that it is killed, and its kernel state removed."""


@click.command()
@click.option("--instance", metavar="ID", help="Only this instance.")
@click.option("--dead", is_flag=True, help="Only what instances that no longer run have left behind.")
@json_option
def down(instance: str | None, dead: bool, as_json: bool) -> None:
    """Remove every kernel trace: hooks, rules, maps, cgroups and run directories. Live agents are asked to
    stop first.

    Idempotent. Records stay.
    """
    if os.geteuid() != 0:
        raise PrerequisiteError("removing kernel state needs root", hint="sudo sidecar down")
    from sidecar.kernel.removal import has_ended, known_instances, remove_all

    live = {entry.instance: entry for entry in client.discover()}
    wanted = [instance] if instance else sorted({*live, *known_instances()})
    stopped: list[str] = []
    removed: list[str] = []
    kept: list[str] = []
    for name in wanted:
        entry = live.get(name)
        if dead and not has_ended(name):
            kept.append(name)
            continue
        if entry is not None and _stop(entry):
            stopped.append(name)
        removed += remove_all(name)
    if not instance:
        removed += remove_all(None, ended_only=dead)  # also what has no run directory any more
    if as_json:
        output.emit_json({"stopped": stopped, "removed": removed, "kept": kept})
        return
    for name in stopped:
        output.line(f"stopped {output.plain(name)}")
    for trace in removed:
        output.line(f"removed {output.plain(trace)}")
    for name in kept:
        output.line(f"kept {output.plain(name)}: it is running")
    if not stopped and not removed and not kept:
        output.line("nothing to remove")


def _stop(entry: Instance) -> bool:
    """Ask a live agent to stop and wait for it; True where it has."""
    try:
        with ControlClient(entry.path) as connection:
            connection.stop()
    except ControlError as error:
        output.error(f"instance {entry.instance} was not asked to stop: {error}", error.hint)
        return False
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while is_live(entry.path):
        if time.monotonic() > deadline:
            output.error(f"instance {entry.instance} does not stop", "it is killed")
            return False
        time.sleep(0.1)
    return True
