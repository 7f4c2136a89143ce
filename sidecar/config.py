"""The configuration (design, section 2): typed and frozen, with the contract's names and defaults.

Reads sidecar.yaml (`config_document` is its shape, `config_checks` its rules) and answers which declared
target a destination is. docs/configuration.md explains each setting.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from sidecar.config_checks import Checker, is_address
from sidecar.config_document import (
    AttachDocument,
    CgroupScope,
    ConfigurationDocument,
    EnvSource,
    FileSource,
    IdentityDocument,
    IssuerDocument,
    SecretFile,
    SourceDocument,
    TargetDocument,
    TlsDocument,
)
from sidecar.documents import load_document, parse_duration, parse_size, read_document
from sidecar.errors import ConfigurationError
from sidecar.model.secret import Secret

MAX_AUTHORITIES_BYTES: Final = 3 * 1024 * 1024
"""They go to the workers in one message."""
DEFAULT_FILE: Final = Path("/etc/sidecar/sidecar.yaml")


class Scope(msgspec.Struct, frozen=True):
    """`kind` is `all`, `exec` or `cgroups`; `cgroups` are paths from the hierarchy's root."""

    kind: str
    cgroups: tuple[str, ...] = ()


class Steering(msgspec.Struct, frozen=True):
    scope: Scope
    containers: bool
    ports: dict[int, str]
    exclude: tuple[str, ...]
    decrypt: str
    on_failure: str


class Identity(msgspec.Struct, frozen=True):
    required: bool
    sources: tuple[SourceDocument, ...]
    issuers: tuple[IssuerDocument, ...]
    """`jwks` is an address, an absolute path, or None: by discovery."""
    attach: AttachDocument
    max_age_s: float | None


class Attribution(msgspec.Struct, frozen=True):
    engines: tuple[str, ...]
    """Addresses of container engines: `unix:///path`."""


class Requests(msgspec.Struct, frozen=True):
    max_bytes: int


class Responses(msgspec.Struct, frozen=True):
    max_rows: int
    max_bytes: int


class Audit(msgspec.Struct, frozen=True):
    directory: Path
    max_bytes: int
    on_full: str
    sync: str
    requests: Requests
    responses: Responses


class AuthorityConfig(msgspec.Struct, frozen=True):
    """The local certificate authority. `permitted`: domains, addresses and CIDRs that it may vouch for; empty is all."""

    directory: Path
    lifetime_s: float
    leaf_lifetime_s: float
    permitted: tuple[str, ...]


class TargetConfig(msgspec.Struct, frozen=True):
    """A destination that the configuration knows. `host` is a name, a wildcard (`*.internal`), an address or
    a CIDR, in lower case; `protocol` is None where the port decides, and `opaque` where its TLS passes
    through."""

    name: str
    host: str
    port: int | None = None
    protocol: str | None = None
    tls: TlsDocument | None = None
    pooler: str | None = None

    def matches(self, address: str, port: int, names: Iterable[str]) -> bool:
        """`names` are those that the address is known by, in lower case."""
        if self.port is not None and port != self.port:
            return False
        if "/" in self.host or is_address(self.host):
            return ipaddress.ip_address(address) in ipaddress.ip_network(self.host)
        if self.host.startswith("*."):
            return any(name.endswith(self.host[1:]) for name in names)
        return self.host in names


class Upstream(msgspec.Struct, frozen=True):
    url: str
    token: SecretFile | None = None

    def read_token(self) -> Secret | None:
        """Raises ConfigurationError."""
        return self.token.read() if self.token else None


