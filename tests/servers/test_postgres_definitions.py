"""Definitions that another session, or somebody else, changes while a connection is open: against a real server."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from sidecar.model.flow import Address
from sidecar.policy import load_policy
from sidecar.session.postgres import PostgresSession
from sidecar.session.postgres_definitions import CHECK_NS
from tests.support import postgres_wire as wire
from tests.support.free_port import free_port
from tests.support.mask_corpus import POLICY, SCHEMA
from tests.support.postgres_server import PostgresServer
from tests.support.session_relay import SessionRelay

pytestmark = pytest.mark.servers

REPLACED = "CREATE OR REPLACE VIEW shown AS SELECT ssn AS label FROM public.customers"


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(port=free_port()) as running:
        yield running


@pytest.fixture
def relay(server: PostgresServer) -> Iterator[SessionRelay]:
    server.sql(SCHEMA)
    server.sql(
        "CREATE VIEW shown AS SELECT label FROM other.customers; CREATE VIEW outer_one AS SELECT label FROM shown"
    )
    with SessionRelay(
        PostgresSession, load_policy(POLICY, "policy.yaml"), Address("127.0.0.1", server.port)
    ) as running:
        yield running


@pytest.fixture
def one(relay: SessionRelay) -> Iterator[wire.Wire]:
    """It has read the catalog, and sends what goes by the lane."""
    with wire.Wire(relay.address, user="postgres") as client:
        client.ask(wire.parse("SELECT label, upper(label) FROM shown", "named"), wire.SYNC)
        for _ in range(3):
            assert values(client, "SELECT label, upper(label), lower(1::text) FROM shown") == [
                [b"l", b"L", b"1"]
            ]
            found = client.ask(wire.bind(statement="named"), wire.describe(), wire.execute(), wire.SYNC)
            assert wire.rows(found) == [[b"l", b"L"]]
        yield client


@pytest.fixture
def other(relay: SessionRelay) -> Iterator[wire.Wire]:
    with wire.Wire(relay.address, user="postgres") as client:
        yield client


def values(client: wire.Wire, text: str) -> list[list[bytes | None]]:
    found = client.ask(wire.query(text))
    assert not wire.errors(found), wire.errors(found)
    return wire.rows(found)


def shows_nothing(client: wire.Wire) -> None:
    for relation in ("shown", "outer_one"):
        assert set(map(tuple, values(client, f"SELECT label, upper(label) FROM {relation}"))) == {
            (b"[redacted]",) * 2
        }
        for text in (f"COPY {relation} TO STDOUT", f"INSERT INTO sink(a) SELECT label FROM {relation}"):
            assert wire.errors(client.ask(wire.query(text)))[0]["C"] == "42501", text
    found = client.ask(wire.bind(statement="named"), wire.describe(), wire.execute(), wire.SYNC)
    assert not wire.errors(found)
    assert set(map(tuple, wire.rows(found))) == {(b"[redacted]",) * 2}


def test_what_another_session_replaces(one: wire.Wire, other: wire.Wire) -> None:
    values(other, REPLACED)
    shows_nothing(one)
    values(other, "CREATE OR REPLACE VIEW shown AS SELECT label FROM other.customers")
    assert values(one, "SELECT upper(label) FROM shown") == [[b"L"]]


def test_what_another_session_replaces_while_a_transaction_is_open(one: wire.Wire, other: wire.Wire) -> None:
    values(one, "BEGIN")
    values(one, "SELECT 1")
    values(other, REPLACED)
    values(one, "SAVEPOINT s")
    assert {row[1] for row in values(one, "SELECT label, upper(label) FROM shown")} == {b"[redacted]"}
    assert {row[0] for row in values(one, "SELECT label FROM shown")} == {b"[redacted]"}


def test_what_another_session_replaces_in_its_transaction(one: wire.Wire, other: wire.Wire) -> None:
    """Doubtful from when it is sent: its COMMIT may be done before it is answered."""
    values(other, "BEGIN")
    values(other, REPLACED)
    other.send(wire.query("COMMIT"))
    shows_nothing(one)
    other.until_ready()
    shows_nothing(one)


def test_what_another_session_takes_back(one: wire.Wire, other: wire.Wire) -> None:
    values(other, "BEGIN")
    values(other, REPLACED)
    values(other, "ROLLBACK")
    assert values(one, "SELECT label, upper(label) FROM shown") == [[b"l", b"L"]]


def test_a_connection_that_breaks_leaves_no_doubt(one: wire.Wire, relay: SessionRelay) -> None:
    with wire.Wire(relay.address, user="postgres") as broken:
        values(broken, "BEGIN")
        values(broken, REPLACED)
        assert values(broken, "SELECT 1") == [[b"1"]]
    deadline = time.monotonic() + 10
    while values(one, "SELECT upper(label) FROM shown") != [[b"L"]]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_function_of_another_session_under_a_name_of_postgresqls(one: wire.Wire, other: wire.Wire) -> None:
    values(
        other, "CREATE FUNCTION lower(int) RETURNS text LANGUAGE sql AS 'SELECT secret FROM people LIMIT 1'"
    )
    assert values(one, "SELECT lower(1)") == [[b"[redacted]"]]


def test_a_temporary_table_of_another_session_is_no_matter(
    one: wire.Wire, other: wire.Wire, relay: SessionRelay
) -> None:
    (shared,) = relay.databases._known.values()
    version = shared.version
    for text in (
        "CREATE TEMP TABLE t AS SELECT 1 AS a",
        "CREATE TEMP TABLE t2 (a int)",
        "CREATE TEMP VIEW v AS SELECT 1",
    ):
        values(other, text)
    time.sleep(CHECK_NS / 1e9 + 0.1)
    assert values(one, "SELECT upper(label) FROM shown") == [[b"L"]]
    assert shared.version == version


@pytest.mark.parametrize(
    "change",
    [
        REPLACED,
        "CREATE OR REPLACE FUNCTION public.made() RETURNS void LANGUAGE sql AS ''; " + REPLACED,
        "DROP VIEW shown CASCADE; CREATE VIEW shown AS SELECT ssn AS label FROM public.customers; "
        "CREATE VIEW outer_one AS SELECT * FROM shown",
        "CREATE TABLE free (ssn text); ALTER TABLE public.customers INHERIT free; "
        "CREATE OR REPLACE VIEW shown AS SELECT ssn AS label FROM free",
        "ALTER VIEW shown RENAME label TO x; ALTER VIEW outer_one RENAME TO outer_two; CREATE VIEW other.shown AS SELECT 1; "
        "ALTER VIEW shown RENAME TO former; CREATE VIEW shown AS SELECT ssn AS label FROM public.customers; "
        "CREATE VIEW outer_one AS SELECT * FROM shown",
    ],
)  # fmt: skip
def test_what_did_not_pass_here_counts_within_the_interval(
    server: PostgresServer, one: wire.Wire, change: str
) -> None:
    server.sql(change)
    time.sleep(CHECK_NS / 1e9)
    found = values(one, "SELECT label, upper(label) FROM shown")
    assert set(map(tuple, found)) == {(b"[redacted]",) * 2}
    shows_nothing(one)


@pytest.mark.parametrize(
    "change",
    [
        "CREATE OR REPLACE FUNCTION calm() RETURNS text LANGUAGE sql AS 'SELECT secret FROM public.people LIMIT 1'",
        "CREATE OR REPLACE FUNCTION calm() RETURNS text LANGUAGE sql AS 'SELECT ssn FROM public.customers LIMIT 1'",
    ],
)
def test_a_body_that_was_replaced_elsewhere(server: PostgresServer, one: wire.Wire, change: str) -> None:
    server.sql("CREATE FUNCTION calm() RETURNS text LANGUAGE sql AS 'SELECT ''x''::text'")
    time.sleep(CHECK_NS / 1e9)
    assert values(one, "SELECT calm()") == [[b"x"]]
    server.sql(change)
    time.sleep(CHECK_NS / 1e9)
    assert values(one, "SELECT calm()") == [[b"[redacted]"]]


def test_many_sessions_ask_once_an_interval(relay: SessionRelay, one: wire.Wire, other: wire.Wire) -> None:
    (shared,) = relay.databases._known.values()
    time.sleep(CHECK_NS / 1e9)
    values(one, "SELECT 1")
    asked = shared.checked_ns
    for client in (one, other) * 20:
        values(client, "SELECT 1")
    assert shared.checked_ns == asked or time.time_ns() - asked > CHECK_NS
