"""The shape of sidecar.yaml: names, types and defaults exactly as the contract has them (design, section 2).

Only shape: what a value means, and whether two of them contradict each other, is judged in `config`. Every
setting is explained in docs/configuration.md; a test compares.
"""

from __future__ import annotations

import os
import stat
from typing import Final, Literal

import msgspec

from sidecar.errors import ConfigurationError
from sidecar.model.secret import Secret

DEFAULT_AUDIT_DIRECTORY: Final = "/var/lib/sidecar/audit"
DEFAULT_AUTHORITY_DIRECTORY: Final = "/var/lib/sidecar/ca"
DEFAULT_PORTS: Final = {5432: "postgres", 80: "auto", 443: "auto", 8080: "auto"}
DEFAULT_ENGINES: Final = ("unix:///run/docker.sock", "unix:///run/podman/podman.sock")
DEFAULT_EXCLUDE: Final = ("169.254.0.0/16",)
DEFAULT_ALGORITHMS: Final = (
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
    "EdDSA",
)
MAX_SECRET_BYTES: Final = 65_536

ProtocolName = Literal["postgres", "http", "auto", "opaque"]


class Shape(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A mapping of the document; an unknown name in it is an error."""


class SecretFile(Shape, frozen=True):
    """`{file: PATH}`: the only way a secret enters the configuration. It is read when it is used, and never
    kept."""

    file: str

    def read(self) -> Secret:
        """Raises ConfigurationError where it cannot be read, is empty, or others may read it."""
        try:
            descriptor = os.open(self.file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                facts = os.fstat(descriptor)
                if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_SECRET_BYTES:
                    raise ConfigurationError(
                        f"the secret in {self.file} is no small regular file",
                        hint=f"a file of at most {MAX_SECRET_BYTES} bytes",
                    )
                if facts.st_mode & (stat.S_IROTH | stat.S_IWOTH):
                    raise ConfigurationError(
                        f"the secret in {self.file} can be read or written by everyone",
                        hint=f"chmod 600 {self.file}",
                    )
                text = os.read(descriptor, MAX_SECRET_BYTES).decode("utf-8").strip()
            finally:
                os.close(descriptor)
        except (OSError, UnicodeDecodeError) as error:
            # a decoding error's own text would show a part of the secret
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise ConfigurationError(
                f"the secret in {self.file} cannot be read: {why}",
                hint="`{file: PATH}` in the configuration names it; make it, with mode 0600",
            ) from None
        if not text:
            raise ConfigurationError(f"the secret in {self.file} is empty", hint="put the secret into it")
        return Secret(text)


class CgroupScope(Shape, frozen=True):
    cgroups: tuple[str, ...]


class SteeringDocument(Shape, frozen=True):
    scope: Literal["all", "exec"] | CgroupScope = "all"
    containers: bool = True
    ports: dict[int, ProtocolName] = msgspec.field(default_factory=lambda: dict(DEFAULT_PORTS))  # type: ignore[arg-type]
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    decrypt: Literal["declared", "all"] = "declared"
    on_failure: Literal["closed", "open"] = "closed"


class EnvSource(Shape, frozen=True):
    name: str


class FileSource(Shape, frozen=True):
    path: str


class GithubActionsSource(Shape, frozen=True):
    """Asked for with the job's own ACTIONS_ID_TOKEN_REQUEST_URL and …_TOKEN, at `hosts` only."""

    audience: str
    hosts: tuple[str, ...] = ("*.actions.githubusercontent.com",)


class GitlabSource(Shape, frozen=True):
    """`id_tokens` of .gitlab-ci.yml: `name` is the variable that the job's keyword names."""

    name: str = "SIDECAR_ID_TOKEN"


class BuildkiteSource(Shape, frozen=True):
    """Asked for as `buildkite-agent oidc request-token` does."""

    audience: str
    hosts: tuple[str, ...] = ("agent.buildkite.com",)


class CircleciSource(Shape, frozen=True):
    """CIRCLE_OIDC_TOKEN_V2, else CIRCLE_OIDC_TOKEN."""


class JenkinsSource(Shape, frozen=True):
    """A credential of the OpenID Connect Provider plugin, bound to the variable `name`."""

    name: str = "SIDECAR_ID_TOKEN"


class KubernetesSource(Shape, frozen=True):
    """A projected service-account token, as the pod sees it."""

    path: str = "/var/run/secrets/kubernetes.io/serviceaccount/token"


class GoogleSource(Shape, frozen=True):
    """The instance's identity token, from the metadata server: the host is the identity."""

    audience: str
    endpoint: str = "http://metadata.google.internal"


class AzureSource(Shape, frozen=True):
    """The instance's managed identity, from the metadata service: the host is the identity."""

    audience: str
    client_id: str | None = None
    endpoint: str = "http://169.254.169.254"


class CommandSource(Shape, frozen=True):
    """A program of the administrator's that prints a token."""

    argv: tuple[str, ...]
    timeout: str | int = "5s"


TokenSource = (
    EnvSource
    | FileSource
    | GithubActionsSource
    | GitlabSource
    | BuildkiteSource
    | CircleciSource
    | JenkinsSource
    | KubernetesSource
    | GoogleSource
    | AzureSource
    | CommandSource
)


class SourceDocument(Shape, frozen=True):
    """One place to look for a token: exactly one of the fields is set."""

    env: EnvSource | None = None
    file: FileSource | None = None
    github_actions: GithubActionsSource | None = None
    gitlab: GitlabSource | None = None
    buildkite: BuildkiteSource | None = None
    circleci: CircleciSource | None = None
    jenkins: JenkinsSource | None = None
    kubernetes: KubernetesSource | None = None
    google: GoogleSource | None = None
    azure: AzureSource | None = None
    command: CommandSource | None = None

    def chosen(self) -> tuple[tuple[str, TokenSource], ...]:
        """Kind and source of each field that is set."""
        named = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return tuple((name, source) for name, source in named if source is not None)


class IssuerDocument(Shape, frozen=True):
    issuer: str
    audience: str | tuple[str, ...]
    jwks: str | None = None
    algorithms: tuple[str, ...] = DEFAULT_ALGORITHMS
    leeway: str | int = "30s"


class HttpAttach(Shape, frozen=True):
    header: str = "X-Workload-Identity"


class PostgresAttach(Shape, frozen=True):
    setting: str = "workload.identity"
    application_name: str | None = "{subject}"


class AttachDocument(Shape, frozen=True):
    http: HttpAttach = HttpAttach()
    postgres: PostgresAttach = PostgresAttach()


class IdentityDocument(Shape, frozen=True):
    required: bool = False
    sources: tuple[SourceDocument, ...] = ()
    issuers: tuple[IssuerDocument, ...] = ()
    attach: AttachDocument = AttachDocument()
    max_age: str | int | None = None


class AttributionDocument(Shape, frozen=True):
    engines: tuple[str, ...] = DEFAULT_ENGINES


class TlsDocument(Shape, frozen=True):
    mode: Literal["disable", "require", "verify-ca", "verify-full", "passthrough"]
    ca: str | None = None


class TargetDocument(Shape, frozen=True):
    name: str
    host: str
    port: int | None = None
    protocol: ProtocolName | None = None
    tls: TlsDocument | None = None
    pooler: Literal["session", "transaction", "statement"] | None = None


class RequestsDocument(Shape, frozen=True):
    max_bytes: str | int = 65_536


class ResponsesDocument(Shape, frozen=True):
    max_rows: int = 100
    max_bytes: str | int = 65_536


class AuditDocument(Shape, frozen=True):
    directory: str = DEFAULT_AUDIT_DIRECTORY
    max_bytes: str | int = "1GiB"
    on_full: Literal["block", "drop"] = "block"
    sync: Literal["group", "strict"] = "group"
    requests: RequestsDocument = RequestsDocument()
    responses: ResponsesDocument = ResponsesDocument()


class UpstreamDocument(Shape, frozen=True):
    url: str
    token: SecretFile | None = None


class MasksDocument(Shape, frozen=True):
    hash_key: SecretFile | None = None


class AuthorityDocument(Shape, frozen=True):
    directory: str = DEFAULT_AUTHORITY_DIRECTORY
    lifetime: str | int = "3650d"
    leaf_lifetime: str | int = "24h"
    permitted: tuple[str, ...] = ()


class LocalTlsDocument(Shape, frozen=True):
    authority: AuthorityDocument = AuthorityDocument()


class ConfigurationDocument(Shape, frozen=True):
    steering: SteeringDocument = SteeringDocument()
    identity: IdentityDocument = IdentityDocument()
    attribution: AttributionDocument = AttributionDocument()
    targets: tuple[TargetDocument, ...] = ()
    policy: str | None = None
    audit: AuditDocument = AuditDocument()
    upstream: UpstreamDocument | None = None
    masks: MasksDocument = MasksDocument()
    tls: LocalTlsDocument = LocalTlsDocument()
