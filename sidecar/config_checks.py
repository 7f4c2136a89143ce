"""What the shape of sidecar.yaml cannot say: ranges, references, contradictions, and what is not built yet.

Each problem is a ConfigurationError at the line of the setting. What the contract names and this version does
not do is refused with its line: a setting that is silently ignored is a promise broken.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Final, get_args
from urllib.parse import SplitResult, urlsplit

from sidecar.config_document import (
    DEFAULT_ALGORITHMS,
    AuthorityDocument,
    AzureSource,
    BuildkiteSource,
    CgroupScope,
    CommandSource,
    ConfigurationDocument,
    EnvSource,
    FileSource,
    GithubActionsSource,
    GitlabSource,
    GoogleSource,
    IssuerDocument,
    JenkinsSource,
    KubernetesSource,
    ProtocolName,
    SourceDocument,
    TargetDocument,
)
from sidecar.documents import Lines, nearest, parse_duration, parse_size, suggestion
from sidecar.errors import ConfigurationError, TrustError
from sidecar.tls.names import Permitted

PROTOCOLS: Final[tuple[str, ...]] = get_args(ProtocolName)
MAX_PORTS: Final = 1024
MAX_TARGETS: Final = 4096
MIN_SPOOL_BYTES: Final = 1024 * 1024
MAX_RECORDED_BYTES: Final = 16 * 1024 * 1024
"""Of one request or response: a record has to fit a batch."""
MAX_RECORDED_ROWS: Final = 100_000
MAX_LEEWAY_S: Final = 600.0
MAX_COMMAND_S: Final = 30.0
MIN_AUTHORITY_S: Final = 86_400.0
MAX_AUTHORITY_S: Final = 7300 * 86_400.0
"""Twenty years: a date beyond 2050 is written otherwise (RFC 5280 section 4.1.2.5), and no host lives so long."""
MIN_LEAF_S: Final = 600.0
MAX_LEAF_S: Final = 90 * 86_400.0
MAX_PERMITTED: Final = 256
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
PATH_PLACEHOLDERS: Final = ("uid", "gid", "pid", "user")
NAME_PLACEHOLDERS: Final = (
    "subject",
    "issuer",
    "jti",
    "target",
    "job",
    "repository",
    "run",
    "step",
    "uid",
    "exe",
)

NOT_YET: Final = {
    ("targets", "*", "credentials"): "injecting credentials",
    ("identity", "sources", "*", "spiffe"): "the token source spiffe",
}

_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HEADER: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SETTING: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(?:\.[A-Za-z_][A-Za-z0-9_$]*)+")
_PLACEHOLDER: Final = re.compile(r"\{([^{}]*)\}")
_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_RESERVED_HEADERS: Final = frozenset(
    {
        "host",
        "content-length",
        "transfer-encoding",
        "connection",
        "upgrade",
        "te",
        "trailer",
        "expect",
        "authorization",
    }
)

Step = str | int


class Checker:
    """Judges one document. `lines` are those of its settings; empty for the built-in defaults, which always
    pass."""

    def __init__(self, lines: Lines, file: Path | None) -> None:
        self._lines = lines
        self._file = file

    def fail(self, message: str, *path: Step, hint: str | None = None) -> ConfigurationError:
        known = path
        while known and known not in self._lines:
            known = known[:-1]
        dotted = ".".join(map(str, path))
        return ConfigurationError(
            f"{dotted}: {message}",
            file=str(self._file) if self._file else None,
            line=self._lines.get(known),
            path=dotted,
            hint=hint,
        )

    def refuse_unbuilt(self) -> None:
        """Before the shape is looked at, so that the message is not `unknown name`."""
        for path in self._lines:
            what = NOT_YET.get(tuple("*" if isinstance(step, int) else step for step in path))
            if what:
                raise self.fail(
                    f"{what} is not supported yet in this version",
                    *path,
                    hint="remove it; docs/configuration.md lists what is supported",
                )

    def ports(self, data: object) -> None:
        """Before the shape is looked at, because its errors do not say which entry of a mapping is wrong."""
        steering = data.get("steering") if isinstance(data, dict) else None
        ports = steering.get("ports") if isinstance(steering, dict) else None
        for port, protocol in ports.items() if isinstance(ports, dict) else ():
            if isinstance(port, bool) or not isinstance(port, int):
                quoted = isinstance(port, str) and port.isdecimal()
                raise self.fail(
                    f"{port!r} is no TCP port",
                    "steering",
                    "ports",
                    port,
                    hint="a number, without quotes" if quoted else "1 to 65535",
                )
            if protocol not in PROTOCOLS:
                raise self.fail(
                    f"{protocol!r} is no protocol",
                    "steering",
                    "ports",
                    port,
                    hint=suggestion(str(protocol), list(PROTOCOLS)),
                )

    def size(self, value: str | int, *path: Step, low: int = 0, high: int | None = None) -> int:
        """In bytes."""
        try:
            found = parse_size(value)
        except ValueError as error:
            raise self.fail(str(error), *path) from error
        if found < low or (high is not None and found > high):
            bounds = f"at least {low} bytes" if high is None else f"{low} to {high} bytes"
            raise self.fail(f"{value} is outside what may stand here", *path, hint=bounds)
        return found

    def duration(self, value: str | int, *path: Step, high: float | None = None) -> float:
        """In seconds."""
        try:
            found = parse_duration(value)
        except ValueError as error:
            raise self.fail(str(error), *path) from error
        if high is not None and found > high:
            raise self.fail(f"{value} is more than {high:.0f} s", *path)
        return found

    def placeholders(self, template: str, valid: tuple[str, ...], *path: Step) -> None:
        for name in _PLACEHOLDER.findall(template):
            if name not in valid:
                near = nearest(name, list(valid))
                hint = (
                    f"did you mean {{{near}}}?" if near else "valid: " + ", ".join(f"{{{v}}}" for v in valid)
                )
                raise self.fail(f"{{{name}}} is not known here", *path, hint=hint)

    def document(self, document: ConfigurationDocument) -> None:
        """Raises ConfigurationError at the first problem."""
        self._steering(document)
        for index, source in enumerate(document.identity.sources):
            self._source(source, index)
        self._issuers(document.identity.issuers)
        self._identity(document)
        for index, engine in enumerate(document.attribution.engines):
            if not engine.startswith("unix:///"):
                raise self.fail(
                    f"{engine!r} is no socket of this host",
                    "attribution",
                    "engines",
                    index,
                    hint="such as unix:///run/docker.sock",
                )
        if len(document.targets) > MAX_TARGETS:
            raise self.fail(f"at most {MAX_TARGETS} targets", "targets")
        names: set[str] = set()
        for index, target in enumerate(document.targets):
            if target.name in names:
                raise self.fail(f"`{target.name}` stands twice", "targets", index, "name")
            names.add(target.name)
            self._target(target, index, document)
        self._audit(document)
        if document.upstream:
            self._url(document.upstream.url, "upstream", "url")
        self._authority(document.tls.authority)

    def _steering(self, document: ConfigurationDocument) -> None:
        steering = document.steering
        if not steering.ports:
            raise self.fail("no port would be steered", "steering", "ports", hint="such as {5432: postgres}")
        if len(steering.ports) > MAX_PORTS:
            raise self.fail(f"at most {MAX_PORTS} ports", "steering", "ports")
        for port in steering.ports:
            if not 1 <= port <= 65_535:
                raise self.fail(f"{port} is no TCP port", "steering", "ports", port, hint="1 to 65535")
        for index, network in enumerate(steering.exclude):
            self._network(network, "steering", "exclude", index)
        if isinstance(steering.scope, CgroupScope):
            if not steering.scope.cgroups:
                raise self.fail(
                    "no cgroup is named", "steering", "scope", "cgroups", hint="such as [/ci.slice]"
                )
            for index, path in enumerate(steering.scope.cgroups):
                if not path.startswith("/") or ".." in path.split("/"):
                    raise self.fail(
                        f"{path!r} is no path from the root of the cgroup hierarchy",
                        "steering",
                        "scope",
                        "cgroups",
                        index,
                        hint="such as /ci.slice",
                    )

    def _network(self, text: str, *path: Step) -> None:
        try:
            ipaddress.ip_network(text)
        except ValueError as error:
            raise self.fail(f"{text!r} is no CIDR: {error}", *path, hint="such as 169.254.0.0/16") from error

    def _source(self, document: SourceDocument, index: int) -> None:
        place: tuple[Step, ...] = ("identity", "sources", index)
        chosen = document.chosen()
        if len(chosen) != 1:
            raise self.fail("a source is exactly one of " + ", ".join(document.__struct_fields__), *place)
        ((kind, source),) = chosen
        place = (*place, kind)
        match source:
            case EnvSource() | GitlabSource() | JenkinsSource():
                if not _ENV_NAME.fullmatch(source.name):
                    raise self.fail(f"{source.name!r} is no name of a variable", *place, "name")
            case FileSource() | KubernetesSource():
                path = source.path
                if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
                    raise self.fail(
                        "the path has to be absolute and without `..`",
                        *place,
                        "path",
                        hint='such as "/var/run/sidecar/tokens/{uid}"',
                    )
                self.placeholders(path, PATH_PLACEHOLDERS, *place, "path")
            case GithubActionsSource() | BuildkiteSource():
                self._audience(source.audience, *place)
                for number, host in enumerate(source.hosts):
                    if not _is_name(host) and not is_address(host):
                        raise self.fail(f"{host!r} is no host name or wildcard", *place, "hosts", number)
            case GoogleSource() | AzureSource():
                self._audience(source.audience, *place)
                self._url(source.endpoint, *place, "endpoint")
            case CommandSource():
                if not source.argv or not source.argv[0].startswith("/"):
                    raise self.fail("begins with the absolute path of a program", *place, "argv")
                if any("\0" in part for part in source.argv):
                    raise self.fail("holds a NUL", *place, "argv")
                self.duration(source.timeout, *place, "timeout", high=MAX_COMMAND_S)

    def _audience(self, audience: str, *place: Step) -> None:
        if not audience:
            raise self.fail("is empty: tokens for nobody are refused", *place, "audience")

    def _issuers(self, issuers: tuple[IssuerDocument, ...]) -> None:
        names: set[str] = set()
        for index, issuer in enumerate(issuers):
            place = ("identity", "issuers", index)
            if not issuer.issuer:
                raise self.fail("is empty", *place, "issuer")
            if issuer.issuer in names:
                raise self.fail(f"{issuer.issuer} stands twice", *place, "issuer")
            names.add(issuer.issuer)
            audiences = (issuer.audience,) if isinstance(issuer.audience, str) else issuer.audience
            if not audiences or not all(audiences):
                raise self.fail(
                    "without an audience, tokens meant for others would be accepted", *place, "audience"
                )
            if not issuer.algorithms:
                raise self.fail("no algorithm is left", *place, "algorithms")
            for number, algorithm in enumerate(issuer.algorithms):
                self._algorithm(algorithm, *place, "algorithms", number)
            self.duration(issuer.leeway, *place, "leeway", high=MAX_LEEWAY_S)
            # Without `jwks` the issuer's own discovery document says where its keys are.
            if issuer.jwks is None and not issuer.issuer.startswith(("https://", "http://")):
                raise self.fail(
                    "jwks is missing, and the issuer is no address where it could be found",
                    *place,
                    "issuer",
                    hint="jwks: an https address, or a file",
                )
            keys, setting = (issuer.jwks, "jwks") if issuer.jwks is not None else (issuer.issuer, "issuer")
            if setting == "issuer" or ("://" in keys and not keys.startswith("file://")):
                address = self._url(keys, *place, setting)
                if address.scheme == "http" and address.hostname not in LOOPBACK:
                    raise self.fail(
                        "keys that arrive without TLS are anybody's",
                        *place,
                        setting,
                        hint="use https, or a file; http only from this host",
                    )

    def _algorithm(self, algorithm: str, *path: Step) -> None:
        if algorithm.lower() == "none" or algorithm.upper().startswith("HS"):
            raise self.fail(
                f"{algorithm} is never accepted: anyone who can read the key could sign with it", *path
            )
        if algorithm not in DEFAULT_ALGORITHMS:
            near = nearest(algorithm, list(DEFAULT_ALGORITHMS))
            raise self.fail(
                f"{algorithm} is not known",
                *path,
                hint=f"did you mean {near}?" if near else "valid: " + ", ".join(DEFAULT_ALGORITHMS),
            )

    def _identity(self, document: ConfigurationDocument) -> None:
        identity = document.identity
        if identity.required and not (identity.sources and identity.issuers):
            raise self.fail(
                "nothing could ever be verified: sources or issuers are empty",
                "identity",
                "required",
                hint="name at least one of identity.sources and one of identity.issuers: docs/identity.md",
            )
        if identity.max_age is not None:
            self.duration(identity.max_age, "identity", "max_age")
        header = identity.attach.http.header
        if not _HEADER.fullmatch(header) or header.lower() in _RESERVED_HEADERS:
            raise self.fail(f"{header!r} cannot carry a token", "identity", "attach", "http", "header")
        setting = identity.attach.postgres.setting
        if not _SETTING.fullmatch(setting):
            raise self.fail(
                f"{setting!r} is no name of a custom setting",
                "identity",
                "attach",
                "postgres",
                "setting",
                hint="two words joined by a dot, such as workload.identity",
            )
        template = identity.attach.postgres.application_name
        if template is not None:
            self.placeholders(
                template, NAME_PLACEHOLDERS, "identity", "attach", "postgres", "application_name"
            )

    def _target(self, target: TargetDocument, index: int, document: ConfigurationDocument) -> None:
        place = ("targets", index)
        if not target.name:
            raise self.fail("is empty", *place, "name")
        if target.port is not None and not 1 <= target.port <= 65_535:
            raise self.fail(f"{target.port} is no TCP port", *place, "port", hint="1 to 65535")
        if "/" in target.host:
            self._network(target.host, *place, "host")
        elif not is_address(target.host) and not _is_name(target.host):
            raise self.fail(
                f"{target.host!r} is no host name, wildcard, address or CIDR",
                *place,
                "host",
                hint="such as db.internal, *.internal or 10.0.0.0/8",
            )
        protocol = target.protocol or (document.steering.ports.get(target.port) if target.port else None)
        if target.pooler and protocol not in (None, "auto", "postgres"):
            raise self.fail(f"a pooler in front of {protocol} is not known", *place, "pooler")
        if target.tls is None:
            return
        if target.tls.ca is not None and target.tls.mode in ("disable", "passthrough"):
            raise self.fail(f"contradicts mode {target.tls.mode}: nothing is verified", *place, "tls", "ca")

    def _audit(self, document: ConfigurationDocument) -> None:
        audit = document.audit
        self.size(audit.max_bytes, "audit", "max_bytes", low=MIN_SPOOL_BYTES)
        self.size(audit.requests.max_bytes, "audit", "requests", "max_bytes", high=MAX_RECORDED_BYTES)
        self.size(audit.responses.max_bytes, "audit", "responses", "max_bytes", high=MAX_RECORDED_BYTES)
        if not 0 <= audit.responses.max_rows <= MAX_RECORDED_ROWS:
            raise self.fail(f"is outside 0 to {MAX_RECORDED_ROWS}", "audit", "responses", "max_rows")

    def _authority(self, authority: AuthorityDocument) -> None:
        place = ("tls", "authority")
        if not authority.directory:
            raise self.fail("is empty", *place, "directory")
        whole = self.duration(authority.lifetime, *place, "lifetime", high=MAX_AUTHORITY_S)
        if whole < MIN_AUTHORITY_S:
            raise self.fail(
                f"{authority.lifetime} is less than a day", *place, "lifetime", hint="such as 3650d"
            )
        leaf = self.duration(authority.leaf_lifetime, *place, "leaf_lifetime", high=MAX_LEAF_S)
        if leaf < MIN_LEAF_S:
            raise self.fail(
                f"{authority.leaf_lifetime} is less than 10 minutes: clocks differ by more",
                *place,
                "leaf_lifetime",
                hint="such as 24h",
            )
        if leaf > whole:
            raise self.fail(
                "is longer than tls.authority.lifetime", *place, "leaf_lifetime", hint="such as 24h"
            )
        if len(authority.permitted) > MAX_PERMITTED:
            raise self.fail(f"at most {MAX_PERMITTED} names", *place, "permitted")
        for index, entry in enumerate(authority.permitted):
            try:
                Permitted.parse((entry,))
            except TrustError as error:
                raise self.fail(
                    str(error),
                    *place,
                    "permitted",
                    index,
                    hint=error.hint or "such as corp.example or 10.0.0.0/8",
                ) from error

    def _url(self, text: str, *path: Step) -> SplitResult:
        try:
            parts = urlsplit(text)
            _ = parts.port  # raises where it is no number
        except ValueError as error:
            raise self.fail(f"is no address: {error}", *path) from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise self.fail("is no http or https address", *path, hint="such as https://audit.internal:8420")
        if parts.username is not None or parts.password is not None:
            raise self.fail("holds credentials; they would be shown", *path, hint="use `token: {file: …}`")
        return parts


def _is_name(host: str) -> bool:
    """A host name of at most 253 characters, or one with `*.` before it."""
    labels = host.removeprefix("*.").removesuffix(".").split(".")
    return len(host) <= 253 and all(_LABEL.fullmatch(label) for label in labels)


def is_address(host: str) -> bool:
    """Whether it is an IP address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
