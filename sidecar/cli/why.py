"""`sidecar why`: for whoever got an error: the rule, the facts that decided, the owner, what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from sidecar.cli import output
from sidecar.cli.instances import each_client, json_option
from sidecar.cli.options import config_option
from sidecar.control.client import MIN_SHORT_ID
from sidecar.errors import AuditError, ControlError, PrerequisiteError
from sidecar.model.ids import short_id

NO_NAME: Final = "its address alone; a rule that denies, masks or holds for some host name applies as well"
MAX_TEXT_CHARS: Final = 2000


@click.command()
@click.argument("record_id", metavar="ID")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False, readable=False),
    help="Audit directory to read where no agent runs; default: the configuration's.",
)
@config_option
@json_option
def why(record_id: str, directory: Path | None, config_file: Path | None, as_json: bool) -> None:
    """Why a statement or request was refused, held or masked, and what to do.

    ID is what the error message says. Needs no privileges for records of your own jobs while an agent runs.
    """
    if len(record_id) < MIN_SHORT_ID:
        raise ControlError(f"an id has at least {MIN_SHORT_ID} digits", hint="the error message says it")
    record = _from_agents(record_id) if directory is None else None
    if record is None:
        record = _from_directory(record_id, directory, config_file)
    if as_json:
        output.emit_json({**explanation(record), "record": record})
        return
    for text in lines(record):
        output.line(output.plain(text))


def _from_agents(record_id: str) -> dict[str, Any] | None:
    for _, client in each_client():
        try:
            return client.why(record_id)
        except ControlError:
            continue  # another instance, or the directory, may know it
    return None


def _from_directory(record_id: str, directory: Path | None, config_file: Path | None) -> dict[str, Any]:
    from sidecar.audit.read import find_record

    if directory is None:
        from sidecar.config import load_config

        directory = Path(load_config(config_file).audit.directory)
    try:
        view = find_record(directory, record_id)
    except (PermissionError, PrerequisiteError) as error:
        raise ControlError(
            f"no running agent knows record {record_id}, and only root may read {directory}",
            hint=f"sudo sidecar why {record_id} --directory {directory}",
        ) from error
    if view is None:
        raise AuditError(
            f"no record {record_id} in {directory}",
            hint="is it another host's, or another configuration's? -c FILE or --directory DIR names where to look"
            if os.geteuid() == 0
            else f"an agent tells only what your own jobs did; of others: sudo sidecar why {record_id}",
        )
    return as_map(view)


def as_map(view: Any) -> dict[str, Any]:
    """A record view of any make as the map that was stored."""
    record = getattr(view, "record", view)
    found = record if isinstance(record, dict) else msgspec.to_builtins(record, builtin_types=(bytes,))
    return dict(found)


def explanation(record: dict[str, Any]) -> dict[str, Any]:
    """What decided, for `--json`: rule, text, facts, owner, what to do."""
    verdict = record.get("verdict") or {}
    return {
        "id": record.get("id"),
        "action": verdict.get("action"),
        "enforced": verdict.get("enforced", True),
        "would": verdict.get("would"),
        "rule": verdict.get("rule"),
        "reason": verdict.get("reason") or record.get("detail") or "",
        "policy": verdict.get("policy"),
        "owner": verdict.get("owner"),
        "severity": verdict.get("severity"),
        "tags": list(verdict.get("tags") or ()),
        "facts": facts(record),
        "advice": advice(record),
    }


def facts(record: dict[str, Any]) -> dict[str, str]:
    """The facts that rules look at, those that this record has."""
    target = record.get("target") or {}
    operation = record.get("operation") or {}
    origin = record.get("origin") or {}
    workload = record.get("workload") or {}
    principal = record.get("principal") or {}
    ci, container = workload.get("ci") or {}, workload.get("container") or {}
    found = {
        "protocol": target.get("protocol"),
        "host": f"{target['host']}:{target.get('port', '')}" if target.get("host") else None,
        "host known from": NO_NAME if target.get("host_source") == "address" else target.get("host_source"),
        "database": target.get("database"),
        "user": target.get("user"),
        "statement": ", ".join(operation.get("statements") or ()) or operation.get("method"),
        "path": operation.get("path"),
        "objects": ", ".join(f"{o['name']} ({o['access']})" for o in operation.get("objects") or ()),
        "text": _text(operation),
        "principal": principal.get("subject"),
        "issuer": principal.get("issuer"),
        "no principal": _identity_reason(record.get("identity_error")),
        "process": " ".join(
            str(part) for part in (origin.get("exe"), _prefixed("pid", origin.get("pid"))) if part
        ),
        "uid": origin.get("uid"),
        "cgroup": workload.get("cgroup") or origin.get("cgroup"),
        "ci job": " ".join(
            str(part)
            for part in (ci.get("provider"), ci.get("repository"), ci.get("job"), ci.get("step"))
            if part
        ),
        "container": " ".join(
            str(part)
            for part in (container.get("name") or container.get("id", "")[:12], container.get("image"))
            if part
        ),
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def _prefixed(name: str, value: object) -> str:
    return f"{name} {value}" if value is not None else ""


def _identity_reason(word: str | None) -> str | None:
    """The word of the closed vocabulary, and what it means."""
    if word is None:
        return None
    from sidecar.identity.verify import REASONS

    return f"{word}: {REASONS[word]}" if word in REASONS else word


def _text(operation: dict[str, Any]) -> str:
    text = operation.get("text")
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    if not text:
        return ""
    cut = text if len(text) <= MAX_TEXT_CHARS else text[:MAX_TEXT_CHARS] + "…"
    return (
        f"{cut} (cut; {operation.get('text_bytes')} bytes in all)" if operation.get("truncated") else str(cut)
    )


def advice(record: dict[str, Any]) -> str:
    """What to do about it, in one sentence."""
    verdict = record.get("verdict") or {}
    owner = verdict.get("owner")
    ask = f"ask {owner}, who owns the rule" if owner else "ask whoever keeps this host's policy"
    rule = verdict.get("rule")
    hold = record.get("hold") or {}
    state = hold.get("state", "pending") if hold else None
    if state == "approved":
        return f"it was approved{' by ' + hold['by'] if hold.get('by') else ''}, for this once; it ran"
    if state == "expired":
        return f"nobody decided in time: run it again while an approver is there, or {ask}"
    if state == "rejected":
        return f"it was rejected{' by ' + hold['by'] if hold.get('by') else ''}: {ask}"
    if state == "pending":
        return f"it waits for a decision: sidecar approvals show {short_id(str(hold.get('id', '')))}"
    if rule == "identity.required":
        return (
            "give the job a token that verifies (no token: set the variable or file that identity.sources "
            "names; otherwise see the reason above)"
        )
    match verdict.get("action"):
        case "deny":
            return f"change it as the rule says, or {ask}"
        case "hold":
            return f"it needs an approval: have somebody at hand who may decide, or {ask}"
        case "mask":
            return f"it ran; values are masked in what came back. To see them, {ask}"
        case "invalid":
            return "the server's own grammar rejects the statement: correct it"
        case "allow":
            return "it was allowed; an error came from the server itself, or from the connection to it"
    if record.get("kind") == "close":
        return "see the reason in docs/operations.md, and `sidecar status`"
    return "nothing to do"


def lines(record: dict[str, Any]) -> list[str]:
    """For people: what happened, why, and what to do."""
    found = explanation(record)
    rule = found["rule"] or ("the policy's default" if found["action"] else None)
    head: list[tuple[str, str]] = [
        (
            "record",
            f"{record.get('id')}  {record.get('kind')}, {output.clock(int(record.get('ts_ns') or 0))}",
        ),
    ]
    if found["action"]:
        head.append(("decision", str(found["action"]) + ("" if found["enforced"] else " (only observed)")))
    if found["would"]:
        head.append(("would", f"{found['would']} (an observing rule; it decides nothing yet)"))
    if rule:
        head.append(("rule", f"{rule}" + (f", policy {found['policy']}" if found["policy"] else "")))
    if found["reason"]:
        head.append(("says", str(found["reason"])))
    hold = record.get("hold") or {}
    if hold:
        said = " ".join(
            (
                short_id(str(hold.get("id", ""))),
                str(hold.get("state", "pending")),
                f"by {hold['by']}" if hold.get("by") else "",
                f"({hold['reason']})" if hold.get("by") and hold.get("reason") else "",
            )
        )
        head.append(("hold", " ".join(said.split())))
    if record.get("reason"):
        head.append(("ended", str(record["reason"])))
    if found["owner"]:
        head.append(("owner", str(found["owner"])))
    head += [("because", f"{name}: {value}") for name, value in found["facts"].items()]
    head.append(("do", str(found["advice"])))
    width = max(len(name) for name, _ in head)
    return [f"{name:<{width}}  {value}" for name, value in head]
