"""`sidecar ca`: the local certificate authority, and who trusts it."""

from __future__ import annotations

import datetime
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidecar.cli import output
from sidecar.cli.instances import json_option
from sidecar.cli.options import config_option
from sidecar.errors import PrerequisiteError, TrustError

if TYPE_CHECKING:
    from cryptography import x509

    from sidecar.config import AuthorityConfig
    from sidecar.tls.authority import Authority
    from sidecar.tls.trust import Report


@click.group()
def ca() -> None:
    """The local certificate authority: with its certificates the inspector opens TLS.

    Clients accept them once the authority is installed in their trust stores.
    """


@ca.command()
@config_option
@click.option("--pem", "as_pem", is_flag=True, help="Print the certificate alone.")
@json_option
def show(config_file: Path | None, as_pem: bool, as_json: bool) -> None:
    """The authority's certificate: fingerprint, validity, place, constraints. Exit status 3 where there is none, or it has expired."""
    from sidecar.tls import certificates
    from sidecar.tls.authority import check_validity

    settings = _settings(config_file)
    certificate = _certificate(settings.directory)
    if as_pem:
        click.echo(certificates.pem(certificate).decode(), nl=False)
    elif as_json:
        output.emit_json(described(certificate, settings.directory))
    else:
        for text in lines(described(certificate, settings.directory)):
            output.line(output.plain(text))
    check_validity(certificate, time.time_ns())


root_option = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/"),
    help="Another system's tree, such as an unpacked image; its own tools run in it, by chroot.",
)


@ca.command()
@config_option
@root_option
@json_option
def install(config_file: Path | None, root: Path, as_json: bool) -> None:
    """Make this host trust the authority: system store, Java keystores, and files for runtimes with stores of their own.

    The authority is made where there is none yet. What is there is appended to, never replaced. Exit status 1 where a store was passed
    over.
    """
    from sidecar.tls import trust
    from sidecar.tls.authority import Authority

    if os.geteuid() != 0:
        raise PrerequisiteError("trust stores are root's", hint="run it as root")
    settings = _settings(config_file)
    made = Authority.open(
        settings.directory,
        lifetime_s=settings.lifetime_s,
        leaf_lifetime_s=settings.leaf_lifetime_s,
        permitted=settings.permitted,
    )
    _report(trust.install(made.certificate_pem, root), as_json)


@ca.command()
@root_option
@json_option
def uninstall(root: Path, as_json: bool) -> None:
    """Undo `install`, byte for byte. The authority itself stays."""
    from sidecar.tls import trust

    _report(trust.uninstall(root), as_json)


def _report(report: Report, as_json: bool) -> None:
    if as_json:
        output.emit_json({"done": report.done, "failed": report.failed})
    else:
        for text in report.done:
            output.line(output.plain(text))
        for text in report.failed:
            output.note(f"not done: {output.plain(text)}")
    if report.failed:
        sys.exit(1)


@ca.command()
@config_option
@json_option
def regenerate(config_file: Path | None, as_json: bool) -> None:
    """Make a new authority in the place of the old one.

    Whoever trusts the old one does not trust the new one: `sidecar ca install` replaces it on this host, images and other places take
    it anew. Agents that run go on with the old one until they are started again.
    """
    from sidecar.tls.authority import Authority

    settings = _settings(config_file)
    made = Authority.regenerate(
        settings.directory,
        lifetime_s=settings.lifetime_s,
        leaf_lifetime_s=settings.leaf_lifetime_s,
        permitted=settings.permitted,
    )
    _print(made, settings.directory, as_json)
    output.note("hint: sidecar ca install; then start the agents again")


def described(certificate: x509.Certificate, directory: Path) -> dict[str, Any]:
    """Times are nanoseconds since the epoch; no `permitted` is everything."""
    from sidecar.tls import certificates
    from sidecar.tls.authority import CERTIFICATE_FILE

    return {
        "subject": certificate.subject.rfc4514_string(),
        "fingerprint_sha256": certificates.fingerprint(certificate),
        "not_before_ns": int(certificate.not_valid_before_utc.timestamp()) * 1_000_000_000,
        "not_after_ns": int(certificate.not_valid_after_utc.timestamp()) * 1_000_000_000,
        "path": str(directory / CERTIFICATE_FILE),
        "permitted": list(certificates.constraints_of(certificate).texts()),
        "in_system_store": _in_system_store(certificates.pem(certificate)),
    }


def lines(found: dict[str, Any]) -> list[str]:
    left_ns = found["not_after_ns"] - time.time_ns()
    return [
        f"authority    {found['subject']}",
        f"fingerprint  SHA-256 {found['fingerprint_sha256']}",
        f"valid        {_day(found['not_before_ns'])} to {_day(found['not_after_ns'])} UTC"
        + (f", {output.duration(left_ns)} left" if left_ns > 0 else ", EXPIRED"),
        f"vouches for  {', '.join(found['permitted']) or 'everything (tls.authority.permitted is not set)'}",
        f"certificate  {found['path']}",
        "trusted by   this host's system store"
        if found["in_system_store"]
        else "trusted by   nobody but `sidecar exec`: sidecar ca install, as root",
    ]


def _in_system_store(certificate_pem: bytes) -> bool:
    from sidecar.tls import bundles

    bundle = bundles.system_bundle()
    return bundle is not None and bundles.holds(bundles.read_bounded(bundle), certificate_pem)


def _day(moment_ns: int) -> str:
    return datetime.datetime.fromtimestamp(moment_ns / 1e9, tz=datetime.UTC).strftime("%Y-%m-%d")


def _settings(config_file: Path | None) -> AuthorityConfig:
    from sidecar.config import load_config

    return load_config(config_file).authority


def _certificate(directory: Path) -> x509.Certificate:
    from sidecar.tls.authority import read_certificate

    try:
        return read_certificate(directory)
    except FileNotFoundError:
        raise TrustError(
            f"there is no authority in {directory} yet", hint="sidecar ca install makes it, as root"
        ) from None


def _print(made: Authority, directory: Path, as_json: bool) -> None:
    if as_json:
        output.emit_json(described(made.certificate, directory))
        return
    for text in lines(described(made.certificate, directory)):
        output.line(output.plain(text))
