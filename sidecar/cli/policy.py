"""`sidecar policy`: validate, run the document's tests, explain a decision offline."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import click
import orjson

from sidecar.cli import output
from sidecar.cli.options import config_option
from sidecar.errors import ConfigurationError
from sidecar.policy import Policy, builtin_policy, load_policy
from sidecar.policy import explain as explaining
from sidecar.policy.document import Given

WORDS = {True: "yes", False: "no", None: "unknown"}
GIVABLE = ("host", "port", "database", "user")
CHECK_KEY = b"only for checking: masks are not applied here"


def _load(file: Path) -> Policy:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"the policy cannot be read: {error.strerror}",
            file=str(file),
            hint="examples/policy.yaml is one to begin with; docs/policy.md explains it",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            "the policy is no UTF-8 text",
            file=str(file),
            line=error.object.count(b"\n", 0, error.start) + 1,
            hint="save it as UTF-8",
        ) from error
    return load_policy(text, str(file), hash_key=CHECK_KEY)


_file = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def policy() -> None:
    """Validate, test and explain policy documents."""


@policy.command()
@_file
@_json
def check(file: Path, as_json: bool) -> None:
    """Validate FILE, with line numbers.

    Exit status 2 where it is wrong, with file, line and the nearest valid name. Warnings do not change it.
    """
    found = _load(file)
    warnings = (*found.warnings, *ended(found, datetime.datetime.now(datetime.UTC)))
    if as_json:
        click.echo(
            orjson.dumps(
                {
                    "ok": True,
                    "revision": found.revision,
                    "rules": len(found.rules),
                    "warnings": warnings,
                }
            )
        )
        return
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    counts = f"{_count(found.rules, 'rule')}, {_count(found.document.tests, 'test')}"
    click.echo(f"ok: {counts}, revision {found.revision}")


def _count(items: Sequence[object], name: str) -> str:
    return f"{len(items)} {name}" + ("" if len(items) == 1 else "s")


def ended(policy: Policy, now: datetime.datetime) -> list[str]:
    """Warnings for what has passed its `until`: it stands there and does nothing."""
    found = [
        f"rule `{rule.name}` has ended: until {rule.until}" for rule in policy.rules if _over(rule.until, now)
    ]
    return found + [
        f"rule `{rule.name}`: exception `{item.name}` has ended: until {item.until}"
        for rule in policy.rules
        for item in rule.exceptions
        if _over(item.until, now)
    ]


def _over(until: datetime.datetime | None, now: datetime.datetime) -> bool:
    return until is not None and until <= now


@policy.command()
@_file
@_json
def test(file: Path, as_json: bool) -> None:
    """Run the cases written beside the rules.

    Exit status 1 where one does not hold.
    """
    results = explaining.run_tests(_load(file))
    failed = [result for result in results if not result.ok]
    if as_json:
        click.echo(
            orjson.dumps(
                {
                    "ok": not failed,
                    "tests": [{"name": r.name, "ok": r.ok, "message": r.message} for r in results],
                }
            )
        )
    else:
        for result in results:
            click.echo(f"{'ok    ' if result.ok else 'FAILED'} {result.name}: {result.message}")
        click.echo(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


@policy.command()
@click.option(
    "--policy", "file", type=click.Path(path_type=Path, dir_okay=False), help="Default: the configuration's."
)
@config_option
@click.option("--statement", help="SQL to judge.")
@click.option("--method", help="HTTP method to judge, with --url.")
@click.option("--url", help="HTTP address to judge.")
@click.option(
    "--protocol", type=click.Choice(["postgres", "http", "opaque"]), help="Alone: judge the connection."
)
@click.option("--host", help="The destination's name or address.")
@click.option("--port", type=int, help="The destination's port.")
@click.option("--database", help="PostgreSQL's, from the start-up.")
@click.option("--user", help="PostgreSQL's, from the start-up.")
@click.option("--subject", help="The principal's subject.")
@click.option("--issuer", default="", help="The principal's issuer.")
@_json
def explain(
    file: Path | None,
    config_file: Path | None,
    statement: str | None,
    method: str | None,
    url: str | None,
    protocol: str | None,
    host: str | None,
    port: int | None,
    database: str | None,
    user: str | None,
    subject: str | None,
    issuer: str,
    as_json: bool,
) -> None:
    """Which rule decides a statement or request.

    And why: each rule with the answer of each of its selectors. Nothing is sent anywhere. What a rule asks for and
    is not given counts as unknown: deny, approve and mask fire on it, allow does not.
    """
    if statement is not None and (url is not None or method is not None):
        raise click.UsageError("give --statement, or --method and --url, not both")
    if statement is None and url is None and method is None and protocol is None:
        raise click.UsageError("give --statement, or --method and --url, or --protocol")
    read_from = None
    if file is None:
        from sidecar.config import load_config

        file = load_config(config_file).policy
        read_from = str(file or "built in: allow, record everything (--policy names another)")
    found = _load(file) if file else builtin_policy()
    path = None
    if url is not None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = host or parts.hostname, port or parts.port
        except ValueError as error:
            raise click.BadParameter(f"{url!r}: {error}", param_hint="--url") from error
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    kind = protocol or ("postgres" if statement is not None else "http")
    given = Given(
        protocol=kind,  # type: ignore[arg-type]
        host=host,
        port=port,
        database=database,
        user=user,
        statement=statement,
        method=method or ("GET" if url else None),
        path=path,
        principal={"issuer": issuer, "subject": subject} if subject else None,
    )
    if read_from is not None:
        output.note(f"policy: {read_from}")
    outcome = explaining.explain(found, *explaining.subject_of(given))
    verdict = outcome.verdict
    if as_json:
        click.echo(
            orjson.dumps(
                {
                    "action": verdict.action.value,
                    "rule": verdict.rule,
                    "reason": verdict.reason,
                    "masks": verdict.masks.rules,
                    "derived_masked": verdict.sql is not None and verdict.sql.masked_reach,
                    "would": verdict.would,
                    "needs": outcome.needs,
                    "rules": [
                        {
                            "rule": t.rule,
                            "action": t.action,
                            "matched": t.matched,
                            "selectors": dict(t.selectors),
                        }
                        for t in outcome.rules
                    ],
                }
            )
        )
        return
    click.echo(
        f"{verdict.action.value} by {verdict.rule or 'default'}"
        + (f": {verdict.reason}" if verdict.reason else "")
    )
    if verdict.would:
        click.echo(f"an observing rule would have decided {verdict.would}")
    if verdict.masks.rules:
        click.echo("masks of: " + ", ".join(verdict.masks.rules))
    if verdict.sql is not None and verdict.sql.masked_reach:
        click.echo("a masked column reaches a value that the statement makes: that is masked too")
    for trace in outcome.rules:
        shown = ", ".join(f"{name} {WORDS[answer]}" for name, answer in trace.selectors)
        click.echo(
            f"  {trace.rule} ({trace.action}): {WORDS[trace.matched]}" + (f"  [{shown}]" if shown else "")
        )
    if outcome.needs:
        options = [f"--{need}" for need in outcome.needs if need in GIVABLE]
        click.echo(
            "not known here: "
            + ", ".join(outcome.needs)
            + (f" (give {', '.join(options)})" if options else "")
        )
