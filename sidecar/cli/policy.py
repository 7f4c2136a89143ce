"""`sidecar policy`: validate, run the document's tests, explain a decision offline."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import urlsplit

import click
import orjson

from sidecar.errors import ConfigurationError
from sidecar.policy import Policy, builtin_policy, load_policy
from sidecar.policy import explain as explaining
from sidecar.policy.document import Given

WORDS = {True: "yes", False: "no", None: "unknown"}
CHECK_KEY = b"only for checking: masks are not applied here"


def _load(file: Path) -> Policy:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"the policy cannot be read: {error.strerror}", file=str(file)) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            "the policy is no UTF-8 text",
            file=str(file),
            line=error.object.count(b"\n", 0, error.start) + 1,
            hint="save it as UTF-8",
        ) from error
    return load_policy(text, str(file), hash_key=CHECK_KEY)


_file = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
_json = click.option("--json", "as_json", is_flag=True)


@click.group()
def policy() -> None:
    """Validate, test and explain policy documents."""


@policy.command()
@_file
@_json
def check(file: Path, as_json: bool) -> None:
    """Validate FILE: exit 2 with file, line and the nearest valid name where it is wrong."""
    found = _load(file)
    if as_json:
        click.echo(
            orjson.dumps(
                {
                    "ok": True,
                    "revision": found.revision,
                    "rules": len(found.rules),
                    "warnings": found.warnings,
                }
            )
        )
        return
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"ok: {len(found.rules)} rules, {len(found.document.tests)} tests, revision {found.revision}")


@policy.command()
@_file
@_json
def test(file: Path, as_json: bool) -> None:
    """Run the cases written beside the rules: exit 1 where one does not hold."""
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
@click.option("--statement", help="SQL to judge.")
@click.option("--method", help="HTTP method to judge, with --url.")
@click.option("--url", help="HTTP address to judge.")
@click.option("--protocol", type=click.Choice(["postgres", "http", "opaque"]))
@click.option("--host")
@click.option("--port", type=int)
@click.option("--database")
@click.option("--user")
@click.option("--subject", help="The principal's subject.")
@click.option("--issuer", default="", help="The principal's issuer.")
@_json
def explain(
    file: Path | None,
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
    """Which rule decides a statement or request, and why. Nothing is sent anywhere."""
    if statement is None and url is None and method is None and protocol is None:
        raise click.UsageError("give --statement, or --method and --url, or --protocol")
    if file is None:
        from sidecar.config import load_config

        file = load_config(None).policy
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
        click.echo("not known here: " + ", ".join(outcome.needs))