class Config(msgspec.Struct, frozen=True):
    """The whole configuration. `file` is None for the built-in defaults. All paths are absolute."""

    file: Path | None
    steering: Steering
    identity: Identity
    attribution: Attribution
    targets: tuple[TargetConfig, ...]
    policy: Path | None
    audit: Audit
    upstream: Upstream | None
    hash_key_file: SecretFile | None
    authority: AuthorityConfig

    def hash_key(self) -> bytes | None:
        """The key of the mask `hash`. Raises ConfigurationError."""
        return self.hash_key_file.read().reveal().encode() if self.hash_key_file else None

    def read_authorities(self) -> dict[str, str]:
        """The PEM text of each target's `tls.ca`, by the file's name. Raises ConfigurationError."""
        found: dict[str, str] = {}
        for target in self.targets:
            ca = target.tls.ca if target.tls else None
            if ca is None or ca in found:
                continue
            try:
                text = Path(ca).read_text("ascii")
                ssl.create_default_context(cadata=text)
            except (OSError, UnicodeDecodeError) as error:  # ssl.SSLError is an OSError
                raise ConfigurationError(
                    f"the certificates in {ca}, for target {target.name}, cannot be read: {error}",
                    file=str(self.file) if self.file else None,
                    hint="tls.ca is a file of PEM certificates",
                ) from error
            found[ca] = text
        if sum(map(len, found.values())) > MAX_AUTHORITIES_BYTES:
            raise ConfigurationError(
                f"the targets' certificates are more than {MAX_AUTHORITIES_BYTES} bytes together"
            )
        return found

    def opens_tls(self) -> bool:
        """Whether the configuration alone makes the inspector open TLS: all of it, or that of a declared target."""
        if self.steering.decrypt == "all":
            return True
        ports = self.steering.ports
        return any(
            self.opens(target, target.protocol or (ports.get(target.port, "auto") if target.port else "auto"))
            for target in self.targets
        )

    def host_names(self) -> tuple[str, ...]:
        """Exact names of targets, for forward resolution."""
        return tuple(
            target.host
            for target in self.targets
            if "/" not in target.host and "*" not in target.host and not is_address(target.host)
        )

    def target_for(self, address: str, port: int, names: Iterable[str]) -> TargetConfig | None:
        """The first declared target that this destination is. `names` are all that the address is known
        by."""
        known = tuple(name.lower().rstrip(".") for name in names)
        return next((target for target in self.targets if target.matches(address, port, known)), None)

    def opens(self, target: TargetConfig | None, protocol: str) -> bool:
        """Whether TLS to a destination is opened for the configuration's sake; a rule may want it besides. `protocol` is the
        destination's: TLS of PostgreSQL is not meant, whose clients have no store of authorities that they take for granted."""
        if protocol not in ("http", "auto"):
            return False
        if target is None:
            return self.steering.decrypt == "all"
        return target.tls is None or target.tls.mode not in ("passthrough", "disable")

    def limitations(self) -> tuple[str, ...]:
        """What is not covered, for `status` and `doctor`."""
        found = ["HTTP/2 and PostgreSQL inside TLS are not inspected in this version"]
        if not self.steering.containers:
            found.append(
                "steering.containers is false: connections of bridge-networked containers are recorded as gaps "
                "(run) or refused (exec)"
            )
        if self.steering.on_failure == "open":
            found.append(
                "steering.on_failure is open: while no inspector listens, connections pass uninspected"
            )
        if self.identity.sources and not self.identity.issuers:
            found.append("identity.issuers is empty: tokens are found, but none can be verified")
        found += [
            f"target {target.name}: port {target.port} is not in steering.ports, so it is not steered"
            for target in self.targets
            if target.port is not None and target.port not in self.steering.ports
        ]
        return tuple(found)


def load_config(path: Path | None) -> Config:
    """Read a configuration; None: /etc/sidecar/sidecar.yaml where it exists, else the defaults.

    Raises ConfigurationError with file, line and the nearest valid name.
    """
    try:
        return _load(path)
    except ConfigurationError as error:
        error.hint = error.hint or "docs/configuration.md lists every setting with its values"
        raise


