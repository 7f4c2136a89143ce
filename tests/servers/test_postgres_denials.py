"""A denial is the server's own kind of error: in every mode, what comes before, beside and after it is as if the server had refused.

Each script runs twice: through the session with a statement that policy denies, and directly with one that the server rejects. The
same messages, rows and transaction states must come back, and the same must be in the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sidecar.codecs.postgres import messages as m
from sidecar.model.flow import Address
from sidecar.policy import load_policy
from sidecar.session.postgres import PostgresSession
from tests.support.free_port import free_port
from tests.support.playbook import CLIENT, SERVER, Run, greeting
from tests.support.postgres_server import PostgresServer
from tests.support.postgres_wire import (
    FLUSH,
    SYNC,
    Wire,
    bind,
    close,
    describe,
    execute,
    fields,
    parse,
    query,
    split,
    values,
)
from tests.support.session_relay import SessionRelay

pytestmark = pytest.mark.servers

POLICY = """\
version: 1
default: allow
rules:
  - {name: no-drops, when: {protocol: postgres, statement: [DROP]}, deny: not here}
  - {name: held, when: {statement: [DELETE]}, approve: {within: 5m}}
"""
DENIED, REJECTED = "DROP TABLE kept", "SELEC 1"
INSERT = "INSERT INTO kept VALUES (1)"
RUN = [parse(INSERT), bind(), execute()]
X = object()
"""Where the refused text stands."""


def ext(text: Any) -> list[Any]:
    return [("P", text), bind(), describe(), execute()]


SCRIPTS: dict[str, list[list[Any]]] = {
    "simple": [[("Q", X)], [query("SELECT 1")]],
    "simple, in a transaction": [[query("BEGIN")], [("Q", X)], [query("SELECT 1")], [query("ROLLBACK")], [query("SELECT 2")]],
    "BEGIN; denied; INSERT; COMMIT": [[query("BEGIN")], [("Q", X)], [query(INSERT)], [query("COMMIT")], [query(INSERT)]],
    "in a transaction that has failed": [[query("BEGIN")], [query("SELECT 1/0")], [("Q", X)], [query("COMMIT")]],
    "savepoints": [
        [query("BEGIN")], [query(INSERT)], [query("SAVEPOINT s")], [("Q", X)], [query("ROLLBACK TO s")], [query(INSERT)], [query("COMMIT")],
    ],
    "between others in one text": [[("Q", "SELECT 1", X, "SELECT 2")], [query("SELECT 3")]],
    "last in a text that would insert": [[("Q", INSERT, X)]],
    "in a text with BEGIN": [[("Q", "BEGIN", INSERT, X)], [query("ROLLBACK")]],
    "extended": [[*ext(X), SYNC], [*ext("SELECT 1"), SYNC]],
    "extended, in a transaction": [[query("BEGIN")], [*ext(X), SYNC], [*ext(INSERT), SYNC], [query("COMMIT")]],
    "extended, BEGIN too": [[*ext("BEGIN"), *ext(X), SYNC], [*RUN, SYNC], [*ext("COMMIT"), SYNC]],
    "a pipeline: before and behind": [[*ext("SELECT 1"), *ext(X), *ext("SELECT 2"), SYNC], [*ext("SELECT 3"), SYNC]],
    "a pipeline: what was inserted before is rolled back": [[*RUN, *ext(X), SYNC]],
    "a pipeline: its next segment runs": [[*ext(X), *RUN, SYNC, *RUN, SYNC, *ext("SELECT 1"), SYNC]],
    "a pipeline: two are refused": [[*ext(X), *ext(X), SYNC, *ext(X), SYNC]],
    "a pipeline in a transaction": [[*ext("BEGIN"), SYNC, *ext(X), SYNC, *RUN, SYNC, *ext("COMMIT"), SYNC, *RUN, SYNC]],
    "a simple query in a pipeline": [[*ext("SELECT 1"), ("Q", X), *ext("SELECT 2"), SYNC]],
    "a simple query behind a refusal": [[*ext(X), query(INSERT), SYNC, query("SELECT 1")]],
    "Flush instead of Sync": [[*ext("SELECT 1"), ("P", X), FLUSH, *ext("SELECT 2"), SYNC]],
    "a named statement": [[("P", X, "s"), SYNC], [bind(statement="s"), execute(), SYNC], [parse("SELECT 1", "s"), describe("s", "S"), SYNC]],
    "a name that stays": [[parse("SELECT 7", "s"), SYNC], [close("s"), ("P", X, "s"), SYNC], [parse("SELECT 1"), ("P", X, "s"), close("s"), SYNC], [parse("SELECT 7", "t"), bind(statement="t"), execute(), SYNC]],
    "copy behind it": [[*ext(X), *ext("COPY kept FROM STDIN"), m.message(b"d", b"5\n"), m.message(b"c", b""), SYNC]],
    "an open cursor goes": [[query("BEGIN")], [query("DECLARE c CURSOR FOR SELECT 1")], [("Q", X)], [query("FETCH c")], [query("ROLLBACK")]],
    "a portal in use": [
        [query("BEGIN")], [parse("SELECT generate_series(1, 5)"), bind(portal="p"), execute("p", 2), SYNC], [("P", X), SYNC], [execute("p", 2), SYNC], [query("ROLLBACK")],
    ],
    "chains of texts": [[("Q", X), query("SELECT 1"), ("Q", X), query(INSERT), ("Q", X)]],
    "COMMIT AND CHAIN": [[query("BEGIN ISOLATION LEVEL SERIALIZABLE")], [("Q", X)], [query("ROLLBACK AND CHAIN")], [query("SHOW transaction_isolation")], [query("COMMIT")]],
}  # fmt: skip


def written(item: Any, refused: str) -> bytes:
    if isinstance(item, bytes):
        return item
    kind, *texts = item
    texts = [refused if text is X else text for text in texts]
    return query("; ".join(texts)) if kind == "Q" else parse(*texts)


def play(address: Address, script: list[list[Any]], refused: str) -> list[Any]:
    found: list[Any] = []
    with Wire(address) as wire:
        for burst in script:
            data = [written(item, refused) for item in burst]
            # A COPY that is refused leaves its data's Sync, and a failed pipeline skips its simple queries.
            skips = False
            expected = 0
            for item, raw in zip(burst, data, strict=True):
                refuses = not isinstance(item, bytes) and X in item[1:]
                if raw[:1] == b"S":
                    expected, skips = expected + 1, False
                elif raw[:1] == b"Q" and not skips:
                    expected += 1
                elif raw[:1] == b"P" and refuses:
                    skips = True
            found.append([shown(*one) for one in wire.ask(*data, count=expected)])
    return found


def shown(kind: str, body: bytes) -> Any:
    if kind == "E":
        code = fields(body)["C"]
        return "E", "refused" if code in ("42501", "42601") else code
    return kind, body


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(port=free_port()) as running:
        yield running


@pytest.fixture
def relay(server: PostgresServer) -> Iterator[SessionRelay]:
    server.sql("DROP TABLE IF EXISTS kept; CREATE TABLE kept (id int)")
    with SessionRelay(
        PostgresSession, load_policy(POLICY, "policy.yaml"), Address("127.0.0.1", server.port)
    ) as running:
        yield running


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_refusal_is_as_the_servers_own(server: PostgresServer, relay: SessionRelay, name: str) -> None:
    direct = play(Address("127.0.0.1", server.port), SCRIPTS[name], REJECTED)
    left = server.sql("SELECT count(*) FROM kept; TRUNCATE kept")
    steered = play(relay.address, SCRIPTS[name], DENIED)
    assert steered == direct
    assert server.sql("SELECT count(*) FROM kept") == left
    assert b"DROP" not in relay.upstream
    assert any("refused" in str(burst) for burst in steered)
    assert any(r.verdict and r.verdict.action == "deny" for r in relay.of_kind("request"))


def test_the_strictest_verdict_of_a_text_wins(server: PostgresServer, relay: SessionRelay) -> None:
    server.sql("INSERT INTO kept VALUES (1)")
    with Wire(relay.address) as wire:
        for text in ("SELECT 1; DELETE FROM kept; DROP TABLE kept", "DROP TABLE kept; DELETE FROM kept"):
            found = wire.ask(query(text))
            assert [fields(body)["C"] for kind, body in found if kind == "E"] == ["42501"]
        assert not relay.holds
        wire.send(query("SELECT 1; DELETE FROM kept"))
        relay.wait_for(lambda: relay.holds)
        relay.decide(relay.holds[0].hold_id, "rejected")
        found = wire.until_ready()
        assert "rejected by alice" in fields(next(body for kind, body in found if kind == "E"))["M"]
    assert server.sql("SELECT count(*) FROM kept") == "1"


@pytest.mark.parametrize("outcome", ["approved", "rejected", "expired"])
@pytest.mark.parametrize("mode", ["simple", "extended", "transaction", "pipeline"])
def test_a_hold_decided_in_every_mode(
    server: PostgresServer, relay: SessionRelay, outcome: str, mode: str
) -> None:
    server.sql("INSERT INTO kept VALUES (1)")
    text = "DELETE FROM kept"
    sent, count = {
        "simple": ([query(text), query("SELECT 5")], 2),
        "extended": ([*ext_bytes(text), SYNC, query("SELECT 5")], 2),
        "transaction": ([query("BEGIN"), query(text), query("COMMIT"), query("SELECT 5")], 4),
        "pipeline": ([*ext_bytes("SELECT 4"), *ext_bytes(text), SYNC, query("SELECT 5")], 2),
    }[mode]
    with Wire(relay.address) as wire:
        wire.send(*sent)
        relay.wait_for(lambda: relay.holds)
        relay.decide(relay.holds[0].hold_id, outcome)
        found = wire.until_ready(count)
        assert found[-1] == ("Z", b"I")
        assert [values(body) for kind, body in found if kind == "D"][-1] == [b"5"]
        refusals = [fields(body)["M"] for kind, body in found if kind == "E"]
        assert len(refusals) == (outcome != "approved")
        if mode == "transaction":
            tags = [body for kind, body in found if kind == "C"]
            assert (b"COMMIT\0" in tags, b"ROLLBACK\0" in tags) == ((True, False) if outcome == "approved" else (False, True))  # fmt: skip
    assert server.sql("SELECT count(*) FROM kept") == ("0" if outcome == "approved" else "1")


def ext_bytes(text: str) -> list[bytes]:
    return [parse(text), bind(), describe(), execute()]


# -- texts outside the grammar


@pytest.mark.parametrize(
    "text",
    [
        "SELECT * FRO customers",
        "SELECT 1; SELEC 2",
        "DROP OPERATOR === (int4)",  # with a hint
        "CREATE PUBLICATION p FOR CURRENT_SCHEMA",  # with a detail
        "ALTER TABLE t ALTER CONSTRAINT c NOT VALID",  # another message in each version
        "SELECT 'é' FRO customers",
    ],
)
@pytest.mark.parametrize("before", ["SELECT 1", "BEGIN", "BEGIN; SELECT 1/0"])
def test_a_syntax_error_is_the_servers_own(
    server: PostgresServer, relay: SessionRelay, text: str, before: str
) -> None:
    """All of its fields, simple and extended; and what comes after it in the pipeline."""
    seen = []
    for address in (relay.address, Address("127.0.0.1", server.port)):
        with Wire(address) as wire:
            found = wire.ask(query(before))
            found += wire.ask(query(text))
            found += wire.ask(*ext_bytes(text), SYNC)
            found += wire.ask(*ext_bytes("SELECT 1"), *ext_bytes(text), SYNC, query("SELECT 2"), count=2)
            seen.append([(kind, no_source(body) if kind == "E" else body) for kind, body in found])
    assert seen[0] == seen[1]


def no_source(body: bytes) -> dict[str, str]:
    """Without the place in the server's source, which depends on the kind of message."""
    return {name: text for name, text in fields(body).items() if name not in "FLR"}


def test_a_text_that_only_the_server_understands_is_not_run() -> None:
    """Another version's grammar may take what ours rejects: it is parsed there, never executed, and the client is told."""
    run = Run(load_policy(POLICY, "policy.yaml")).play(greeting())
    for side in (CLIENT, SERVER):
        run.sent[side].clear()
    run.play([(CLIENT, query("SELEC 1"))])
    asked = split(bytes(run.sent[SERVER]))
    assert "".join(kind for kind, _ in asked) == "CPPS"
    assert b"SELEC 1" in asked[1][1]
    rejected = m.error("42601", 'syntax error at or near "sidecar"')
    run.play([(SERVER, m.message(b"3", b"") + m.message(b"1", b"") + rejected + m.ready_for_query(b"I"))])
    (_, error), last = split(bytes(run.sent[CLIENT]))
    assert last == ("Z", b"I")
    assert fields(error)["C"] == "42501"
    assert "cannot be understood" in fields(error)["M"]
    assert "not to run it" in fields(error)["D"]
