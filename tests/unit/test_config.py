"""sidecar.yaml: the contract's names and defaults, and an error with file, line and nearest name for
everything else."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sidecar import config as configuration
from sidecar.config import Config, load_config
from sidecar.config_checks import NOT_YET
from sidecar.config_document import ConfigurationDocument
from sidecar.errors import ConfigurationError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def loaded(text: str) -> Config:
        path = tmp_path / "sidecar.yaml"
        path.write_text(text)
        return load_config(path)

    return loaded


# -- what is accepted


def test_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(configuration, "DEFAULT_FILE", tmp_path / "absent")
    found = load_config(None)
    assert found.file is None
    assert found.steering.scope.kind == "all"
    assert found.steering.ports == {5432: "postgres", 80: "auto", 443: "auto", 8080: "auto"}
    assert found.steering.exclude == ("169.254.0.0/16",)
    assert (found.steering.containers, found.steering.decrypt, found.steering.on_failure) == (
        True,
        "declared",
        "closed",
    )
    assert found.identity.required is False
    assert found.identity.attach.http.header == "X-Workload-Identity"
    assert found.identity.attach.postgres.setting == "workload.identity"
    assert found.identity.attach.postgres.application_name == "{subject}"
    assert found.audit.directory == Path("/var/lib/sidecar/audit")
    assert (found.audit.max_bytes, found.audit.on_full, found.audit.sync) == (2**30, "block", "group")
    assert found.audit.requests.max_bytes == 65_536
    assert (found.audit.responses.max_rows, found.audit.responses.max_bytes) == (100, 65_536)
    assert (found.policy, found.upstream, found.targets, found.hash_key()) == (None, None, (), None)
    assert found.authority.directory == Path("/var/lib/sidecar/ca")
    assert (found.authority.lifetime_s, found.authority.leaf_lifetime_s) == (3650 * 86_400, 86_400)
    assert found.authority.permitted == ()


def test_the_default_file_is_used_where_it_exists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "sidecar.yaml"
    path.write_text("steering: {scope: exec}\n")
    monkeypatch.setattr(configuration, "DEFAULT_FILE", path)
    assert load_config(None).file == path
    assert load_config(None).steering.scope.kind == "exec"


def test_the_example() -> None:
    found = load_config(ROOT / "examples" / "sidecar.yaml")
    assert found.policy == ROOT / "examples" / "policy.yaml"
    assert found.identity.max_age_s == 12 * 3600
    assert [target.name for target in found.targets] == ["orders", "reports-pool", "api"]
    assert found.upstream is not None


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}\n", "---\n"])
def test_an_empty_file_means_the_defaults(load: Any, text: str) -> None:
    assert load(text).steering.ports[5432] == "postgres"


def test_paths_are_meant_from_the_file(load: Any, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k3y\n")
    (tmp_path / "key").chmod(0o600)
    found = load(
        "policy: rules/policy.yaml\n"
        "audit: {directory: spool}\n"
        "tls: {authority: {directory: ca}}\n"
        "masks: {hash_key: {file: key}}\n"
        "identity: {issuers: [{issuer: https://i.test, audience: a, jwks: keys.json}]}\n"
        "targets: [{name: a, host: a.test, protocol: postgres, tls: {mode: verify-ca, ca: ca.pem}}]\n"
    )
    assert found.policy == tmp_path / "rules/policy.yaml"
    assert found.audit.directory == tmp_path / "spool"
    assert found.authority.directory == tmp_path / "ca"
    assert found.identity.issuers[0].jwks == str(tmp_path / "keys.json")
    assert found.targets[0].tls.ca == str(tmp_path / "ca.pem")
    assert found.hash_key() == b"k3y"


def test_scopes(load: Any) -> None:
    assert load("steering: {scope: {cgroups: [/ci.slice, /a/b]}}").steering.scope.cgroups == (
        "/ci.slice",
        "/a/b",
    )
    assert load("steering: {scope: exec}").steering.scope == configuration.Scope("exec")


def test_what_is_not_covered_is_said(load: Any) -> None:
    found = load("steering: {on_failure: open}\ntargets: [{name: far, host: far.test, port: 6432}]\n")
    text = "\n".join(found.limitations())
    for word in ("TLS", "on_failure", "6432"):
        assert word in text
    assert "containers" not in text
    assert "containers" in "\n".join(load("steering: {containers: false}").limitations())


# -- targets


TARGETS = """
targets:
  - {name: exact, host: Orders.Internal., port: 5432, protocol: postgres}
  - {name: any-port, host: orders.internal}
  - {name: wildcard, host: "*.internal", port: 8080, protocol: http}
  - {name: address, host: 192.0.2.7}
  - {name: network, host: 10.0.0.0/8, port: 5432}
  - {name: six, host: "2001:db8::/32"}
  - {name: through, host: through.test, protocol: postgres, tls: {mode: passthrough}}
