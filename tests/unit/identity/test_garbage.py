"""Whatever a job, an issuer or a host puts before us: only the errors that are meant."""

from __future__ import annotations

import contextlib
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.attribution import cgroup
from sidecar.attribution.ci import ci_job_in
from sidecar.attribution.lineage import places
from sidecar.attribution.procfs import parse_environ
from sidecar.attribution.redaction import redact_cmdline
from sidecar.errors import IdentityError
from sidecar.identity.keys import parse_jwks
from sidecar.identity.verify import REASONS, peek
from tests.support.tokens import b64url, new_key

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
PARTS = st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode())
JWK = new_key("ec", "ES256").public_jwk()


@given(st.lists(PARTS, min_size=1, max_size=5).map(lambda parts: ".".join(map(b64url, parts))) | st.text())
def test_tokens(text: str) -> None:
    reason = None
    try:
        header, claims = peek(text)
    except IdentityError as error:
        reason = error.reason
    assert reason in REASONS or (isinstance(header, dict) and isinstance(claims, dict))


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_key_sets(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_jwks(raw)


@given(st.dictionaries(st.sampled_from(sorted(JWK)), JSON, max_size=3))
def test_keys_with_one_part_replaced(changed: dict[str, object]) -> None:
    with contextlib.suppress(ValueError):
        parse_jwks(json.dumps({"keys": [{**JWK, **changed}]}).encode())


@settings(max_examples=200)
@given(st.lists(st.text(max_size=60), max_size=6).map(tuple))
def test_redaction_is_total_and_stable(arguments: tuple[str, ...]) -> None:
    once = redact_cmdline(arguments)
    assert len(once) == len(arguments)
    assert redact_cmdline(once) == once


@given(
    st.sampled_from(["--password", "-p", "--token=", "PGPASSWORD=", "password: "]),
    st.text("ab1'\"=: -", max_size=30),
)
def test_redacting_twice_changes_nothing(before: str, after: str) -> None:
    once = redact_cmdline(("mysql", before + after, after))
    assert redact_cmdline(once) == once


@given(st.binary(), st.text())
def test_procfs_texts(raw: bytes, text: str) -> None:
    parse_environ(raw)
    ci_job_in(b"GITHUB_ACTIONS=true\0" + raw)
    for path in (*cgroup.naming_paths(text), *places(text), text):
        cgroup.unit_of(path)
        cgroup.container_of(path)
    cgroup.unified_path(text)
