"""What a hostile or unusual client can do on the wire, against a real server: nothing runs unjudged, nothing leaks."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from sidecar.codecs.postgres import messages
from sidecar.model.flow import Address
from sidecar.policy import load_policy
from sidecar.session.postgres import PostgresSession
from tests.support.free_port import free_port
from tests.support.postgres_server import PostgresServer
from tests.support.postgres_wire import (
    FLUSH,
    SYNC,
    Wire,
    bind,
    close,
    describe,
    errors,
    execute,
    kinds,
    message,
    parse,
    query,
    rows,
)
from tests.support.session_relay import SessionRelay

pytestmark = pytest.mark.servers

POLICY = """\
version: 1
default: allow
rules:
  - name: no-drops
    when: {statement: [DROP, TRUNCATE]}
    deny: schema changes go through the migration job
  - name: customer-deletes
    when: {statement: [DELETE], table: public.customers}
    approve: {by: [dba], within: 15m}
  - name: pii
    when: {table: public.customers}
    mask: {columns: {public.customers.ssn: redact}}
"""
SSN = b"123-45-6789"
SCHEMA = f"""
DROP TABLE IF EXISTS customers CASCADE; DROP TABLE IF EXISTS plain CASCADE; DROP SCHEMA IF EXISTS other CASCADE;
CREATE TABLE customers (id int PRIMARY KEY, name text, ssn text);
INSERT INTO customers VALUES (1, 'Ada', '{SSN.decode()}');
CREATE TABLE plain (id int PRIMARY KEY, ssn text);
INSERT INTO plain VALUES (1, 'not one');
CREATE SCHEMA other; CREATE TABLE other.customers (id int, ssn text); INSERT INTO other.customers VALUES (1, 'harmless');
"""


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(port=free_port()) as running:
        yield running


@pytest.fixture
def relay(server: PostgresServer) -> Iterator[SessionRelay]:
    server.sql(SCHEMA)
    engine = load_policy(POLICY, "policy.yaml")
    with SessionRelay(PostgresSession, engine, Address("127.0.0.1", server.port)) as running:
        yield running


@pytest.fixture
def wire(relay: SessionRelay) -> Iterator[Wire]:
    with Wire(relay.address) as client:
        yield client


def count(server: PostgresServer) -> str:
    return server.sql("SELECT count(*) FROM customers")


HELD = "DELETE FROM customers"


def test_a_failed_parse_leaves_the_old_statement_judged(
    server: PostgresServer, relay: SessionRelay, wire: Wire
) -> None:
    wire.ask(parse(HELD, "s"), SYNC)
    assert errors(wire.ask(parse("SELECT 1", "s"), SYNC))[0]["C"] == "42P05"
    wire.send(bind(statement="s"), execute(), SYNC)
    relay.wait_for(lambda: relay.holds)
    assert count(server) == "1"


def test_the_same_in_one_pipeline(server: PostgresServer, relay: SessionRelay, wire: Wire) -> None:
    wire.ask(parse(HELD, "s"), SYNC)
    wire.send(parse("SELECT 1", "s"), SYNC, bind(statement="s"), execute(), SYNC)
    relay.wait_for(lambda: relay.holds)
    assert count(server) == "1"


def test_a_close_that_the_server_skips(server: PostgresServer, relay: SessionRelay, wire: Wire) -> None:
    wire.ask(parse(HELD, "s"), SYNC)
    wire.ask(parse("SELECT 1/0 FROM nowhere"), close("s"), SYNC)
    wire.send(bind(statement="s"), execute(), SYNC)
    relay.wait_for(lambda: relay.holds)
    assert count(server) == "1"


def test_a_parse_that_the_server_skips(server: PostgresServer, relay: SessionRelay, wire: Wire) -> None:
    wire.ask(parse(HELD, "s"), SYNC)
    wire.ask(parse("SELECT * FROM nowhere"), close("s"), parse("SELECT 1", "s"), SYNC)
    wire.send(bind(statement="s"), execute(), SYNC)
    relay.wait_for(lambda: relay.holds)
    assert count(server) == "1"


def test_an_unnamed_statement_replaced_in_one_pipeline_is_judged_by_its_own_text(
    relay: SessionRelay, wire: Wire
) -> None:
    wire.ask(parse(HELD), SYNC)
    found = wire.ask(parse("SELECT 1"), bind(), describe(), execute(), SYNC)
    assert kinds(found) == "12TDCZ"
    assert not relay.holds


def test_a_statement_prepared_in_sql_is_not_executed_unjudged(
    server: PostgresServer, relay: SessionRelay, wire: Wire
) -> None:
    wire.ask(query("PREPARE p AS SELECT ssn FROM customers"))
    found = wire.ask(bind(statement="p"), describe(), execute(), SYNC)
    assert SSN not in b"".join(body for _, body in found)
    found = wire.ask(query("EXECUTE p"))
    assert rows(found) == [[b"[redacted]"]]
    assert any(record.operation and record.operation.kind == "execute" for record in relay.of_kind("request"))


def test_a_cursor_keeps_its_masks(relay: SessionRelay, wire: Wire) -> None:
    wire.ask(query("BEGIN"), query("DECLARE c CURSOR FOR SELECT ssn FROM customers"), count=2)
    assert rows(wire.ask(query("FETCH ALL FROM c"))) == [[b"[redacted]"]]


def test_copy_in_extended_query_does_not_shift_the_answers(
    server: PostgresServer, relay: SessionRelay, wire: Wire
) -> None:
    """libpq sends Sync with the COPY and again after it; the server ignores the first."""
    wire.send(parse("COPY plain FROM STDIN"), bind(), execute(), SYNC)
    while (item := wire.read()) is not None and item[0] != "G":
        pass
    wire.send(message(b"d", b"2\tx\n"), message(b"c"), SYNC)
    assert kinds(wire.until_ready()) == "CZ"
    assert rows(wire.ask(query("SELECT ssn FROM customers"))) == [[b"[redacted]"]]
    assert rows(wire.ask(query("SELECT ssn FROM plain ORDER BY id"))) == [[b"not one"], [b"x"]]
    tags = [record.response.status for record in relay.of_kind("response") if record.response]
    assert tags == ["COPY 1", "SELECT 1", "SELECT 2"]


def test_copy_sent_ahead(server: PostgresServer, relay: SessionRelay, wire: Wire) -> None:
    found = wire.ask(
        parse("COPY plain FROM STDIN"), bind(), execute(), SYNC, message(b"d", b"2\tx\n"), message(b"c"), SYNC
    )
    assert kinds(found) == "12GCZ"
    assert rows(wire.ask(query("SELECT ssn FROM customers"))) == [[b"[redacted]"]]


def test_a_query_that_the_server_skips_does_not_shift_the_answers(relay: SessionRelay, wire: Wire) -> None:
    wire.send(parse("SELECT * FROM nowhere"), query("SELECT 1"), SYNC)
    assert kinds(wire.until_ready()) == "EZ"
    assert rows(wire.ask(query("SELECT ssn FROM customers"))) == [[b"[redacted]"]]


def test_a_query_after_an_error_without_sync(relay: SessionRelay, wire: Wire) -> None:
    wire.send(parse("SELECT * FROM nowhere"), FLUSH)
    assert wire.read() is not None
    wire.send(query("DROP TABLE plain"), query("SELECT 1"))
    assert wire.silent()
    assert kinds(wire.ask(SYNC)) == "Z"
    assert rows(wire.ask(query("SELECT ssn FROM customers"))) == [[b"[redacted]"]]


def test_no_parameter_of_a_denied_statement_goes_upstream(relay: SessionRelay, wire: Wire) -> None:
    found = wire.ask(parse("DROP TABLE plain"), bind(b"a-parameter"), describe(), execute(), SYNC)
    assert kinds(found) == "EZ"
    (error,) = errors(found)
    assert error["C"] == "42501"
    assert error["M"] == "denied by policy: no-drops: schema changes go through the migration job"
    assert b"a-parameter" not in relay.upstream
    assert b"DROP" not in relay.upstream
    assert kinds(wire.ask(query("SELECT 1"))) == "TDCZ"


def test_a_local_answer_waits_for_an_open_pipeline(relay: SessionRelay, wire: Wire) -> None:
    """A denied simple query after extended messages without Sync: the implicit transaction is rolled back by the server."""
    wire.send(parse("INSERT INTO plain VALUES (9, 'x')"), bind(), execute(), FLUSH)
    assert [wire.read()[0] for _ in range(3)] == ["1", "2", "C"]  # type: ignore[index]
    found = wire.ask(query("DROP TABLE plain"))
    assert errors(found)[0]["C"] == "42501"
    assert rows(wire.ask(query("SELECT count(*) FROM plain"))) == [[b"1"]]


def test_rows_of_a_statement_described_before_its_tables_changed(relay: SessionRelay, wire: Wire) -> None:
    wire.ask(query("SET search_path = other"))
    wire.ask(parse("SELECT ssn FROM customers", "s"), describe("s", "S"), SYNC)
    found = wire.ask(bind(statement="s"), execute(), SYNC)
    assert rows(found) == [[b"harmless"]]
    wire.ask(query("SET search_path = public"))
    found = wire.ask(bind(statement="s"), execute(), SYNC)
    assert rows(found) == [[b"[redacted]"]]


def test_only_the_statements_that_rules_mean_are_masked(relay: SessionRelay, wire: Wire) -> None:
    found = wire.ask(query("BEGIN"), query("SELECT id, name, ssn FROM customers"), count=2)
    assert rows(found) == [[b"1", b"Ada", b"[redacted]"]]


def test_a_view_made_in_the_same_transaction(relay: SessionRelay, wire: Wire) -> None:
    wire.ask(query("CREATE VIEW v AS SELECT name AS a FROM customers"))
    assert rows(wire.ask(query("SELECT a FROM v"))) == [[b"Ada"]]
    wire.ask(query("BEGIN"), query("CREATE OR REPLACE VIEW v AS SELECT ssn AS a FROM customers"), count=2)
    assert SSN not in b"".join(body for _, body in wire.ask(query("SELECT a FROM v, customers LIMIT 1")))


def test_strings_that_end_elsewhere_for_the_server(relay: SessionRelay, wire: Wire) -> None:
    text = r"SELECT 'a\'';DROP TABLE plain;--'"
    assert kinds(wire.ask(query(text))) == "TDCZ"
    wire.ask(query("SET standard_conforming_strings = off"))
    assert errors(wire.ask(query(text)))[0]["C"] == "42501"
    wire.ask(query("SET standard_conforming_strings = on"))
    found = wire.ask(query("SET standard_conforming_strings = off"), query(text), count=2)
    assert errors(found)[0]["C"] == "42501"
    assert rows(wire.ask(query("SELECT count(*) FROM plain"))) == [[b"1"]]


def test_an_encoding_in_which_a_backslash_is_half_a_character(relay: SessionRelay, wire: Wire) -> None:
    text = b"SELECT E'\x95\x5c';DROP TABLE plain;--'"
    wire.ask(query("SET client_encoding = 'SJIS'"))
    found = wire.ask(query(text))
    assert errors(found)[0]["C"] == "42501"
    assert rows(wire.ask(query("SELECT count(*) FROM plain"))) == [[b"1"]]


def test_a_cancel_request_reaches_the_server(server: PostgresServer, relay: SessionRelay, wire: Wire) -> None:
    key = next(body for kind, body in wire.greeting if kind == "K")
    wire.send(query("SELECT pg_sleep(20)"))
    running = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = 'SELECT pg_sleep(20)'"
    relay.wait_for(lambda: server.sql(running) == "1")
    with socket.create_connection((relay.address.host, relay.address.port), timeout=5) as other:
        other.sendall((16).to_bytes(4) + (80877102).to_bytes(4) + key)
        assert other.recv(10) == b""
    assert errors(wire.until_ready())[0]["C"] == "57014"
    assert any(record.operation and record.operation.kind == "cancel" for record in relay.of_kind("request"))


def test_a_held_statement_rejected_in_a_pipeline(
    server: PostgresServer, relay: SessionRelay, wire: Wire
) -> None:
    wire.send(
        parse("SELECT 7"), bind(), execute(), parse(HELD), bind(), execute(), parse("SELECT 8"), bind(), execute(), SYNC
    )  # fmt: skip
    relay.wait_for(lambda: relay.holds)
    seen = [wire.read() for _ in range(7)]
    assert sorted(item[0] for item in seen if item) == sorted("12DC12N")
    relay.decide(relay.holds[0].hold_id, "rejected", reason="not today")
    found = wire.until_ready()
    assert kinds(found) == "EZ"
    assert errors(found)[0]["M"] == "denied by policy: customer-deletes: rejected by alice: not today"
    assert count(server) == "1"


def test_a_held_statement_approved_in_a_pipeline(
    server: PostgresServer, relay: SessionRelay, wire: Wire
) -> None:
    wire.send(parse(HELD), bind(), execute(), parse("SELECT 8"), bind(), execute(), SYNC)
    relay.wait_for(lambda: relay.holds)
    relay.decide(relay.holds[0].hold_id, "approved")
    assert kinds(wire.until_ready()) in ("12NC12DCZ", "N12C12DCZ", "1N2C12DCZ")
    assert count(server) == "0"
    wire.send(parse(HELD), bind(), execute(), SYNC)
    relay.wait_for(lambda: len(relay.holds) == 2)  # once


def test_what_a_held_statement_has_at_the_server(relay: SessionRelay, wire: Wire) -> None:
    """Parse and Bind are answered before the decision, as any driver may wait for; Execute, and a simple query, are not sent."""
    begin = len(relay.upstream)
    asked = parse("DELETE FROM customers WHERE name = $1"), bind(b"zz-parameter")
    wire.send(*asked, execute(), SYNC)
    relay.wait_for(lambda: relay.holds)
    seen = [wire.read() for _ in range(3)]
    assert sorted(item[0] for item in seen if item) == sorted("12N")
    assert bytes(relay.upstream[begin:]) == b"".join(asked) + FLUSH
    relay.decide(relay.holds[0].hold_id, "rejected", reason="not today")
    wire.until_ready()
    refused = messages.parse(b"_sidecar_refused", b"sidecar: refused before it was sent")
    assert bytes(relay.upstream[begin:]) == b"".join(asked) + FLUSH + refused + SYNC
    begin = len(relay.upstream)
    wire.send(query("DELETE FROM customers WHERE name = 'zz-literal'"))
    relay.wait_for(lambda: len(relay.holds) == 2)
    relay.decide(relay.holds[1].hold_id, "rejected", reason="not today")
    wire.until_ready()
    assert len(relay.upstream) == begin


def test_a_client_that_leaves_withdraws_its_hold(relay: SessionRelay, wire: Wire) -> None:
    wire.send(query(HELD))
    relay.wait_for(lambda: relay.holds)
    wire.socket.close()
    relay.wait_for(lambda: relay.withdrawn)
    assert relay.withdrawn == [relay.holds[0].hold_id]


def test_ascii_is_ascii_in_every_encoding(server: PostgresServer, relay: SessionRelay, wire: Wire) -> None:
    """Python's shift_jis_2004 and johab read a backslash as another character, so that the string would end elsewhere."""
    wire.ask(query("SET backslash_quote = on"))
    for encoding in ("SHIFT_JIS_2004", "JOHAB", "SJIS", "BIG5", "EUC_TW", "KOI8U"):
        wire.ask(query(f"SET client_encoding = '{encoding}'"))
        found = wire.ask(query(r"SELECT E'\''; DROP TABLE plain; --'"))
        assert [error["C"] for error in errors(found)] == ["42501"], encoding
    assert server.sql("SELECT count(*) FROM plain") == "1"