"""


@pytest.mark.parametrize(
    ("address", "port", "names", "expected"),
    [
        ("10.1.1.1", 5432, ("orders.internal",), "exact"),
        ("10.1.1.1", 5432, ("ORDERS.internal.",), "exact"),
        ("203.0.113.1", 80, ("orders.internal",), "any-port"),
        ("203.0.113.1", 8080, ("api.internal",), "wildcard"),
        ("203.0.113.1", 8080, ("deep.api.internal",), "wildcard"),
        ("203.0.113.1", 8080, ("internal",), None),
        ("203.0.113.1", 8080, ("notinternal",), None),
        ("203.0.113.1", 80, ("api.internal",), None),
        ("192.0.2.7", 1, (), "address"),
        ("10.255.0.1", 5432, (), "network"),
        ("10.255.0.1", 80, (), None),
        ("2001:db8::1", 80, (), "six"),
        ("2001:db9::1", 80, (), None),
    ],
)
def test_which_target_a_destination_is(
    load: Any, address: str, port: int, names: tuple[str, ...], expected: str | None
) -> None:
    found = load(TARGETS).target_for(address, port, names)
    assert (found.name if found else None) == expected


def test_names_to_resolve_and_passthrough(load: Any) -> None:
    found = load(TARGETS)
    assert set(found.host_names()) == {"orders.internal", "through.test"}
    assert found.targets[-1].protocol == "opaque"


@pytest.mark.parametrize(
    ("target", "opens"),
    [
        ("protocol: http", True),
        ("protocol: http, port: 8443", True),
        ("port: 443", True),
        ("port: 443, protocol: auto", True),
        ("port: 443, protocol: opaque", False),
        ("protocol: http, tls: {mode: passthrough}", False),
        ("protocol: http, tls: {mode: disable}", False),
        ("port: 443, tls: {mode: passthrough}", False),
        ("protocol: postgres, tls: {mode: verify-full}", False),
        ("port: 5432", False),
    ],
)
def test_whether_tls_is_opened(load: Any, target: str, opens: bool) -> None:
    assert load(f"targets: [{{name: a, host: a.test, {target}}}]").opens_tls() is opens
    assert load("{}").opens_tls() is False


# -- secrets


def test_secrets_are_read_when_used_and_not_shown(load: Any, tmp_path: Path) -> None:
    secret = tmp_path / "enrolment"
    secret.write_text("hunter2\n")
    secret.chmod(0o640)
    found = load(f"upstream: {{url: 'https://audit.test/', token: {{file: {secret}}}}}")
    assert found.upstream.url == "https://audit.test"
    assert found.upstream.read_token().reveal() == "hunter2"
    assert "hunter2" not in repr(found)
    assert "hunter2" not in repr(found.upstream.read_token())


@pytest.mark.parametrize(
    "kind", ["absent", "readable", "writable", "empty", "directory", "fifo", "huge", "binary"]
)
def test_a_secret_that_is_none(load: Any, tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret"
    match kind:
        case "directory":
            secret.mkdir()
        case "fifo":
            os.mkfifo(secret)
        case "absent":
            pass
        case _:
            secret.write_bytes(
                {"empty": b" \n", "huge": b"x" * 70_000, "binary": b"hunter2\xff\xfe"}.get(kind, b"x")
            )
            secret.chmod({"readable": 0o644, "writable": 0o602}.get(kind, 0o600))
    found = load(f"masks: {{hash_key: {{file: {secret}}}}}")
    with pytest.raises(ConfigurationError) as caught:
        found.hash_key()
    assert str(secret) in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_secret_in_the_document_is_refused(load: Any) -> None:
    with pytest.raises(ConfigurationError):
        load("upstream: {url: 'https://a.test', token: hunter2}")


# -- what is refused: document, line, words of the message or hint

ISSUERS = """identity:
  sources: [{env: {name: T}}]
  issuers:
    - {issuer: https://i.test, audience: a, jwks: /k, %s}
"""

REFUSED = [
    ("sterring: {}\n", 1, "steering"),
    ("steering:\n  scop: all\n", 2, "scope"),
    ("steering:\n  ports:\n    5432: postgress\n", 3, "postgres"),
    ("steering:\n  scope: everything\n", 2, "all"),
    ("steering:\n  scope: {cgroups: []}\n", 2, "no cgroup"),
    ("steering:\n  scope:\n    cgroups:\n      - ci.slice\n", 4, "/ci.slice"),
    ("steering:\n  scope:\n    cgroups: [/../x]\n", 3, "/ci.slice"),
    ("steering:\n  containers: maybe\n", 2, "containers"),
    ("steering:\n  ports: {0: http}\n", 2, "no TCP port"),
    ("steering:\n  ports:\n    80: http\n    70000: http\n", 4, "70000"),
    ("steering:\n  ports: {}\n", 2, "no port"),
    ("steering:\n  ports: {http: 80}\n", 2, "no TCP port"),
    ("steering:\n  exclude:\n    - 169.254.0.0/16\n    - 10.0.0.1/8\n", 4, "host bits"),
    ("steering:\n  exclude: [example.test]\n", 2, "CIDR"),
    ("steering:\n  exclude: 10.0.0.0/8\n", 2, "exclude"),
    ("steering:\n  decrypt: everything\n", 2, "declared"),
    ("steering:\n  on_failure: ope\n", 2, "open"),
    ("identity:\n  required: true\n", 2, "nothing could ever be verified"),
    ("identity:\n  required: 'yes'\n", 2, "required"),
    ("identity:\n  sources:\n    - spiffe: {}\n", 3, "not supported yet"),
    ("identity:\n  sources:\n    - github_actions: {}\n", 3, "audience"),
    ("identity:\n  sources:\n    - github_actions: {audience: ''}\n", 3, "for nobody"),
    ("identity:\n  sources:\n    - github_actions: {audience: a, hosts: ['*']}\n", 3, "host name"),
    ("identity:\n  sources:\n    - buildkite: {audience: a, hosts: [https://a.test]}\n", 3, "host name"),
    ("identity:\n  sources:\n    - google: {audience: a, endpoint: metadata}\n", 3, "address"),
    ("identity:\n  sources:\n    - kubernetes: {path: token}\n", 3, "absolute"),
    ("identity:\n  sources:\n    - gitlab: {name: 1x}\n", 3, "variable"),
    ("identity:\n  sources:\n    - command: {argv: []}\n", 3, "absolute path"),
    ("identity:\n  sources:\n    - command: {argv: [token]}\n", 3, "absolute path"),
    ("identity:\n  sources:\n    - command: {argv: [/bin/token], timeout: 5m}\n", 3, "more than"),
    ("identity:\n  sources:\n    - github_action: {audience: a}\n", 3, "github_actions"),
    ("identity:\n  sources:\n    - vault: {}\n", 3, "vault"),
    ("identity:\n  sources:\n    - enc: {name: X}\n", 3, "env"),
    ("identity:\n  sources:\n    - {}\n", 3, "exactly one"),
    ("identity:\n  sources:\n    - {env: {name: X}, file: {path: /x}}\n", 3, "exactly one"),
    ("identity:\n  sources:\n    - env: {}\n", 3, "name"),
    ("identity:\n  sources:\n    - env: {name: 'A B'}\n", 3, "variable"),
    ("identity:\n  sources:\n    - file: {path: tokens/x}\n", 3, "absolute"),
    ("identity:\n  sources:\n    - file: {path: /run/../etc/x}\n", 3, ".."),
    ("identity:\n  sources:\n    - file: {path: '/run/{uidd}'}\n", 3, "{uid}"),
    ("identity:\n  issuers:\n    - {issuer: a, audience: b}\n", 3, "jwks"),
    (ISSUERS % "audience_: x", 4, "audience"),
    (ISSUERS % "algorithms: [none]", 4, "never accepted"),
    (ISSUERS % "algorithms: [HS256]", 4, "never accepted"),
    (ISSUERS % "algorithms: [RS265]", 4, "RS256"),
    (ISSUERS % "algorithms: []", 4, "no algorithm"),
    (ISSUERS % "leeway: 1 fortnight", 4, "duration"),
    (ISSUERS % "leeway: 2h", 4, "more than"),
    (ISSUERS % "jwks: /twice", 4, "twice"),
    ("identity:\n  issuers:\n    - {issuer: i, audience: '', jwks: /k}\n", 3, "audience"),
    ("identity:\n  issuers:\n    - {issuer: i, audience: [], jwks: /k}\n", 3, "audience"),
    (
        "identity: {issuers: [{issuer: i, audience: a, jwks: k},\n\n\n{issuer: i, audience: b, jwks: /k}]}\n",
        4,
        "twice",
    ),
    ("identity:\n  issuers:\n    - {issuer: i, audience: a, jwks: 'http://far.test/k'}\n", 3, "https"),
    ("identity:\n  issuers:\n    - {issuer: i, audience: a, jwks: 'ftp://far.test/k'}\n", 3, "address"),
    (
        "identity:\n  issuers:\n    - {issuer: i, audience: a, jwks: 'https://u:hunter2@f.test/k'}\n",
        3,
        "credentials",
    ),
    ("identity:\n  max_age: soon\n", 2, "duration"),
    ("identity:\n  attach:\n    http: {header: 'X Y'}\n", 3, "header"),
    ("identity:\n  attach:\n    http: {header: Host}\n", 3, "header"),
    ("identity:\n  attach:\n    postgres: {setting: role}\n", 3, "dot"),
    ("identity:\n  attach:\n    postgres: {setting: 'a.b; drop'}\n", 3, "dot"),
    ("identity:\n  attach:\n    postgres: {application_name: '{subjct}'}\n", 3, "{subject}"),
    ("identity:\n  attach:\n    mysql: {}\n", 3, "mysql"),
    ("targets:\n  - {name: a, host: a.test}\n  - {name: a, host: b.test}\n", 3, "twice"),
    ("targets:\n  - {name: a, hots: a.test}\n", 2, "host"),
    ("targets:\n  - {name: a}\n", 2, "host"),
    ("targets:\n  - {name: a, host: a.test, port: 0}\n", 2, "no TCP port"),
    ("targets:\n  - {name: a, host: 'a.*.test'}\n", 2, "*.internal"),
    ("targets:\n  - {name: a, host: 'a b'}\n", 2, "host name"),
    ("targets:\n  - {name: a, host: 10.0.0.1/8}\n", 2, "host bits"),
    ("targets:\n  - {name: a, host: a.test, protocol: postgresql}\n", 2, "postgres"),
    ("targets:\n  - {name: a, host: a.test, protocol: http, pooler: transaction}\n", 2, "pooler"),
    (
        "targets:\n  - {name: a, host: a.test, protocol: postgres, tls: {mode: verify_full}}\n",
        2,
        "verify-full",
    ),
    ("targets:\n  - {name: a, host: a.test, protocol: postgres, tls: {}}\n", 2, "mode"),
    (
        "targets:\n  - {name: a, host: a.test, protocol: postgres, tls: {mode: disable, ca: x}}\n",
        2,
        "contradicts",
    ),
    (
        "targets:\n  - name: a\n    host: a.test\n    credentials: {user: u, password: {file: /x}}\n",
        4,
        "not supported yet",
    ),
    ("policy: [a]\n", 1, "policy"),
    ("audit:\n  max_bytes: 1 zebibyte\n", 2, "size"),
    ("audit:\n  max_bytes: 4096\n", 2, "outside"),
    ("audit:\n  max_bytes: -1\n", 2, "negative"),
    ("audit:\n  on_full: blok\n", 2, "block"),
    ("audit:\n  sync: always\n", 2, "strict"),
    ("audit:\n  responses: {max_rows: -1}\n", 2, "outside"),
    ("audit:\n  requests: {max_bytes: 1TiB}\n", 2, "outside"),
    ("audit:\n  request: {}\n", 2, "requests"),
    ("upstream: {}\n", 1, "url"),
    ("upstream:\n  url: audit.test:8420\n", 2, "http"),
    ("upstream:\n  url: 'https://host:port/'\n", 2, "address"),
    ("upstream:\n  url: 'https://u:hunter2@host/'\n", 2, "credentials"),
    ("masks:\n  hash_key: hunter2\n", 2, "hash_key"),
    ("masks:\n  hash_key: {path: /x}\n", 2, "file"),
    ("tls: {authority: {directory: ''}}\n", 1, "empty"),
    ("tls:\n  authority:\n    lifetime: 1h\n", 3, "3650d"),
    ("tls:\n  authority:\n    lifetime: 9000d\n", 3, "more than"),
    ("tls:\n  authority:\n    lifetime: long\n", 3, "duration"),
    ("tls:\n  authority:\n    leaf_lifetime: 5m\n", 3, "24h"),
    ("tls:\n  authority:\n    leaf_lifetime: 365d\n", 3, "more than"),
    ("tls:\n  authority:\n    lifetime: 1d\n    leaf_lifetime: 2d\n", 4, "tls.authority.lifetime"),
    ("tls:\n  authority:\n    permitted: ['*.corp.example']\n", 3, "corp.example covers itself"),
    ("tls:\n  authority:\n    permitted:\n      - a.example\n      - 10.0.0.1/8\n", 5, "host bits"),
    ("tls:\n  authority:\n    permitted: ['a b']\n", 3, "such as corp.example"),
    ("tls:\n  authority:\n    permited: []\n", 3, "permitted"),
    ("tls: {mode: require}\n", 1, "authority"),
    ("steering: [\n", 2, "YAML"),
    ("steering: {scope: all}\nsteering: {scope: exec}\n", 2, "twice"),
    ("- a\n- b\n", 1, "a mapping (name: value) is expected here, not a list"),
    ("just text\n", 1, "a mapping (name: value) is expected here, not a text"),
    ("a: &x {}\nb: *x\n", None, "aliases"),
    ("version: 1\nrules: []\n", 2, "this is a policy, not a configuration"),
    ("steering:\n  ports: {'5432': postgres}\n", 2, "without quotes"),
    ("steering:\n  scope: everyone\n", 2, "{cgroups: …}"),
    ("steering:\n  exclude: 10.0.0.0/8\n", 2, "write [a, b]"),
    ("identity:\n  required: 'true'\n", 2, "without quotes"),
    ("identity:\n  sources:\n    - file: {path: /run/{uid}}\n", 3, "not quoted"),
    ("masks: {hash_key: hunter2}\n", 1, "write {file: …}"),
    ("upstream: {url: 'ftp://u:hunter2@f.test'}\n", 1, "such as https://"),
]


@pytest.mark.parametrize(("text", "line", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(load: Any, tmp_path: Path, text: str, line: int | None, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(text)
    error = caught.value
    assert error.exit_code == 2
    assert error.file == str(tmp_path / "sidecar.yaml")
    assert error.hint
    assert words in f"{error} {error.hint}"
    assert "hunter2" not in f"{error} {error.hint or ''}"
    if line is not None:
        assert error.line == line
        assert str(error).startswith(f"{error.file}:{line}: ")


def test_no_hint_turns_a_setting_into_its_opposite(load: Any) -> None:
    """`drop` is the nearest word to `stop`, and would lose records."""
    with pytest.raises(ConfigurationError) as caught:
        load("audit: {on_full: stop}\n")
    assert caught.value.hint == "valid: block, drop"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigurationError, match=re.escape(str(path))):
            load_config(path)
    (tmp_path / "binary.yaml").write_bytes(b"steering: {}\n\xff\xfe\n")
    with pytest.raises(ConfigurationError, match=r"binary.yaml:2: .*UTF-8"):
        load_config(tmp_path / "binary.yaml")


# -- documentation


def settings_of(info: msgspec.inspect.Type, path: tuple[str, ...] = ()) -> set[str]:
    """Dotted names of all settings below a type, lists left out."""
    match info:
        case msgspec.inspect.StructType():
            found = {".".join((*path, item.encode_name)) for item in info.fields}
            for item in info.fields:
                found |= settings_of(item.type, (*path, item.encode_name))
            return found
        case msgspec.inspect.UnionType():
            return set().union(*(settings_of(option, path) for option in info.types))
        case msgspec.inspect.VarTupleType():
            return settings_of(info.item_type, path)
    return set()


SETTINGS = settings_of(msgspec.inspect.type_info(ConfigurationDocument))
PAGE = (ROOT / "docs" / "configuration.md").read_text()
SECTIONS = {"steering", "identity", "targets", "audit", "masks", "tls"}


@pytest.mark.parametrize("name", sorted(SETTINGS - SECTIONS))
def test_every_setting_is_documented(name: str) -> None:
    assert f"| `{name}` |" in PAGE


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_every_section_has_a_heading(name: str) -> None:
    assert f"\n## {name}\n" in PAGE


def test_nothing_is_documented_that_is_not_there() -> None:
    assert set(re.findall(r"^\| `([a-z_.]+)` \|", PAGE, re.MULTILINE)) <= SETTINGS


def test_what_is_not_supported_yet_of_the_contract_is_said() -> None:
    assert ("targets", "*", "credentials") in NOT_YET
    assert "`targets.credentials` is not supported yet" in PAGE
    assert "`spiffe` is not supported yet" in PAGE


def test_the_example_names_every_setting() -> None:
    text = (ROOT / "examples" / "sidecar.yaml").read_text()
    for name in SETTINGS:
        assert re.search(rf"(?<![a-z_]){re.escape(name.rpartition('.')[2])}:", text), name