def _load(path: Path | None) -> Config:
    if path is None:
        if not DEFAULT_FILE.is_file():
            return _typed(ConfigurationDocument(), None)
        path = DEFAULT_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"the configuration cannot be read: {error.strerror}",
            file=str(path),
            hint="-c names the file; without it, /etc/sidecar/sidecar.yaml or the defaults count",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            "the configuration is no UTF-8 text",
            file=str(path),
            line=error.object[: error.start].count(b"\n") + 1,
            hint="save it as UTF-8",
        ) from error
    data, lines = read_document(text, str(path))
    if isinstance(data, dict) and "rules" in data:
        raise ConfigurationError(
            "this is a policy, not a configuration",
            file=str(path),
            line=lines[("rules",)],
            hint="give it with --policy, or name it in the configuration: policy: FILE",
        )
    check = Checker(lines, path)
    check.refuse_unbuilt()
    check.ports(data)
    document = load_document(text, str(path), ConfigurationDocument) if data else ConfigurationDocument()
    check.document(document)
    return _typed(document, path)


def _typed(document: ConfigurationDocument, file: Path | None) -> Config:
    """A document that was checked. Relative paths are meant from the file's own directory."""
    base = file.resolve().parent if file else Path("/")
    steering, audit = document.steering, document.audit
    return Config(
        file=file,
        steering=Steering(
            scope=(
                Scope("cgroups", steering.scope.cgroups)
                if isinstance(steering.scope, CgroupScope)
                else Scope(str(steering.scope))
            ),
            containers=steering.containers,
            ports=dict(steering.ports),
            exclude=steering.exclude,
            decrypt=steering.decrypt,
            on_failure=steering.on_failure,
        ),
        identity=_identity(document.identity, base),
        attribution=Attribution(document.attribution.engines),
        targets=tuple(_target(target, base) for target in document.targets),
        policy=base / document.policy if document.policy else None,
        audit=Audit(
            directory=base / audit.directory,
            max_bytes=parse_size(audit.max_bytes),
            on_full=audit.on_full,
            sync=audit.sync,
            requests=Requests(parse_size(audit.requests.max_bytes)),
            responses=Responses(audit.responses.max_rows, parse_size(audit.responses.max_bytes)),
        ),
        upstream=(
            Upstream(document.upstream.url.rstrip("/"), _secret(document.upstream.token, base))
            if document.upstream
            else None
        ),
        hash_key_file=_secret(document.masks.hash_key, base),
        authority=AuthorityConfig(
            directory=base / document.tls.authority.directory,
            lifetime_s=parse_duration(document.tls.authority.lifetime),
            leaf_lifetime_s=parse_duration(document.tls.authority.leaf_lifetime),
            permitted=document.tls.authority.permitted,
        ),
    )


def _identity(document: IdentityDocument, base: Path) -> Identity:
    return Identity(
        required=document.required,
        sources=document.sources,
        issuers=tuple(
            issuer
            if issuer.jwks is None or issuer.jwks.startswith(("http://", "https://"))
            else msgspec.structs.replace(issuer, jwks=str(base / issuer.jwks.removeprefix("file://")))
            for issuer in document.issuers
        ),
        attach=document.attach,
        max_age_s=parse_duration(document.max_age) if document.max_age is not None else None,
    )


def _target(document: TargetDocument, base: Path) -> TargetConfig:
    tls = document.tls
    if tls is not None and tls.ca is not None:
        tls = msgspec.structs.replace(tls, ca=str(base / tls.ca))
    passes = tls is not None and tls.mode == "passthrough"
    return TargetConfig(
        name=document.name,
        host=document.host.lower().rstrip("."),
        port=document.port,
        protocol="opaque" if passes else document.protocol,
        tls=tls,
        pooler=document.pooler,
    )


def _secret(secret: SecretFile | None, base: Path) -> SecretFile | None:
    return SecretFile(str(base / secret.file)) if secret else None


__all__ = [
    "DEFAULT_FILE",
    "AttachDocument",
    "Attribution",
    "Audit",
    "AuthorityConfig",
    "Config",
    "EnvSource",
    "FileSource",
    "Identity",
    "IssuerDocument",
    "Scope",
    "SecretFile",
    "SourceDocument",
    "Steering",
    "TargetConfig",
    "TlsDocument",
    "Upstream",
    "load_config",
]