@pytest.mark.parametrize(
    ("encoding", "codec"),
    [("UTF8", "utf-8"), ("KOI8R", "koi8-r"), ("KOI8U", "koi8-u"), ("WIN866", "cp866"), ("ISO_8859_5", "iso8859-5"),
     ("EUC_JIS_2004", "euc_jis_2004"), ("WIN1251", "cp1251")],
)  # fmt: skip
def test_names_are_the_same_in_every_encoding(server: PostgresServer, encoding: str, codec: str) -> None:
    server.sql('DROP TABLE IF EXISTS "люди"; CREATE TABLE "люди" ("инн" text)')
    server.sql(f"INSERT INTO \"люди\" VALUES ('{SSN.decode()}')")
    rules = '[{name: kept, when: {statement: DROP, table: "public.люди"}, deny: not here}, {name: pii, mask: {columns: {"люди.инн": redact}}}]'
    engine = load_policy(f"version: 1\nrules: {rules}\n", "policy.yaml")
    with (
        SessionRelay(PostgresSession, engine, Address("127.0.0.1", server.port)) as relay,
        Wire(relay.address, client_encoding=encoding) as wire,
    ):
        assert errors(wire.ask(query('DROP TABLE "люди"'.encode(codec))))[0]["C"] == "42501"
        for text in ('SELECT "инн" FROM "люди"'.encode(codec), rb'SELECT * FROM U&"\043b\044e\0434\0438"'):
            assert SSN not in b"".join(body for _, body in wire.ask(query(text)))
        # An earlier message may change the encoding: what is not ASCII cannot be judged before it is answered.
        change = query("SELECT set_config('client_encoding', 'KOI8R', false)")
        found = wire.ask(change, query('DROP TABLE "люди"'.encode("koi8-r")), count=2)
        assert errors(found)[0]["C"] == "42501"
    assert server.sql('SELECT count(*) FROM "люди"') == "1"


