"""PREPARE and EXECUTE, DECLARE and FETCH: judged and masked as the statements that they stand for, on a real server."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from sidecar.model.flow import Address
from sidecar.policy import load_policy
from sidecar.session.postgres import PostgresSession
from tests.support import postgres_wire as w
from tests.support.free_port import free_port
from tests.support.mask_corpus import POLICY, SCHEMA
from tests.support.postgres_server import PostgresServer
from tests.support.session_relay import SessionRelay

pytestmark = pytest.mark.servers

RULES = (
    POLICY
    + """\
  - {name: code, when: {statement: [DO]}, allow: true}
  - {name: no-deletes, when: {protocol: postgres, statement: [DELETE], table: orders}, deny: not here}
  - {name: held, when: {protocol: postgres, statement: [UPDATE], table: orders}, approve: {within: 5m}}
"""
)
OPAQUE = "SELECT upper(name), upper(ssn) FROM customers WHERE id = 1"
HIDDEN, SHOWN = [b"NAME 1", b"[redacted]"], [b"[redacted]", b"[redacted]"]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(port=free_port()) as running:
        running.sql(SCHEMA)
        running.sql("""
            CREATE FUNCTION quiet() RETURNS int LANGUAGE sql AS 'SELECT 1';
            CREATE FUNCTION reopen() RETURNS int LANGUAGE plpgsql AS $$ DECLARE r refcursor := 'c'; BEGIN CLOSE r; OPEN r FOR SELECT upper(ssn), upper(ssn) FROM public.customers; RETURN 1; END $$;
            CREATE FUNCTION again() RETURNS int LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'DEALLOCATE p'; EXECUTE 'PREPARE p AS SELECT upper(ssn), upper(ssn) FROM public.customers'; RETURN 1; END $$;
            CREATE FUNCTION reopening() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM public.reopen(); RETURN NEW; END $$;
            CREATE TABLE triggering (n int);
            CREATE TRIGGER t BEFORE INSERT ON triggering FOR EACH ROW EXECUTE FUNCTION reopening();
            CREATE VIEW quiet_view AS SELECT public.reopen() AS r;
        """)
        yield running


@pytest.fixture
def relay(server: PostgresServer) -> Iterator[SessionRelay]:
    engine = load_policy(RULES, "policy.yaml")
    with SessionRelay(PostgresSession, engine, Address("127.0.0.1", server.port)) as running:
        yield running


@pytest.fixture
def wire(relay: SessionRelay) -> Iterator[w.Wire]:
    with w.Wire(relay.address) as client:
        yield client


def run(wire: w.Wire, *texts: str) -> list[list[bytes | None]]:
    """The rows of the last; the others succeed."""
    for text in texts[:-1]:
        assert not w.errors(wire.ask(w.query(text))), text
    found = wire.ask(w.query(texts[-1]))
    assert not w.errors(found), (texts[-1], w.errors(found))
    return w.rows(found)


def extended(wire: w.Wire, text: str) -> list[list[bytes | None]]:
    found = wire.ask(w.parse(text), w.bind(), w.describe(), w.execute(), w.SYNC)
    assert not w.errors(found), w.errors(found)
    return w.rows(found)


CLEAN = "SELECT upper(name), length(note), count(*) FROM customers WHERE id = 2 GROUP BY name, note"
CLEAN_ROW = [b"NAME 2", b"1", b"1"]


@pytest.mark.parametrize("way", [run, extended])
def test_a_prepared_statement_is_masked_as_what_it_stands_for(wire: w.Wire, way: object) -> None:
    assert callable(way)
    run(wire, f"PREPARE p AS {OPAQUE}")
    run(wire, f"PREPARE clean AS {CLEAN}")
    assert way(wire, "EXECUTE p") == [HIDDEN]
    assert way(wire, "EXECUTE clean") == [CLEAN_ROW]
    run(wire, "BEGIN", "ROLLBACK")
    assert way(wire, "EXECUTE clean") == [CLEAN_ROW]


@pytest.mark.parametrize("way", [run, extended])
def test_a_cursor_is_masked_as_what_it_stands_for(wire: w.Wire, way: object) -> None:
    assert callable(way)
    run(wire, "BEGIN", f"DECLARE c SCROLL CURSOR FOR {OPAQUE}", f"DECLARE clean SCROLL CURSOR FOR {CLEAN}")
    assert way(wire, "FETCH ALL FROM c") == [HIDDEN]
    assert way(wire, "FETCH ALL FROM clean") == [CLEAN_ROW]
    assert way(wire, "FETCH FIRST FROM clean") == [CLEAN_ROW]
    assert way(wire, "MOVE FIRST FROM clean") == []
    run(wire, "COMMIT")


def test_names_live_as_long_as_the_servers(wire: w.Wire) -> None:
    run(wire, "BEGIN", f"PREPARE p AS {CLEAN}", "ROLLBACK")
    assert run(wire, "EXECUTE p") == [CLEAN_ROW]
    run(wire, "DEALLOCATE p", f"PREPARE p AS {OPAQUE}")
    assert run(wire, "EXECUTE p") == [HIDDEN]
    run(wire, "DEALLOCATE ALL", f"PREPARE p AS {CLEAN}")
    assert run(wire, "EXECUTE p") == [CLEAN_ROW]
    run(wire, "DISCARD ALL", f"PREPARE p AS {OPAQUE}")
    assert run(wire, "EXECUTE p") == [HIDDEN]
    run(wire, "BEGIN", f"DECLARE c CURSOR WITH HOLD FOR {CLEAN}", "COMMIT", "BEGIN", "COMMIT")
    assert run(wire, "FETCH ALL FROM c") == [CLEAN_ROW]
    run(wire, "CLOSE c", "BEGIN", f"DECLARE c CURSOR FOR {OPAQUE}")
    assert run(wire, "FETCH ALL FROM c") == [HIDDEN]
    run(wire, "COMMIT", "BEGIN", f"DECLARE c CURSOR FOR {CLEAN}")
    assert run(wire, "FETCH ALL FROM c") == [CLEAN_ROW]
    run(wire, "COMMIT")


def test_the_record_has_the_text_that_a_name_stands_for(relay: SessionRelay, wire: w.Wire) -> None:
    text = "PREPARE p(text) AS SELECT id FROM customers WHERE ssn = 'zq7wk-0001' AND name = $1"
    run(wire, text, "EXECUTE p('name 1')")
    operation = next(item.operation for item in reversed(relay.of_kind("request")) if item.operation)
    assert operation.text == "EXECUTE p('[masked at 10]')"
    assert operation.prepared == (text.replace("'zq7wk-0001'", "'[masked at 56]'"),)
    run(wire, "BEGIN", f"DECLARE c CURSOR FOR {CLEAN}", "FETCH ALL FROM c", "COMMIT")
    shown = [item.operation.prepared for item in relay.of_kind("request") if item.operation and item.operation.text == "FETCH ALL FROM c"]  # fmt: skip
    assert shown == [(f"DECLARE c CURSOR FOR {CLEAN}",)]


def test_a_failure_leaves_the_older_statement_under_the_name(wire: w.Wire) -> None:
    run(wire, f"PREPARE p AS {OPAQUE}")
    assert w.errors(wire.ask(w.query(f"PREPARE p AS {CLEAN}")))[0]["C"] == "42P05"
    assert run(wire, "EXECUTE p") == [HIDDEN]
    run(wire, "DEALLOCATE p")
    assert w.errors(wire.ask(w.query(f"PREPARE p AS {OPAQUE}; SELECT 1 / 0")))[0]["C"] == "22012"
    assert run(wire, "EXECUTE p") == [HIDDEN]


def test_of_several_statements_nobody_can_tell_which_came_before_a_failure(wire: w.Wire) -> None:
    run(wire, f"PREPARE p AS {OPAQUE}")
    wire.ask(w.query(f"SELECT 1 / 0; DEALLOCATE p; PREPARE p AS {CLEAN}"))
    assert run(wire, "EXECUTE p") == [HIDDEN]
    for _ in range(12):
        wire.ask(w.query(f"SELECT 1 / 0; DEALLOCATE p; PREPARE p AS {CLEAN}"))
    assert run(wire, "EXECUTE p") == [SHOWN]


def test_in_one_text_and_in_one_pipeline(wire: w.Wire) -> None:
    found = wire.ask(w.query(f"BEGIN; DECLARE c CURSOR FOR {CLEAN}; FETCH ALL FROM c; COMMIT"))
    assert w.rows(found) == [CLEAN_ROW]
    found = wire.ask(w.query(f"PREPARE p AS {CLEAN}; EXECUTE p; DEALLOCATE ALL; PREPARE p AS {OPAQUE}"))
    assert w.rows(found) == [CLEAN_ROW]
    assert run(wire, "EXECUTE p") == [HIDDEN]
    wire.send(w.query("DEALLOCATE p"), w.query(f"PREPARE p AS {CLEAN}"), w.query("EXECUTE p"))
    found = wire.until_ready(3)
    assert w.rows(found) in ([CLEAN_ROW], [[b"[redacted]", None, None]])
    parts = [w.parse(text) + w.bind() + w.describe() + w.execute() for text in ("DEALLOCATE p", f"PREPARE p AS {OPAQUE}", "EXECUTE p")]  # fmt: skip
    found = wire.ask(*parts, w.SYNC)
    assert w.rows(found) == [HIDDEN] or w.errors(found)[0]["C"] == "26000"


def test_the_protocols_statements_and_sqls_share_their_names(wire: w.Wire) -> None:
    wire.ask(w.parse(CLEAN, "p"), w.SYNC)
    assert run(wire, "EXECUTE p") == [CLEAN_ROW]
    run(wire, "DEALLOCATE p", f"PREPARE p AS {OPAQUE}")
    found = wire.ask(w.bind(statement="p"), w.describe(), w.execute(), w.SYNC)
    assert w.rows(found) == [HIDDEN]
    run(wire, "BEGIN", f"DECLARE c CURSOR FOR {CLEAN}")
    found = wire.ask(w.execute("c"), w.SYNC)
    assert w.rows(found) == [CLEAN_ROW]
    wire.ask(w.parse(OPAQUE), w.bind(portal="q"), w.SYNC)
    assert run(wire, "FETCH ALL FROM q") == [HIDDEN]
    run(wire, "COMMIT")


@pytest.mark.parametrize(
    "between",
    ["SELECT reopen()", "SELECT * FROM quiet_view", "INSERT INTO triggering VALUES (1)", "DO $$ BEGIN PERFORM reopen(); END $$"],
)  # fmt: skip
@pytest.mark.parametrize("way", [run, extended])
def test_code_that_nobody_saw_may_give_a_cursor_another_meaning(
    wire: w.Wire, between: str, way: object
) -> None:
    assert callable(way)
    run(wire, "BEGIN", f"DECLARE c CURSOR FOR {OPAQUE.replace('upper(ssn)', 'upper(name)')}")
    way(wire, between)
    assert run(wire, "FETCH 1 FROM c") == [SHOWN]
    run(wire, "ROLLBACK")


def test_code_that_nobody_saw_may_give_a_prepared_statement_another_meaning(wire: w.Wire) -> None:
    run(wire, "PREPARE p AS SELECT upper(name), upper(name) FROM customers WHERE id = 1")
    assert run(wire, "EXECUTE p") == [[b"NAME 1", b"NAME 1"]]
    run(wire, "SELECT again()")
    assert run(wire, "EXECUTE p")[0] == SHOWN
    assert w.errors(wire.ask(w.query("SELECT * FROM customers; EXECUTE nobody")))[0]["C"] == "26000"


def test_what_is_refused_is_refused_at_prepare_and_at_execute(
    relay: SessionRelay, wire: w.Wire, server: PostgresServer
) -> None:
    (error,) = w.errors(wire.ask(w.query("PREPARE d AS DELETE FROM orders")))
    assert error["C"] == "42501"
    relay.change_engine(load_policy(POLICY, "policy.yaml"))
    run(wire, "PREPARE d AS DELETE FROM orders")
    relay.change_engine(load_policy(RULES, "policy.yaml"))
    for text in ("EXECUTE d", "EXPLAIN ANALYZE EXECUTE d", "SELECT 1; EXECUTE d"):
        (error,) = w.errors(wire.ask(w.query(text)))
        assert (error["C"], error["M"]) == ("42501", "denied by policy: no-deletes: not here"), text
    (error,) = w.errors(wire.ask(w.parse("EXECUTE d"), w.bind(), w.execute(), w.SYNC))
    assert error["C"] == "42501"
    (error,) = w.errors(wire.ask(w.bind(statement="d"), w.execute(), w.SYNC))
    assert error["C"] == "42501"
    assert server.sql("SELECT count(*) FROM orders").strip() == "2"


def test_what_is_held_is_held_at_execute(relay: SessionRelay, wire: w.Wire) -> None:
    relay.change_engine(load_policy(POLICY, "policy.yaml"))
    run(wire, "BEGIN", "PREPARE u AS UPDATE orders SET total = 11 WHERE id = 1")
    relay.change_engine(load_policy(RULES, "policy.yaml"))
    wire.send(w.query("EXECUTE u"))
    relay.wait_for(lambda: relay.holds)
    assert relay.holds[-1].rule == "held"
    relay.decide(relay.holds[-1].hold_id, "approved")
    assert not w.errors(wire.until_ready())
    run(wire, "ROLLBACK")


def test_on_derived_deny_asks_what_is_derived(server: PostgresServer) -> None:
    engine = load_policy(POLICY.replace("version: 1", "version: 1\non_derived: deny"), "policy.yaml")
    with (
        SessionRelay(PostgresSession, engine, Address("127.0.0.1", server.port)) as relay,
        w.Wire(relay.address) as wire,
    ):
        run(wire, f"PREPARE p AS {CLEAN}")
        assert run(wire, "EXECUTE p") == [CLEAN_ROW]
        for text in (f"PREPARE q AS {OPAQUE}", "EXECUTE nobody", "FETCH ALL FROM nobody"):
            assert w.errors(wire.ask(w.query(text)))[0]["C"] == "42501", text


def test_the_cursors_of_psycopg(relay: SessionRelay) -> None:
    with psycopg.connect(f"host=127.0.0.1 port={relay.address.port} user=postgres dbname=postgres") as connection:  # fmt: skip
        with connection.cursor(name="c") as cursor:
            cursor.execute("SELECT upper(name), upper(ssn), id + 1 FROM customers ORDER BY id")
            assert cursor.fetchmany(2) == [("NAME 1", "[redacted]", 2), ("NAME 2", "[redacted]", 3)]
            assert cursor.fetchall() == [("NAME 3", "[redacted]", 4)]
        with connection.cursor(name="b", binary=True) as cursor:
            cursor.execute("SELECT upper(name), upper(ssn) FROM customers WHERE id = %s", (1,))
            assert cursor.fetchall() == [("NAME 1", None)]
