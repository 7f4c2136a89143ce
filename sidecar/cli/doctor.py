"""`sidecar doctor`: each prerequisite, with its fix."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import click

from sidecar.cli import output
from sidecar.cli.instances import json_option
from sidecar.cli.options import config_option
from sidecar.errors import IdentityError, SidecarError

if TYPE_CHECKING:
    from sidecar.config import Config

NOT_CHECKED_WITHOUT_ROOT: Final = (
    "bpf hooks and nftables: only root may try them",
    "the local authority, and who trusts it: its key is root's",
)

KEYS_TIMEOUT_S: Final = 6.0


class Check(Protocol):
    """As `kernel.capabilities.Check`."""

    @property
    def name(self) -> str: ...
    @property
    def ok(self) -> bool: ...
    @property
    def detail(self) -> str: ...
    @property
    def hint(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class OwnCheck:
    name: str
    ok: bool
    detail: str
    hint: str | None = None


@click.command()
@config_option
@json_option
def doctor(config_file: Path | None, as_json: bool) -> None:
    """Each prerequisite, with its fix. Exit status 3 where one is missing."""
    from sidecar.kernel.capabilities import probe

    logging.getLogger("sidecar.identity").setLevel(logging.ERROR)  # what it would warn of is a row here
    checks: list[Check] = [*probe(), *own_checks(config_file)]
    well = all(check.ok for check in checks)
    not_checked = NOT_CHECKED_WITHOUT_ROOT if os.geteuid() != 0 else ()
    if as_json:
        output.emit_json(
            {
                "ok": well,
                "checks": [
                    {"name": check.name, "ok": check.ok, "detail": check.detail, "hint": check.hint}
                    for check in checks
                ],
                "not_checked": not_checked,
            }
        )
    else:
        for text in describe(checks):
            output.line(output.plain(text))
        for text in not_checked:
            output.line(f"not checked: {text}")
    sys.exit(0 if well else 3)


def describe(checks: Sequence[Check]) -> list[str]:
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{'ok     ' if check.ok else 'MISSING'}  {check.name:<{width}}  {check.detail}")
        if not check.ok and check.hint:
            lines.append(f"{'':9}{'':{width}}  hint: {check.hint}")
    return lines


def own_checks(config_file: Path | None) -> list[OwnCheck]:
    """What the kernel's probe does not look at: configuration, policy, audit directory."""
    from sidecar.config import load_config

    try:
        config = load_config(config_file)
    except SidecarError as error:
        return [OwnCheck("configuration", False, str(error), error.hint)]
    where = str(config.file) if config.file else "built in (no /etc/sidecar/sidecar.yaml)"
    return [
        OwnCheck("configuration", True, where),
        *_secrets(config),
        _policy(config),
        *(issuer_keys(issuer.issuer, issuer.jwks) for issuer in config.identity.issuers),
        audit_directory(Path(config.audit.directory)),
        short_way(),
        *(client_trust(config) if os.geteuid() == 0 else ()),
    ]


def _secrets(config: Config) -> list[OwnCheck]:
    """The files of secrets that the configuration names; what is in them is not shown."""
    named = {
        "masks.hash_key": config.hash_key_file,
        "upstream.token": config.upstream.token if config.upstream else None,
    }
    found = []
    for name, secret in named.items():
        if secret is None:
            continue
        try:
            secret.read()
        except SidecarError as error:
            found.append(OwnCheck("secret", False, f"{name}: {error}", error.hint))
        else:
            found.append(OwnCheck("secret", True, f"{name}: {secret.file}"))
    return found


def _policy(config: Config) -> OwnCheck:
    """Loaded as `run` would load it, with the key that masks hash with."""
    path = config.policy
    if path is None:
        return OwnCheck("policy", True, "built in: allow, record everything")
    from sidecar.proxy.policy_file import PolicySource

    try:
        PolicySource(path, hash_key=config.hash_key(), upstream=config.upstream is not None).load()
    except SidecarError as error:
        return OwnCheck("policy", False, str(error), error.hint or f"sidecar policy check {path}")
    return OwnCheck("policy", True, str(path))


def _names_hosts(config: Config) -> bool:
    """Whether a rule of the policy names a host: TLS to it is opened. A policy that does not load has a row of its own."""
    from sidecar.proxy.policy_file import PolicySource

    if config.policy is None:
        return False
    try:
        source = PolicySource(config.policy, hash_key=config.hash_key(), upstream=config.upstream is not None)
        source.load()
    except SidecarError:
        return False
    return bool(source.policy.named_hosts)


def issuer_keys(issuer: str, jwks: str | None) -> OwnCheck:
    """Whether the keys that tokens are verified with can be read, the way the agent reads them."""
    from sidecar.identity.keys import KeySet

    try:
        KeySet(jwks, issuer).candidates(None, "ES256", wait_s=KEYS_TIMEOUT_S)
    except IdentityError as error:
        if error.reason == "keys_unavailable":
            return OwnCheck(
                "identity", False, f"{issuer}: {error}", "correct jwks of that issuer in identity.issuers"
            )
        # Keys are there; whether one fits is up to the token.
    return OwnCheck(
        "identity", True, f"{issuer}: keys read from {jwks or 'where its discovery document says'}"
    )


def short_way() -> OwnCheck:
    """Whether the fast lane of PostgreSQL sessions was compiled. Without it nothing is missing but speed, so this never fails."""
    from sidecar.session.postgres_lane import COMPILED

    found = (
        "compiled"
        if COMPILED
        else "not compiled: PostgreSQL statements cost about twice as much; see docs/operations.md"
    )
    return OwnCheck("PostgreSQL fast lane", True, found)


def client_trust(config: Config) -> list[OwnCheck]:
    """Whether the client runtimes of this host accept what the local authority signs. Missing only where TLS is opened."""
    from sidecar.tls.authority import CERTIFICATE_FILE, Authority
    from sidecar.tls.verdicts import verdicts

    settings = config.authority
    opens = config.opens_tls() or _names_hosts(config)
    if not (settings.directory / CERTIFICATE_FILE).exists():
        return [
            OwnCheck(
                "local authority", True, f"not made yet, in {settings.directory}: sidecar ca install makes it"
            )
        ]
    try:
        authority = Authority.open(
            settings.directory, leaf_lifetime_s=settings.leaf_lifetime_s, permitted=settings.permitted
        )
        found = verdicts(authority)
    except SidecarError as error:
        return [OwnCheck("local authority", False, str(error), error.hint)]
    return [
        OwnCheck(
            "local authority", True, f"{settings.directory}: {authority.certificate.subject.rfc4514_string()}"
        ),
        *(
            OwnCheck(
                "client trust",
                verdict.told is not False or not opens,
                f"{verdict.runtime}: {verdict.detail}",
                "sidecar ca install; docs/tls.md",
            )
            for verdict in found
        ),
    ]


def audit_directory(directory: Path) -> OwnCheck:
    """Whether records can be written there: tried, in the directory or in the nearest one that exists."""
    nearest = directory
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".sidecar-doctor-") as trial:
            trial.write(b"x")
            trial.flush()
            os.fdatasync(trial.fileno())
        free = os.statvfs(nearest)
    except OSError as error:
        return OwnCheck(
            "audit directory",
            False,
            f"{directory}: {error.strerror}",
            "as root, on a file system that is writable and not full; or set audit.directory",
        )
    made = "writable" if nearest == directory else f"can be made in {nearest}"
    return OwnCheck(
        "audit directory", True, f"{directory}: {made}, {output.size(free.f_bavail * free.f_frsize)} free"
    )
