"""`sidecar approvals`: the statements that wait for a decision, and the decisions."""

from __future__ import annotations

import os
import time

import click
import msgspec

from sidecar.cli import output
from sidecar.cli.instances import json_option, live_instances
from sidecar.control.client import Approvals
from sidecar.control.protocol import HoldView
from sidecar.model.ids import short_id

reason_option = click.option("--reason", default="", help="Kept in the record and shown to the client.")


@click.group()
def approvals() -> None:
    """Statements that wait for a decision.

    An approval covers exactly one text with its parameters, target and principal, once. A job cannot approve
    itself.
    """


@approvals.command("list")
@click.option("--all", "with_finished", is_flag=True, help="Decided, expired and withdrawn ones too.")
@json_option
def list_(with_finished: bool, as_json: bool) -> None:
    """The holds that you may decide."""
    views = [view for view in Approvals().views() if with_finished or view.state == "pending"]
    views.sort(key=lambda view: view.opened_ns)
    if as_json:
        output.emit_json({"holds": [msgspec.to_builtins(view) for view in views]})
    elif not views:
        output.line("nothing waits for a decision")
        if not live_instances():
            output.note("nothing is running")
        elif os.geteuid() != 0:
            output.note("hint: what only others may decide is not shown; root sees all")
    else:
        output.console().print(
            output.table(
                ["=id", "state", ">waits", ">left", "rule", "target", "process", "statement"],
                [
                    (
                        short_id(view.id),
                        view.state,
                        output.age(view.opened_ns),
                        output.duration(view.expires_ns - time.time_ns()) if view.state == "pending" else "-",
                        view.rule,
                        view.target,
                        view.process,
                        view.statement,
                    )
                    for view in views
                ],
            )
        )


@approvals.command()
@click.argument("hold_id", metavar="ID")
@json_option
def show(hold_id: str, as_json: bool) -> None:
    """One hold in full.

    What exactly would run, for whom, and who may decide.
    """
    _print(Approvals().find(hold_id), as_json)


@approvals.command()
@click.argument("hold_id", metavar="ID")
@reason_option
@json_option
def approve(hold_id: str, reason: str, as_json: bool) -> None:
    """Let it run, once."""
    _decided(Approvals().decide_view(hold_id, True, reason=reason), as_json)


@approvals.command()
@click.argument("hold_id", metavar="ID")
@reason_option
@json_option
def reject(hold_id: str, reason: str, as_json: bool) -> None:
    """Refuse it; the client gets an error in its own protocol."""
    _decided(Approvals().decide_view(hold_id, False, reason=reason), as_json)


def _decided(view: HoldView, as_json: bool) -> None:
    if as_json:
        output.emit_json(msgspec.to_builtins(view))
    else:
        by = f" by {view.decided_by}" if view.decided_by else ""
        output.line(output.plain(f"{short_id(view.id)} {view.state}{by}: {view.statement}"))


def _print(view: HoldView, as_json: bool) -> None:
    if as_json:
        output.emit_json(msgspec.to_builtins(view))
        return
    rows = [
        ("hold", f"{view.id}  ({short_id(view.id)})"),
        ("state", view.state + (f", by {view.decided_by}" if view.decided_by else "")),
        ("rule", f"{view.rule}: {view.reason}" if view.reason else view.rule),
        ("opened", f"{output.clock(view.opened_ns)} ({output.age(view.opened_ns)} ago)"),
        ("expires", output.clock(view.expires_ns)),
        ("may decide", ", ".join(dict.fromkeys(("root", *(view.by or ("group sidecar",)))))),
        ("target", view.target),
        ("principal", view.principal or "none"),
        ("process", view.process),
        ("instance", view.instance),
        ("digest", view.digest or "-"),
    ]
    if view.decision_reason:
        rows.append(("said", view.decision_reason))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        output.line(f"{name:<{width}}  {output.plain(value)}")
    output.line()
    output.line(output.plain(view.statement, newlines=True))
    for number, value in enumerate(view.parameters or (), 1):
        output.line(f"  ${number} = {output.plain(value)}")
