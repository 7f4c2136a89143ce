"""Definitions that change under an open connection, and how strictly the document wants masks kept: against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(port=free_port()) as running:
        yield running


@contextmanager
def steered(server: PostgresServer, **options: str) -> Iterator[wire.Wire]:
    server.sql(SCHEMA)
    lines = "".join(f"{name}: {word}\n" for name, word in options.items())
    engine = load_policy(POLICY.replace("version: 1\n", f"version: 1\n{lines}"), "policy.yaml")
    with (
        SessionRelay(PostgresSession, engine, Address("127.0.0.1", server.port)) as relay,
        wire.Wire(relay.address, user="postgres") as client,
    ):
        yield client


@pytest.fixture
def client(server: PostgresServer) -> Iterator[wire.Wire]:
    with steered(server) as running:
        yield running


def values(client: wire.Wire, text: str) -> list[list[bytes | None]]:
    found = client.ask(wire.query(text))
    assert not wire.errors(found), wire.errors(found)
    return wire.rows(found)


def refused(client: wire.Wire, text: str) -> str:
    (error,) = wire.errors(client.ask(wire.query(text)))
    assert error["C"] == "42501", error
    return error["M"]


@pytest.mark.parametrize("begin", ["BEGIN", "SELECT 1"])
@pytest.mark.parametrize(
    ("change", "relation"),
    [
        ("CREATE VIEW fresh AS SELECT ssn AS name FROM customers", "fresh"),
        ("CREATE OR REPLACE VIEW harmless AS SELECT id, ssn AS name FROM customers", "harmless"),
        ("CREATE TABLE fresh () INHERITS (customers); INSERT INTO fresh (id, name) VALUES (1, 'zq7wk-x')", "fresh"),
    ],
)  # fmt: skip
def test_a_definition_counts_from_its_statement_on(
    client: wire.Wire, begin: str, change: str, relation: str
) -> None:
    values(client, begin)
    values(client, change)
    if "INHERITS" not in change:
        assert set(map(tuple, values(client, f"SELECT upper(name) FROM {relation}"))) == {(b"[redacted]",)}
        assert "pii" in refused(client, f"INSERT INTO sink SELECT name FROM {relation}")
    else:
        assert values(client, f"SELECT ssn FROM {relation}") == [[None]]


def test_a_view_on_a_view_is_not_trusted_when_the_inner_one_is_replaced(client: wire.Wire) -> None:
    values(client, "CREATE VIEW outermost AS SELECT name AS shown FROM harmless")
    assert values(client, "SELECT upper(shown) FROM outermost")[0] == [b"NAME 1"]
    values(client, "BEGIN")
    values(client, "CREATE OR REPLACE VIEW harmless AS SELECT id, ssn AS name FROM customers")
    assert values(client, "SELECT upper(shown) FROM outermost")[0] == [b"[redacted]"]
    assert "pii" in refused(client, "COPY (SELECT * FROM outermost) TO STDOUT")


def test_a_job_that_stages_its_data_in_one_transaction_is_not_hindered(client: wire.Wire) -> None:
    for text in (
        "BEGIN",
        "CREATE TEMP TABLE stage AS SELECT id, name FROM customers",
        "CREATE INDEX ON stage (id)",
        "ALTER TABLE stage ADD COLUMN extra text",
        "UPDATE stage SET extra = upper(name)",
        "INSERT INTO sink SELECT name, extra FROM stage",
        "INSERT INTO sink SELECT name, total::text FROM customers c JOIN orders o ON o.customer_id = c.id",
        "COMMIT",
    ):
        values(client, text)
    assert values(client, "SELECT max(a), count(*) FROM sink") == [[b"name 3", b"5"]]


def test_a_function_made_meanwhile_under_a_name_of_postgresqls_is_not_trusted(client: wire.Wire) -> None:
    assert values(client, "SELECT initcap('a')") == [
        [b"[redacted]"]
    ]  # other.initcap is there from the beginning
    assert values(client, "SELECT reverse('ab')") == [[b"ba"]]
    values(client, "BEGIN")
    values(client, "CREATE FUNCTION reverse(int) RETURNS text LANGUAGE sql AS 'SELECT ''x''::text'")
    assert values(client, "SELECT reverse(1)") == [[b"x"]]  # its body was seen, and reads nothing
    values(
        client,
        "CREATE FUNCTION reverse(bool) RETURNS text LANGUAGE sql AS 'SELECT max(secret) FROM public.people'",
    )
    assert values(client, "SELECT reverse(true)") == [[b"[redacted]"]]
    assert values(client, "SELECT reverse(1)") == [[b"[redacted]"]]  # one of the name may read it


def test_what_a_block_of_code_may_have_defined_is_masked_until_it_is_known(client: wire.Wire) -> None:
    values(client, "BEGIN")
    values(client, "DO $$ BEGIN CREATE TEMP TABLE block (); END $$")
    assert values(client, "SELECT upper(name), 1 + 1 FROM harmless")[0] == [b"[redacted]", b"2"]
    values(client, "COMMIT")
    assert values(client, "SELECT upper(name) FROM harmless")[0] == [b"NAME 1"]


def test_on_derived_deny(server: PostgresServer) -> None:
    with steered(server, on_derived="deny") as client:
        assert "made from a masked column" in refused(client, "SELECT upper(ssn) FROM customers")
        assert "made from a masked column" in refused(client, "SELECT upper(secret) FROM people")
        assert values(client, "SELECT ssn, upper(name), count(*) FROM customers GROUP BY 1, 2 ORDER BY 2")[0] == [
            b"[redacted]", b"NAME 1", b"1"
        ]  # fmt: skip
        assert values(client, "SELECT secret FROM people")[0] == [b"[redacted]"]


def test_on_opaque_deny_and_allow(server: PostgresServer) -> None:
    with steered(server, on_opaque="deny") as client:
        for text in ("SELECT peek()", "DO $$ BEGIN END $$", "SELECT 1 WHERE peek() = ''", "SELECT 1 %% 2"):
            assert "looked into" in refused(client, text)
        assert values(client, "SELECT upper(name) FROM customers")[0] == [b"NAME 1"]
    with steered(server, on_opaque="allow") as client:
        assert values(client, "SELECT other.initcap(1) IS NULL") == [[b"f"]]
        values(client, "INSERT INTO sink SELECT peek()")
        assert values(client, "SELECT secret_error(ssn) FROM customers WHERE false") == []
        assert values(client, "SELECT upper(ssn), 1 FROM customers")[0] == [b"[redacted]", b"1"]


def test_predicates_deny(server: PostgresServer) -> None:
    with steered(server, predicates="deny") as client:
        for text in (
            "SELECT 1 FROM customers WHERE ssn LIKE 'z%'",
            "SELECT count(*) FROM customers GROUP BY ssn",
            "SELECT id FROM customers ORDER BY ssn",
            "SELECT id FROM customers c JOIN numbers ON c.ssn = n::text",
            "SELECT count(*) FROM customers HAVING max(ssn) > 'a'",
            "SELECT name FROM people WHERE secret = 'a'",
            "UPDATE customers SET name = 'a' WHERE ssn = 'a'",
            "DELETE FROM customers WHERE ssn = 'a'",
            "SELECT row_number() OVER (ORDER BY ssn) FROM customers",
            "SELECT id FROM (SELECT id, ssn AS x FROM customers) q WHERE x > 'a'",
            "SELECT exists(SELECT 1 FROM customers WHERE ssn = 'a')",
        ):
            assert "conditions look at a masked column" in refused(client, text)
        for text in (
            "SELECT ssn FROM customers WHERE id = 1 ORDER BY name",
            "SELECT name, count(*) FROM people GROUP BY name",
            "SELECT ssn FROM orders WHERE ssn = 'open-1'",
            "SELECT ssn AS id, name AS ssn FROM customers ORDER BY 2, ssn",
        ):
            assert values(client, text)


LEAKS = {
    "a parent": (
        "CREATE TABLE parent_free (id int, name text, ssn text, card varchar(20), born date, note text); "
        "ALTER TABLE customers INHERIT parent_free",
        ["SELECT ssn FROM parent_free", "SELECT upper(ssn) FROM parent_free"],
    ),
    "a partition": (
        "CREATE TABLE parted (id int, boss int, salary numeric) PARTITION BY RANGE (id); "
        "ALTER TABLE parted ATTACH PARTITION staff DEFAULT",
        ["SELECT salary FROM parted", "SELECT salary::text FROM parted"],
    ),
    "a cast": (
        "CREATE TYPE word AS ENUM ('a'); CREATE FUNCTION worded(word) RETURNS text LANGUAGE sql AS 'SELECT other.initcap(1)'; "
        "CREATE CAST (word AS text) WITH FUNCTION worded(word)",
        ["SELECT 'a'::word::text", "SELECT CAST('a'::word AS text)", "SELECT ('{a}'::word[]::text[])[1]"],
    ),
    "a cast that nobody wrote": (
        "CREATE TYPE word AS ENUM ('a'); CREATE FUNCTION worded(word) RETURNS text LANGUAGE sql AS 'SELECT other.initcap(1)'; "
        "CREATE CAST (word AS text) WITH FUNCTION worded(word) AS IMPLICIT",
        ["SELECT upper('a'::word)", "SELECT reverse('a'::word)"],
    ),
}


@pytest.mark.parametrize("name", LEAKS)
@pytest.mark.parametrize("made", ["before", "in", "in a transaction"])
def test_what_shows_a_masked_column_in_another_way(server: PostgresServer, made: str, name: str) -> None:
    definitions, queries = LEAKS[name]
    server.sql(SCHEMA)
    if made == "before":
        server.sql("DROP TYPE IF EXISTS word CASCADE; " + definitions)
    engine = load_policy(POLICY, "policy.yaml")
    with (
        SessionRelay(PostgresSession, engine, Address("127.0.0.1", server.port)) as relay,
        wire.Wire(relay.address, user="postgres") as client,
    ):
        if made != "before":
            for text in [*(["BEGIN"] if "transaction" in made else []), *definitions.split("; ")]:
                values(client, text)
        for text in queries:
            assert {row[0] for row in values(client, text)} <= {b"[redacted]", None}, text


def test_a_child_that_is_masked_masks_no_sister(server: PostgresServer) -> None:
    server.sql(SCHEMA)
    server.sql(
        "CREATE TABLE parent_free (ssn text); ALTER TABLE customers INHERIT parent_free; "
        "CREATE TABLE sister () INHERITS (parent_free); INSERT INTO sister VALUES ('open')"
    )
    with (
        SessionRelay(
            PostgresSession, load_policy(POLICY, "policy.yaml"), Address("127.0.0.1", server.port)
        ) as relay,
        wire.Wire(relay.address, user="postgres") as client,
    ):
        assert values(client, "SELECT ssn FROM sister") == [[b"open"]]
        assert values(client, "SELECT ssn FROM ONLY parent_free") == []
        assert {row[0] for row in values(client, "SELECT ssn FROM parent_free")} == {b"[redacted]"}


@pytest.mark.parametrize(
    "text",
    [
        "ALTER SCHEMA public RENAME TO pub2",
        "DO $$ BEGIN ALTER SCHEMA public RENAME TO pub2; END $$",
        "DO $$ BEGIN INSERT INTO sink(a) SELECT secret FROM people; END $$",
        "DO $$ BEGIN CREATE TABLE z AS SELECT x AS g FROM kept; END $$",
        "DO $$ BEGIN INSERT INTO sink(a) VALUES (peek()); END $$",
        "CREATE FUNCTION f3() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.a := (SELECT x FROM kept LIMIT 1); RETURN NEW; END'",
        "CREATE FUNCTION f4() RETURNS trigger LANGUAGE plpgsql AS "
        "'DECLARE r sink; BEGIN SELECT x, x INTO r FROM kept; RETURN r; END'",
        "CREATE PROCEDURE f5() LANGUAGE sql BEGIN ATOMIC INSERT INTO sink SELECT x FROM kept; END",
        "CREATE RULE r AS ON UPDATE TO numbers DO ALSO INSERT INTO sink SELECT x FROM kept",
        "CREATE TABLE dt (a text DEFAULT spied(1), b int)",
        "CREATE TABLE dt (b int, a text GENERATED ALWAYS AS (spied(b)) STORED)",
        "ALTER TABLE numbers ADD COLUMN a text DEFAULT spied(1)",
        "ALTER TABLE numbers ALTER COLUMN n SET DEFAULT length(peek())",
        "CREATE DOMAIN dm AS text DEFAULT spied(1)",
        "SELECT setval('counter', salary::bigint) FROM staff",
        "SELECT pg_advisory_lock(salary::bigint) FROM staff",
        "SELECT (salary::bigint).pg_try_advisory_lock FROM staff",
        "SELECT lo_create(salary::int::oid) FROM staff",
        "SELECT pg_create_physical_replication_slot(replace(ssn, '-', '_')) FROM customers",
        "SELECT pg_replication_origin_create(ssn) FROM customers",
        "SELECT name FROM harmless WHERE EXISTS (SELECT pg_notify('a', ssn) FROM customers)",
        "COPY (SELECT count(pg_notify('a', ssn)) FROM customers) TO STDOUT",
        "CREATE TABLE c AS WITH q AS (INSERT INTO sink SELECT ssn FROM customers RETURNING 1) SELECT 1 AS a FROM q",
        "SELECT setseed(salary::float / 1000000) FROM staff",
    ],
)
def test_what_would_put_a_masked_column_elsewhere(client: wire.Wire, text: str) -> None:
    assert "mask" in refused(client, text)


def test_work_beside_it_goes_on(client: wire.Wire) -> None:
    for text in (
        "CREATE SEQUENCE counter",
        "SELECT setval('counter', max(id)) FROM customers",
        "SELECT pg_advisory_lock(7), pg_advisory_unlock(7)",
        "CREATE TABLE dt (a int DEFAULT nextval('counter'), b timestamptz DEFAULT now(), c text CHECK (c <> spied(1)))",
        "ALTER TABLE dt ADD COLUMN d text DEFAULT upper('x'), ADD COLUMN e int GENERATED ALWAYS AS (a + 1) STORED",
        "INSERT INTO dt (c) VALUES ('x')",
        "DO $$ BEGIN INSERT INTO sink(a) SELECT name FROM harmless; END $$",
        "ALTER SCHEMA other RENAME TO other2",
        "ALTER SCHEMA other2 RENAME TO other",
        "CREATE TYPE plain AS ENUM ('a')",
        "SELECT 'a'::plain::text",
    ):
        values(client, text)
    assert values(client, "SELECT upper(c), d, e FROM dt") == [[b"X", b"X", b"5"]]


def test_a_view_over_statistics_shows_none(server: PostgresServer) -> None:
    server.sql(SCHEMA)
    server.sql(
        "CREATE VIEW stats1 AS SELECT tablename AS t, most_common_vals::text AS x, histogram_bounds::text AS h FROM pg_stats; "
        "CREATE VIEW stats2 AS SELECT stavalues1::text AS x FROM pg_statistic; ANALYZE"
    )
    with (
        SessionRelay(
            PostgresSession, load_policy(POLICY, "policy.yaml"), Address("127.0.0.1", server.port)
        ) as relay,
        wire.Wire(relay.address, user="postgres") as client,
    ):
        found = values(client, "SELECT t, x, h FROM stats1 WHERE t = 'customers'")
        assert {row[0] for row in found} == {b"customers"}
        assert {cell for row in found for cell in row[1:]} <= {b"[redacted]", None}
        assert {row[0] for row in values(client, "SELECT x FROM stats2")} <= {b"[redacted]", None}
        assert {row[0] for row in values(client, "SELECT upper(x) FROM stats1")} <= {b"[redacted]", None}


def test_what_decides_about_rows_is_a_condition(server: PostgresServer) -> None:
    with steered(server, predicates="deny") as client:
        for text in (
            "SELECT count(*) FROM staff, generate_series(1, salary::int - 918000)",
            "SELECT count(*) FROM (SELECT generate_series(1, salary::int - 918000) FROM staff) q",
            "SELECT name FROM customers c WHERE EXISTS (SELECT c.ssn INTERSECT SELECT 'x')",
            "SELECT name FROM customers c WHERE EXISTS (SELECT c.ssn EXCEPT SELECT 'x')",
            "SELECT (SELECT count(*) FROM (SELECT c.ssn UNION SELECT 'x') u) FROM customers c",
            "SELECT count(*) FROM (SELECT DISTINCT ssn FROM customers) q",
            "SELECT count(DISTINCT ssn) FROM customers",
            "SELECT name FROM customers c WHERE EXISTS (SELECT 1 FROM customers d WHERE d.ssn = 'x')",
            "SELECT name FROM customers c ORDER BY EXISTS (SELECT 1 FROM numbers WHERE c.ssn = 'x')",
        ):
            assert "conditions" in refused(client, text), text
        assert values(client, "SELECT count(*) FROM customers, generate_series(1, id)") == [[b"6"]]
        assert len(values(client, "SELECT name FROM customers UNION SELECT 'x'")) == 4
