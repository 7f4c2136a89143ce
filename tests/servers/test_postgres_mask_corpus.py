"""The corpus against a real server: no masked value comes back in any dress, and what is clean comes back as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sidecar.model.flow import Address
from sidecar.policy import load_policy
from sidecar.session.postgres import PostgresSession
from tests.support import postgres_wire as wire
from tests.support.free_port import free_port
from tests.support.mask_corpus import ALLOWED, ERRORS, POLICY, REFUSED, RESULTS, SCHEMA
from tests.support.postgres_server import PostgresServer
from tests.support.random_queries import RandomQueries
from tests.support.session_relay import SessionRelay

pytestmark = pytest.mark.servers

SECRETS = (b"zq7wk", b"kw7qz", b"7a7137776b", b"enE3d2st", b"918273", b"411111111111")
"""As stored, reversed, in hexadecimal, in base64; salaries; card numbers."""
Answer = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(port=free_port()) as running:
        running.sql(SCHEMA)
        yield running


@pytest.fixture(scope="module")
def direct(server: PostgresServer) -> Iterator[wire.Wire]:
    with wire.Wire(Address("127.0.0.1", server.port), user="postgres") as client:
        client.ask(wire.query("SET statement_timeout = '2s'"))
        yield client


@pytest.fixture(scope="module")
def steered(server: PostgresServer) -> Iterator[wire.Wire]:
    engine = load_policy(POLICY, "policy.yaml")
    with (
        SessionRelay(PostgresSession, engine, Address("127.0.0.1", server.port)) as relay,
        wire.Wire(relay.address, user="postgres") as client,
    ):
        yield client


def ask(client: wire.Wire, text: str, *, extended: bool) -> Answer:
    """In a transaction that is rolled back."""
    client.ask(wire.query("BEGIN"))
    if extended:
        parts = (wire.parse(text), wire.bind(formats=(1,)), wire.describe(), wire.execute(), wire.SYNC)
        found = client.ask(*parts)
    else:
        found = client.ask(wire.query(text))
    client.ask(wire.query("ROLLBACK"))
    return found


def is_masked(value: bytes | None) -> bool:
    return value is None or value == b"[redacted]" or value.startswith(b"*****")


def revealed(found: Answer) -> list[bytes]:
    whole = b"".join(body for _, body in found).lower()
    return [secret for secret in SECRETS if secret.lower() in whole]


@pytest.mark.parametrize("extended", [False, True], ids=["text", "binary"])
@pytest.mark.parametrize(("text", "columns"), RESULTS, ids=[text for text, _ in RESULTS])
def test_only_what_is_masked_is_masked(
    direct: wire.Wire, steered: wire.Wire, text: str, columns: str, extended: bool
) -> None:
    expected, found = ask(direct, text, extended=extended), ask(steered, text, extended=extended)
    assert not wire.errors(expected), wire.errors(expected)
    assert not wire.errors(found), wire.errors(found)
    if "EXPLAIN" not in text:
        assert not revealed(found)
    rows, plain = wire.rows(found), wire.rows(expected)
    assert len(rows) == len(plain)
    for row, original in zip(rows, plain, strict=True):
        shown = "".join(
            "c" if value == given and kind == "c" else "m" if is_masked(value) else "c"
            for value, given, kind in zip(row, original, columns, strict=True)
        )
        assert shown == columns, row


@pytest.mark.parametrize("text", REFUSED)
def test_nothing_moves_a_masked_column(steered: wire.Wire, text: str) -> None:
    found = ask(steered, text, extended=False)
    (error,) = wire.errors(found)
    assert error["C"] == "42501", error
    assert "denied by policy: pii" in error["M"]
    assert not revealed(found)


@pytest.mark.parametrize("text", ALLOWED)
def test_what_moves_no_masked_column_goes_on(steered: wire.Wire, text: str) -> None:
    steered.ask(wire.query("BEGIN"))
    if text.endswith("STDIN"):
        steered.ask(wire.query("CREATE TABLE harmless_copy (a text)"))
        steered.send(wire.query(text), wire.message(b"d", b"x\n"), wire.message(b"c"))
        found = steered.until_ready()
    else:
        found = steered.ask(wire.query(text))
    steered.ask(wire.query("ROLLBACK"))
    assert not wire.errors(found), wire.errors(found)
    assert not revealed(found)


@pytest.mark.parametrize("extended", [False, True], ids=["text", "binary"])
@pytest.mark.parametrize(("text", "state"), ERRORS)
def test_no_error_or_notice_quotes_a_masked_value(
    direct: wire.Wire, steered: wire.Wire, text: str, state: str, extended: bool
) -> None:
    assert revealed(ask(direct, text, extended=extended)), "the server itself does not show it"
    found = ask(steered, text, extended=extended)
    said = [wire.fields(body) for kind, body in found if kind in "EN"]
    assert [fields["C"] for fields in said] == [state]
    assert not revealed(found)


def test_errors_that_quote_no_masked_value_stay_as_they_are(direct: wire.Wire, steered: wire.Wire) -> None:
    for text in (
        "SELECT 'x1'::int",
        "SELECT nobody FROM customers",
        "SELECT ssn::int FROM orders",
        "SELECT 1 / 0",
    ):
        assert wire.errors(ask(steered, text, extended=False)) == wire.errors(
            ask(direct, text, extended=False)
        )


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_random_query_reveals_a_masked_value(direct: wire.Wire, steered: wire.Wire, seed: int) -> None:
    source, answered, would_show = RandomQueries(seed), 0, 0
    for _ in range(60):
        text = source.query(3, [], [], 2)
        plain = ask(direct, text, extended=False)
        if wire.errors(plain):
            continue
        answered += 1
        would_show += bool(revealed(plain))
        found = ask(steered, text, extended=False)
        assert not wire.errors(found), text
        assert not revealed(found), text
    assert answered > 20
    assert would_show > 5


def test_the_corpus_is_as_large_as_is_promised() -> None:
    assert len(RESULTS) + len(REFUSED) + len(ALLOWED) >= 150
