"""The configuration (design, section 2): typed, frozen, with the contract's names and defaults. docs/configuration.md explains each.

What the contract names and this version does not do yet is refused with its line, never silently ignored.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

import msgspec

from sidecar.documents import load_document, parse_duration, parse_size, read_document
from sidecar.errors import ConfigurationError
from sidecar.model.secret import Secret

DEFAULT_FILE: Final = Path("/etc/sidecar/sidecar.yaml")
DEFAULT_AUDIT_DIRECTORY: Final = Path("/var/lib/sidecar/audit")
DEFAULT_PORTS: Final = {5432: "postgres", 80: "auto", 443: "auto", 8080: "auto"}
DEFAULT_EXCLUDE: Final = ("169.254.0.0/16",)
DEFAULT_ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
MAX_SECRET_BYTES: Final = 65_536
MAX_PORTS: Final = 1024

ProtocolName = Literal["postgres", "http", "auto", "opaque"]


class Struct(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    pass


class SecretFile(Struct, frozen=True):
    """`{file: PATH}`: the only way a secret enters the configuration."""

    file: str

    def read(self) -> Secret:
        """Raises ConfigurationError where it cannot be read, is empty, or others may read it."""
        try:
            facts = os.stat(self.file)
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_SECRET_BYTES:
                raise ConfigurationError(f"the secret in {self.file} is no small regular file")
            if facts.st_mode & 0o004:
                raise ConfigurationError(f"the secret in {self.file} can be read by everyone", hint=f"chmod 600 {self.file}")
            text = Path(self.file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"the secret in {self.file} cannot be read: {error}") from error
        if not text:
            raise ConfigurationError(f"the secret in {self.file} is empty")
        return Secret(text)


class CgroupScope(Struct, frozen=True):
    cgroups: tuple[str, ...]


class SteeringDocument(Struct, frozen=True):
    scope: Literal["all", "exec"] | CgroupScope = "all"
    containers: bool = True
    ports: dict[int, ProtocolName] = msgspec.field(default_factory=lambda: dict(DEFAULT_PORTS))  # type: ignore[arg-type]
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    decrypt: Literal["declared", "all"] = "declared"
    on_failure: Literal["closed", "open"] = "closed"


class EnvSource(Struct, frozen=True):
    name: str


class FileSource(Struct, frozen=True):
    path: str


class SourceDocument(Struct, frozen=True):
    env: EnvSource | None = None
    file: FileSource | None = None


class IssuerDocument(Struct, frozen=True):
    issuer: str
    audience: str | tuple[str, ...]
    jwks: str
    algorithms: tuple[str, ...] = DEFAULT_ALGORITHMS
    leeway: str | int = "30s"


class HttpAttach(Struct, frozen=True):
    header: str = "X-Workload-Identity"


class PostgresAttach(Struct, frozen=True):
    setting: str = "workload.identity"
    application_name: str | None = "{subject}"


class AttachDocument(Struct, frozen=True):
    http: HttpAttach = HttpAttach()
    postgres: PostgresAttach = PostgresAttach()


class IdentityDocument(Struct, frozen=True):
    required: bool = False
    sources: tuple[SourceDocument, ...] = ()
    issuers: tuple[IssuerDocument, ...] = ()
    attach: AttachDocument = AttachDocument()
    max_age: str | int | None = None


class TlsDocument(Struct, frozen=True):
    mode: Literal["disable", "require", "verify-ca", "verify-full", "passthrough"]
    ca: str | None = None


class TargetDocument(Struct, frozen=True):
    name: str
    host: str
    port: int | None = None
    protocol: ProtocolName | None = None
    tls: TlsDocument | None = None
    pooler: Literal["session", "transaction", "statement"] | None = None


class RequestsDocument(Struct, frozen=True):
    max_bytes: str | int = 65_536


class ResponsesDocument(Struct, frozen=True):
    max_rows: int = 100
    max_bytes: str | int = 65_536


class AuditDocument(Struct, frozen=True):
    directory: str = str(DEFAULT_AUDIT_DIRECTORY)
    max_bytes: str | int = "1GiB"
    on_full: Literal["block", "drop"] = "block"
    sync: Literal["group", "strict"] = "group"
    requests: RequestsDocument = RequestsDocument()
    responses: ResponsesDocument = ResponsesDocument()


class UpstreamDocument(Struct, frozen=True):
    url: str
    token: SecretFile | None = None


class MasksDocument(Struct, frozen=True):
    hash_key: SecretFile | None = None


class ConfigurationDocument(Struct, frozen=True):
    steering: SteeringDocument = SteeringDocument()
    identity: IdentityDocument = IdentityDocument()
    targets: tuple[TargetDocument, ...] = ()
    policy: str | None = None
    audit: AuditDocument = AuditDocument()
    upstream: UpstreamDocument | None = None
    masks: MasksDocument = MasksDocument()


NOT_YET: Final = {
    ("targets", "*", "credentials"): "injected credentials",
    ("identity", "sources", "*", "github_actions"): "the github_actions token source",
    ("identity", "sources", "*", "gitlab"): "the gitlab token source",
    ("identity", "sources", "*", "kubernetes"): "the kubernetes token source",
    ("identity", "sources", "*", "spiffe"): "the spiffe token source",
    ("identity", "sources", "*", "command"): "the command token source",
}
"""Of the contract, refused with a sentence of its own until it is built."""


class Requests(Struct, frozen=True):
    max_bytes: int


class Responses(Struct, frozen=True):
    max_rows: int
    max_bytes: int


class Scope(Struct, frozen=True):
    kind: str
    """`all`, `exec` or `cgroups`."""
    cgroups: tuple[str, ...] = ()


class Steering(Struct, frozen=True):
    scope: Scope
    containers: bool
    ports: dict[int, str]
    exclude: tuple[str, ...]
    decrypt: str
    on_failure: str


class Identity(Struct, frozen=True):
    required: bool
    sources: tuple[SourceDocument, ...]
    issuers: tuple[IssuerDocument, ...]
    attach: AttachDocument
    max_age_s: float | None


class Audit(Struct, frozen=True):
    directory: Path
    max_bytes: int
    on_full: str
    sync: str
    requests: Requests
    responses: Responses


class TargetConfig(Struct, frozen=True):
    name: str
    host: str
    """A name, a wildcard (`*.internal`) or a CIDR; lower case."""
    port: int | None = None
    protocol: str | None = None
    tls: TlsDocument | None = None
    pooler: str | None = None

    def matches(self, address: str, port: int, names: Iterable[str]) -> bool:
        if self.port is not None and port != self.port:
            return False
        if "/" in self.host or _is_address(self.host):
            return ipaddress.ip_address(address) in ipaddress.ip_network(self.host, strict=False)
        if self.host.startswith("*."):
            return any(name.endswith(self.host[1:]) for name in names)
        return self.host in names


class Upstream(Struct, frozen=True):
    url: str
    token: SecretFile | None = None

    def read_token(self) -> Secret | None:
        return self.token.read() if self.token else None


class Config(Struct, frozen=True):
    """The whole configuration. `file` is None for the built-in defaults."""

    file: Path | None
    steering: Steering
    identity: Identity
    targets: tuple[TargetConfig, ...]
    policy: Path | None
    audit: Audit
    upstream: Upstream | None
    hash_key_file: SecretFile | None

    def hash_key(self) -> bytes | None:
        return self.hash_key_file.read().reveal().encode() if self.hash_key_file else None

    def host_names(self) -> tuple[str, ...]:
        """Exact names of targets, for forward resolution."""
        return tuple(
            target.host
            for target in self.targets
            if "/" not in target.host and "*" not in target.host and not _is_address(target.host)
        )

    def target_for(self, address: str, port: int, names: Iterable[str]) -> TargetConfig | None:
        """The first declared target that this destination is."""
        known = tuple(names)
        return next((target for target in self.targets if target.matches(address, port, known)), None)

    def limitations(self) -> tuple[str, ...]:
        """What this version does not cover, for `status` and `doctor`."""
        found = ["TLS is relayed and recorded as uninspected: this version does not decrypt"]
        if self.steering.containers:
            found.append(
                "bridge-networked containers are not steered in this version: their connections are recorded as gaps (run) "
                "or refused (exec)"
            )
        return tuple(found)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def load_config(path: Path | None) -> Config:
    """Read a configuration; None: /etc/sidecar/sidecar.yaml where it exists, else the defaults.

    Raises ConfigurationError with file, line and the nearest valid name.
    """
    if path is None:
        if not DEFAULT_FILE.is_file():
            return _typed(ConfigurationDocument(), None, "")
        path = DEFAULT_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the configuration cannot be read: {error}", file=str(path)) from error
    _refuse_not_yet(text, str(path))
    return _typed(load_document(text, str(path), ConfigurationDocument), path, text)


def _refuse_not_yet(text: str, file: str) -> None:
    _, lines = read_document(text, file)
    for path, line in lines.items():
        pattern = tuple("*" if isinstance(part, int) else part for part in path)
        if pattern in NOT_YET:
            raise ConfigurationError(
                f"{NOT_YET[pattern]} is not supported in this version", file=file, line=line, hint="see docs/configuration.md"
            )


class _Checker:
    """Turns ValueErrors of single settings into errors with their line."""

    def __init__(self, text: str, file: Path | None) -> None:
        self.file = str(file) if file else None
        self.lines = read_document(text, str(file))[1] if file else {}

    def fail(self, message: str, *path: str | int, hint: str | None = None) -> ConfigurationError:
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        return ConfigurationError(
            f"{'.'.join(map(str, path))}: {message}", file=self.file, line=self.lines.get(known), path=".".join(map(str, path)), hint=hint
        )

    def size(self, value: str | int, *path: str | int) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            raise self.fail(str(error), *path) from error

    def duration(self, value: str | int, *path: str | int) -> float:
        try:
            return parse_duration(value)
        except ValueError as error:
            raise self.fail(str(error), *path) from error

    def port(self, port: int, *path: str | int) -> None:
        if not 1 <= port <= 65_535:
            raise self.fail(f"{port} is no TCP port", *path)


def _typed(document: ConfigurationDocument, file: Path | None, text: str) -> Config:
    check = _Checker(text, file)
    base = file.resolve().parent if file else Path("/")
    steering = document.steering
    for port in steering.ports:
        check.port(port, "steering", "ports", port)
    if len(steering.ports) > MAX_PORTS:
        raise check.fail(f"at most {MAX_PORTS} ports", "steering", "ports")
    for index, network in enumerate(steering.exclude):
        try:
            ipaddress.ip_network(network, strict=False)
        except ValueError as error:
            raise check.fail(f"{network!r} is no CIDR", "steering", "exclude", index, hint="such as 169.254.0.0/16") from error
    scope = (
        Scope("cgroups", tuple(steering.scope.cgroups))
        if isinstance(steering.scope, CgroupScope)
        else Scope(str(steering.scope))
    )
    for index, source in enumerate(document.identity.sources):
        if (source.env is None) == (source.file is None):
            raise check.fail("a source is exactly one of env, file", "identity", "sources", index)
    for index, issuer in enumerate(document.identity.issuers):
        for algorithm in issuer.algorithms:
            if algorithm.lower() == "none" or algorithm.upper().startswith("HS"):
                raise check.fail(
                    f"{algorithm} is never accepted: anyone who can read the key could sign with it", "identity", "issuers", index, "algorithms"
                )
        check.duration(issuer.leeway, "identity", "issuers", index, "leeway")
    if document.identity.required and not (document.identity.sources and document.identity.issuers):
        raise check.fail("nothing could ever be verified: sources and issuers are empty", "identity", "required")
    names: set[str] = set()
    for index, target in enumerate(document.targets):
        if target.name in names:
            raise check.fail(f"`{target.name}` stands twice", "targets", index, "name")
        names.add(target.name)
        if target.port is not None:
            check.port(target.port, "targets", index, "port")
        if "/" in target.host:
            try:
                ipaddress.ip_network(target.host, strict=False)
            except ValueError as error:
                raise check.fail(f"{target.host!r} is no CIDR", "targets", index, "host") from error
        if target.tls and target.tls.ca and not Path(target.tls.ca).is_file():
            raise check.fail(f"there is no file {target.tls.ca}", "targets", index, "tls", "ca")
    if document.upstream and not document.upstream.url.startswith(("http://", "https://")):
        raise check.fail("is no http or https address", "upstream", "url")
    audit = document.audit
    max_age = document.identity.max_age
    return Config(
        file=file,
        steering=Steering(
            scope=scope,
            containers=steering.containers,
            ports=dict(steering.ports),
            exclude=tuple(steering.exclude),
            decrypt=steering.decrypt,
            on_failure=steering.on_failure,
        ),
        identity=Identity(
            required=document.identity.required,
            sources=tuple(document.identity.sources),
            issuers=tuple(document.identity.issuers),
            attach=document.identity.attach,
            max_age_s=check.duration(max_age, "identity", "max_age") if max_age is not None else None,
        ),
        targets=tuple(
            TargetConfig(t.name, t.host.lower().rstrip("."), t.port, t.protocol, t.tls, t.pooler) for t in document.targets
        ),
        policy=base / document.policy if document.policy else None,
        audit=Audit(
            directory=base / audit.directory,
            max_bytes=check.size(audit.max_bytes, "audit", "max_bytes"),
            on_full=audit.on_full,
            sync=audit.sync,
            requests=Requests(check.size(audit.requests.max_bytes, "audit", "requests", "max_bytes")),
            responses=Responses(
                audit.responses.max_rows, check.size(audit.responses.max_bytes, "audit", "responses", "max_bytes")
            ),
        ),
        upstream=Upstream(document.upstream.url.rstrip("/"), document.upstream.token) if document.upstream else None,
        hash_key_file=document.masks.hash_key,
    )


