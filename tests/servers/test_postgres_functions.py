"""What functions and triggers can read, by their bodies; and which messages of the server pass: against a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sidecar.model.flow import Address
from sidecar.policy import load_policy
from sidecar.session.postgres import PostgresSession
from tests.support import postgres_wire as wire
from tests.support.free_port import free_port
from tests.support.mask_corpus import POLICY, SCHEMA
from tests.support.postgres_server import PostgresServer
from tests.support.session_relay import SessionRelay

pytestmark = pytest.mark.servers


FUNCTIONS = """
    CREATE FUNCTION twice(int) RETURNS int LANGUAGE sql AS 'SELECT $1 * 2';
    CREATE FUNCTION of_view() RETURNS text LANGUAGE sql AS 'SELECT max(s2) FROM public.of_view';
    CREATE FUNCTION through() RETURNS text LANGUAGE plpgsql AS 'BEGIN RETURN public.of_view(); END';
    CREATE FUNCTION dynamic(text) RETURNS text LANGUAGE plpgsql AS 'DECLARE r text; BEGIN EXECUTE $1 INTO r; RETURN r; END';
    CREATE FUNCTION fetching(c refcursor) RETURNS text LANGUAGE plpgsql AS 'DECLARE r text; BEGIN FETCH c INTO r; RETURN r; END';
    CREATE FUNCTION atomic() RETURNS text LANGUAGE sql BEGIN ATOMIC SELECT max(ssn) FROM public.customers; END;
    CREATE FUNCTION escaped() RETURNS text LANGUAGE sql AS 'SELECT max(U&"\\0073sn") FROM public.U&"\\0063ustomers"';
    CREATE AGGREGATE summed(int) (SFUNC = int4pl, STYPE = int);
    CREATE FUNCTION keep(text, text) RETURNS text LANGUAGE sql AS 'SELECT max(ssn) FROM public.customers';
    CREATE AGGREGATE leaking(text) (SFUNC = keep, STYPE = text);
    CREATE OPERATOR ## (LEFTARG = int, RIGHTARG = int, FUNCTION = int4pl);
    CREATE FUNCTION by_operator() RETURNS text LANGUAGE sql AS 'SELECT 1 OPERATOR(public.%%) 2';
    CREATE FUNCTION harmless_trigger() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE NOTICE ''new %'', NEW.n; RETURN NEW; END';
    CREATE FUNCTION telling_trigger() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE NOTICE ''%'', (SELECT max(ssn) FROM public.customers); RETURN NEW; END';
    CREATE TABLE quiet (n int CHECK (n < 10)); CREATE TRIGGER t BEFORE INSERT ON quiet FOR EACH ROW EXECUTE FUNCTION harmless_trigger();
    CREATE TABLE telling (n int); CREATE TRIGGER t BEFORE INSERT ON telling FOR EACH ROW EXECUTE FUNCTION telling_trigger();
    CREATE TABLE late (id int, ssn text UNIQUE DEFERRABLE INITIALLY DEFERRED);
"""


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(port=free_port()) as running:
        running.sql(SCHEMA)
        running.sql(FUNCTIONS)
        yield running


@pytest.fixture
def client(server: PostgresServer) -> Iterator[wire.Wire]:
    engine = load_policy(POLICY.replace("public.staff.salary: null", "public.staff.salary: null, public.late.ssn: redact"), "policy.yaml")  # fmt: skip
    with (
        SessionRelay(PostgresSession, engine, Address("127.0.0.1", server.port)) as relay,
        wire.Wire(relay.address, user="postgres") as running,
    ):
        yield running


def values(client: wire.Wire, text: str) -> list[list[bytes | None]]:
    found = client.ask(wire.query(text))
    assert not wire.errors(found), wire.errors(found)
    return wire.rows(found)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("SELECT twice(id) FROM orders WHERE id = 1", b"2"),
        ("SELECT summed(id) FROM orders", b"3"),
        ("SELECT 1 ## 2", b"3"),
        ("SELECT twice(length(ssn)) FROM customers LIMIT 1", None),
        ("SELECT of_view()", b"[redacted]"),
        ("SELECT through()", b"[redacted]"),
        ("SELECT dynamic('SELECT 1')", b"[redacted]"),
        ("SELECT fetching('c')", b"[redacted]"),
        ("SELECT atomic()", b"[redacted]"),
        ("SELECT escaped()", b"[redacted]"),
        ("SELECT leaking(name) FROM customers", b"[redacted]"),
        ("SELECT 1 %% 2", b"[redacted]"),
        ("SELECT by_operator()", b"[redacted]"),
    ],
)
def test_a_function_is_clean_where_its_body_says_so(
    client: wire.Wire, text: str, shown: bytes | None
) -> None:
    values(client, "BEGIN")
    values(client, "DECLARE c CURSOR FOR SELECT ssn FROM customers")
    assert values(client, text) == [[shown]]


def test_only_what_could_quote_a_masked_column_is_withheld(client: wire.Wire, server: PostgresServer) -> None:
    with wire.Wire(Address("127.0.0.1", server.port)) as direct:
        for text in (
            "DROP TABLE IF EXISTS nowhere",
            "CREATE TABLE quiet (n int)",
            "ALTER FUNCTION nowhere(int) RENAME TO elsewhere",
            "INSERT INTO quiet VALUES (3)",
            "INSERT INTO quiet VALUES (30)",
            "SELECT twice(2000000000)",
            "CREATE TEMP TABLE made AS SELECT 'x1' AS t",
            "SELECT t::int FROM made",
            "DO $$ BEGIN RAISE NOTICE '%', twice(3); END $$",
            "COMMENT ON COLUMN customers.nothing IS 'x'",
        ):
            found, plain = (
                [item for item in one.ask(wire.query(text)) if item[0] in "EN"] for one in (client, direct)
            )
            assert found == plain, text
        for text in ("INSERT INTO telling VALUES (1)", "DO $$ BEGIN RAISE NOTICE '%', (SELECT max(secret) FROM people); END $$"):  # fmt: skip
            found = client.ask(wire.query(text))
            assert not any(b"zq7wk" in body for _, body in found)
            assert any(kind == "N" and b"withheld" in body for kind, body in found)


def test_what_is_checked_at_commit_is_withheld(client: wire.Wire) -> None:
    values(client, "BEGIN")
    values(client, "INSERT INTO late VALUES (1, 'zq7wk-1'), (2, 'zq7wk-1')")
    found = client.ask(wire.query("COMMIT"))
    assert wire.errors(found)[0]["C"] == "23505"
    assert not any(b"zq7wk" in body for _, body in found)


def test_tables_of_this_session_are_shown_before_they_are_known(client: wire.Wire) -> None:
    values(client, "BEGIN")
    values(client, "CREATE TEMP TABLE fresh AS SELECT id, name AS n FROM customers")
    assert values(client, "SELECT n, upper(n), ctid FROM fresh WHERE id = 1") == [[b"name 1", b"NAME 1", b"(0,1)"]]  # fmt: skip
    values(client, "CREATE TABLE public.staff_two (salary int, t text)")
    values(client, "INSERT INTO public.staff_two VALUES (1, 'a')")
    assert values(client, "SELECT * FROM staff_two") == [[b"1", b"a"]]
    values(client, "ROLLBACK")
