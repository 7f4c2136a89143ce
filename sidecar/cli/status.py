"""`sidecar status`: what runs on this host, and whether it is well."""

from __future__ import annotations

import os
import sys

import click
import msgspec

from sidecar.cli import output
from sidecar.cli.instances import each_client, instance_option, json_option
from sidecar.control.protocol import Status


@click.command()
@instance_option
@json_option
def status(instance: str | None, as_json: bool) -> None:
    """What is running, and whether it is well.

    Exit status 1: nothing runs, something is not well, or an instance died and left its hooks, which refuse what it
    steered (seen as root).
    """
    found = [connection.status() for _, connection in each_client(instance)]
    dead = left_behind({each.instance for each in found}) if instance is None else []
    if as_json:
        output.emit_json(
            {
                "instances": [
                    {**msgspec.to_builtins(each), "ok": not complaints(each), "complaints": complaints(each)}
                    for each in found
                ],
                "dead": dead,
            }
        )
    elif not found:
        output.line("nothing is running")
    for number, each in enumerate(found if not as_json else []):
        if number:
            output.line()
        for text in describe(each):
            output.line(output.plain(text))
    for name in dead if not as_json else []:
        output.line(
            f"DEAD  instance {output.plain(name)} died: what it steered is refused until an agent steers it again, or "
            "`sidecar down --dead` removes what is left"
        )
    sys.exit(0 if found and not dead and not any(complaints(each) for each in found) else 1)


def left_behind(live: set[str]) -> list[str]:
    """Instances that nobody runs any more and whose hooks and rules are still there: not those that answered. Only root can tell."""
    if os.geteuid() != 0:
        return []
    from sidecar.kernel import removal

    return [name for name in removal.known_instances() if name not in live and removal.has_ended(name)]


def complaints(status: Status) -> list[str]:
    """What is not well, in words."""
    found = []
    if not status.steering.ok:
        found.append("steering is not in the state that was written")
    if not status.workers:
        found.append("no worker runs")
    if not status.spool.ok:
        found.append(
            (
                "records are lost (audit.on_full: drop): "
                if status.spool.dropping
                else "new requests are blocked: "
            )
            + (status.spool.blocked_reason or "the audit spool is not writable")
        )
    if status.policy.error:
        found.append(
            f"the policy file is broken, revision {status.policy.revision} stays in force: "
            f"{status.policy.error}"
        )
    if not status.shipping.ok:
        found.append(f"records are not shipped: {status.shipping.error or 'the collector does not answer'}")
    if status.identity.error:
        found.append(f"identity: {status.identity.error}")
    return found


def describe(status: Status) -> list[str]:
    """One instance in lines of `name  value`."""
    policy, spool, shipping, steering, identity = (
        status.policy,
        status.spool,
        status.shipping,
        status.steering,
        status.identity,
    )
    rows: list[tuple[str, str]] = [
        ("instance", f"{status.instance}  {status.mode}, pid {status.pid}, sidecar {status.version}"),
        ("since", f"{output.clock(status.started_ns)} ({output.age(status.started_ns)})"),
    ]
    if status.command:
        rows.append(("command", " ".join(status.command)))
    ports = ", ".join(f"{port} {protocol}" for port, protocol in sorted(status.ports.items()))
    rows += [
        ("steers", f"{', '.join(status.scope) or '-'}: {ports or 'no port'}"),
        (
            "steering",
            f"{'as written' if steering.ok else 'NOT AS WRITTEN'}, on failure {steering.on_failure}, "
            f"{steering.drift_count} foreign changes, {steering.refused} refused",
        ),
        (
            "policy",
            f"{policy.file or 'built in: allow, record everything'}, revision {policy.revision or '-'}",
        ),
        ("", f"{policy.rules} rules enforced, {policy.observing} only observing"),
        ("flows", f"{status.flows} open, {status.holds} held"),
        (
            "workers",
            ", ".join(
                f"pid {w.pid} ({w.flows} flows, {output.size(w.rss_bytes)}, {w.restarts} restarts)"
                for w in status.workers
            )
            or "none",
        ),
        (
            "identity",
            f"{'required' if identity.required else 'optional'}, {identity.verified} verified, "
            f"{identity.failed} failed, {identity.absent} without a token; issuers: {', '.join(identity.issuers) or 'none'}",
        ),
        (
            "audit",
            f"{spool.directory or '-'}, {output.size(spool.used_bytes)} used, "
            f"{output.size(spool.unshipped_bytes)} not shipped",
        ),
        ("collector", status.collector or shipping.url or "none"),
    ]
    if status.gaps:
        rows.append(("gaps", ", ".join(f"{name} {count}" for name, count in sorted(status.gaps.items()))))
    rows += [("not covered", text) for text in status.limitations]
    rows += [
        (f"drift {d.name}", d.detail + ("" if d.repaired else " (NOT REPAIRED)")) for d in steering.drifts
    ]
    rows += [("NOT WELL", text) for text in complaints(status)]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]