def test_what_has_no_encoding_is_not_taken_for_two(server: PostgresServer, relay: SessionRelay) -> None:
    """SQL_ASCII: a byte that is no UTF-8 anywhere in a text must not change how its names are read."""
    server.sql("DROP DATABASE IF EXISTS bytes")
    server.sql("CREATE DATABASE bytes ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    rules = '[{name: kept, when: {statement: DROP, table: "люди"}, deny: not here}]'
    engine = load_policy(f"version: 1\nrules: {rules}\n", "policy.yaml")
    with SessionRelay(PostgresSession, engine, Address("127.0.0.1", server.port)) as relay:
        for encoding in ("UTF8", "SQL_ASCII", "LATIN1"):
            with Wire(relay.address, database="bytes", client_encoding=encoding) as wire:
                assert not errors(wire.ask(query('CREATE TABLE IF NOT EXISTS "люди" (a int)')))
                for text in ('DROP TABLE "люди"'.encode(), 'DROP TABLE "люди" -- '.encode() + b"\xff"):
                    assert errors(wire.ask(query(text)))[0]["C"] in ("42501", "22021")
                assert rows(wire.ask(query('SELECT count(*) FROM "люди"'))) == [[b"0"]]
                assert (
                    not errors(wire.ask(query("SELECT 'Stra\xdfe'".encode("latin-1")))) or encoding == "UTF8"
                )


def test_a_prepared_text_is_not_read_again_in_another_encoding(server: PostgresServer) -> None:
    server.sql('DROP TABLE IF EXISTS "люди"; CREATE TABLE "люди" (a int); INSERT INTO "люди" VALUES (1)')
    rules = '[{name: two, when: {statement: DELETE, table: "люди"}, approve: {within: 1m}}]'
    engine = load_policy(f"version: 1\nrules: {rules}\n", "policy.yaml")
    with (
        SessionRelay(PostgresSession, engine, Address("127.0.0.1", server.port)) as relay,
        Wire(relay.address, client_encoding="KOI8R") as wire,
    ):
        wire.ask(parse('DELETE FROM "люди"'.encode("koi8-r"), "s"), SYNC)
        wire.ask(query("SET client_encoding = 'UTF8'"))
        wire.send(bind(statement="s"), execute(), SYNC)
        relay.wait_for(lambda: relay.holds)
        assert server.sql('SELECT count(*) FROM "люди"') == "1"


CLEAN, SECRET = "SELECT upper(name) FROM other_people", "SELECT upper(ssn) FROM customers"


@pytest.fixture
def harmless(server: PostgresServer, relay: SessionRelay) -> None:
    server.sql("CREATE OR REPLACE VIEW other_people AS SELECT 'x'::text AS name")
    server.sql(
        "CREATE OR REPLACE FUNCTION opens(c refcursor) RETURNS refcursor LANGUAGE plpgsql AS "
        f"'BEGIN OPEN c FOR {SECRET}; RETURN c; END'"
    )


def shown(found: list[tuple[str, bytes]]) -> list[list[bytes | None]]:
    assert not errors(found)
    return rows(found)


def test_a_name_that_sql_gives_again(server: PostgresServer, harmless: None) -> None:
    with masking(server) as relay, Wire(relay.address) as wire:
        for free in ("DEALLOCATE s", "DEALLOCATE ALL", "DISCARD ALL"):
            wire.ask(query("DEALLOCATE ALL"))
            wire.ask(parse(CLEAN, "s"), SYNC)
            wire.ask(query(free))
            found = wire.ask(query(f"PREPARE s AS {SECRET}"), bind(statement="s"), execute(), SYNC, count=2)
            assert shown(found) == [[b"[redacted]"]], free
        wire.ask(query("DEALLOCATE ALL"), parse(CLEAN, "s"), SYNC, count=2)
        wire.ask(query(f"DEALLOCATE s; PREPARE s AS {SECRET}"))
        assert shown(wire.ask(bind(statement="s"), execute(), SYNC)) == [[b"[redacted]"]]


@pytest.mark.parametrize(
    "again",
    [["CLOSE p", f"DECLARE p CURSOR FOR {SECRET}"], ["ROLLBACK TO a", f"DECLARE p CURSOR FOR {SECRET}"],
     [f"COMMIT; BEGIN; DECLARE p CURSOR FOR {SECRET}"], ["COMMIT AND CHAIN", f"DECLARE p CURSOR FOR {SECRET}"],
     ["ROLLBACK TO a", "SELECT opens('p')"], ["CLOSE ALL", "SELECT opens('p')"]],
)  # fmt: skip
def test_a_portal_that_sql_opens_again(server: PostgresServer, harmless: None, again: list[str]) -> None:
    with masking(server) as relay, Wire(relay.address) as wire:
        wire.ask(query("BEGIN"), query("SAVEPOINT a"), count=2)
        wire.ask(parse(CLEAN), bind(portal="p"), describe("p"), SYNC)
        for text in again:
            assert not errors(wire.ask(query(text)))
        assert shown(wire.ask(execute("p"), SYNC)) == [[b"[redacted]"]]


def test_names_that_are_one_for_the_server(server: PostgresServer, harmless: None) -> None:
    """It keeps the first 63 bytes."""
    one, other = "n" * 63 + "1", "n" * 63 + "2"
    with masking(server) as relay, Wire(relay.address) as wire:
        wire.ask(parse(CLEAN, one), SYNC)
        wire.ask(close(other), parse(SECRET, other), SYNC)
        assert shown(wire.ask(bind(statement=one), execute(), SYNC)) == [[b"[redacted]"]]
        wire.ask(query("BEGIN"))
        wire.ask(parse(CLEAN), bind(portal=one), describe(one), SYNC)
        wire.ask(close(other, "P"), parse(SECRET), bind(portal=other), SYNC)
        assert shown(wire.ask(execute(one), SYNC)) == [[b"[redacted]"]]


def masking(server: PostgresServer) -> SessionRelay:
    engine = load_policy(
        "version: 1\nrules: [{name: pii, mask: {columns: {customers.ssn: redact}}}]\n", "policy.yaml"
    )
    return SessionRelay(PostgresSession, engine, Address("127.0.0.1", server.port))


def test_a_number_that_is_a_column_is_not_shared_between_texts(
    server: PostgresServer, relay: SessionRelay
) -> None:
    """`ORDER BY 1` and `ORDER BY 2` have one shape, and are two statements."""
    text = "version: 1\npredicates: deny\nrules: [{name: pii, mask: {columns: {customers.ssn: redact}}}]\n"
    engine = load_policy(text, "policy.yaml")
    with (
        SessionRelay(PostgresSession, engine, Address("127.0.0.1", server.port)) as relay,
        Wire(relay.address) as wire,
    ):
        for number in range(4):
            assert not errors(
                wire.ask(query(f"SELECT name, ssn FROM customers WHERE id > {number} ORDER BY 1"))
            )
        found = wire.ask(query("SELECT name, ssn FROM customers WHERE id > 9 ORDER BY 2"))
        assert [error["C"] for error in errors(found)] == ["42501"]


@pytest.mark.parametrize(
    "change",
    ["UPDATE pg_settings SET setting = 'off' WHERE name = 'standard_conforming_strings'", "INSERT INTO triggers VALUES (1)",
     "TABLE setting", "PREPARE x AS TABLE setting; EXECUTE x"],
)  # fmt: skip
def test_strings_behind_what_changes_how_they_are_read(
    server: PostgresServer, relay: SessionRelay, wire: Wire, change: str
) -> None:
    call = "set_config('standard_conforming_strings', 'off', false)"
    server.sql(
        "DROP TABLE IF EXISTS triggers; CREATE TABLE triggers (a int); CREATE OR REPLACE FUNCTION sets() RETURNS trigger LANGUAGE "
        f"plpgsql AS $$BEGIN PERFORM {call}; RETURN NEW; END$$; CREATE TRIGGER t BEFORE INSERT ON triggers FOR EACH ROW "
        f"EXECUTE FUNCTION sets(); CREATE OR REPLACE VIEW setting AS SELECT {call}"
    )
    found = wire.ask(query(change), query(r"SELECT 'a\'';DROP TABLE plain;--'"), count=2)
    assert [error["C"] for error in errors(found)] == ["42501"]
    assert server.sql("SELECT count(*) FROM plain") == "1"


def test_names_behind_an_update_that_changes_the_encoding(server: PostgresServer) -> None:
    server.sql('DROP TABLE IF EXISTS "люди"; CREATE TABLE "люди" (a int)')
    engine = load_policy(
        "version: 1\nrules: [{name: kept, when: {table: люди}, deny: kept}]\n", "policy.yaml"
    )
    with (
        SessionRelay(PostgresSession, engine, Address("127.0.0.1", server.port)) as relay,
        Wire(relay.address) as wire,
    ):
        change = "UPDATE pg_catalog.pg_settings SET setting = 'KOI8R' WHERE name = 'client_encoding'"
        found = wire.ask(query(change), query('DROP TABLE "люди"'.encode("koi8-r")), count=2)
        assert [error["C"] for error in errors(found)] == ["42501"]
