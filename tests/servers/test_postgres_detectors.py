"""Content detectors on what a real server answers: text and binary values, JSON, and COPY in each of its forms."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from sidecar.model.flow import Address
from sidecar.policy import load_policy
from sidecar.session.postgres import PostgresSession
from tests.support import postgres_wire as w
from tests.support.free_port import free_port
from tests.support.postgres_server import PostgresServer
from tests.support.session_relay import SessionRelay

pytestmark = pytest.mark.servers

POLICY = "version: 1\nrules: [{name: content, when: {protocol: postgres}, mask: {detect: {us_ssn: redact, credit_card: {keep_last: 4}}}}]\n"
SSN, CARD = "123-45-6789", "4111 1111 1111 1111"


@pytest.fixture(scope="module")
def relay() -> Iterator[SessionRelay]:
    with PostgresServer(port=free_port()) as server:
        server.sql(f"""
            CREATE TABLE notes (id int, t text, v varchar(80), j json, b jsonb, n numeric);
            INSERT INTO notes VALUES (1, 'ssn {SSN}!', 'card {CARD} 12/27', '{{"a":"{SSN}"}}', '{{"a":"{SSN}"}}', 4111111111111111),
                                     (2, 'none', 'none', '{{}}', '{{}}', 1);
        """)
        with SessionRelay(PostgresSession, load_policy(POLICY, "policy.yaml"), Address("127.0.0.1", server.port)) as running:  # fmt: skip
            yield running


def connect(relay: SessionRelay) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(f"host=127.0.0.1 port={relay.address.port} user=postgres dbname=postgres", autocommit=True)  # fmt: skip


@pytest.mark.parametrize("binary", [False, True])
def test_values_in_text_and_binary(relay: SessionRelay, binary: bool) -> None:
    with connect(relay) as connection:
        cursor = connection.cursor(binary=binary)
        rows = cursor.execute("SELECT t, v, j, b, upper(t), id FROM notes ORDER BY id").fetchall()
    assert rows == [
        ("ssn [redacted]!", f"card {'*' * 15}1111 12/27", {"a": "[redacted]"}, {"a": "[redacted]"}, "SSN [redacted]!", 1),
        ("none", "none", {}, {}, "NONE", 2),
    ]  # fmt: skip
    assert SSN not in str([record.response for record in relay.records if record.response])


@pytest.mark.parametrize("options", ["", "(FORMAT csv)", "(FORMAT csv, HEADER, FORCE_QUOTE *)"])
def test_copy_in_text_and_csv(relay: SessionRelay, options: str) -> None:
    with connect(relay) as connection, connection.cursor().copy(f"COPY notes (id, t, v) TO STDOUT {options}") as copy:  # fmt: skip
        found = b"".join(bytes(part) for part in copy).decode()
    assert SSN not in found
    assert CARD not in found
    assert "ssn [redacted]!" in found
    assert "none" in found


@pytest.mark.parametrize(
    "text",
    ["COPY notes TO STDOUT (FORMAT binary)", "COPY notes TO '/tmp/x'", "COPY notes TO PROGRAM 'cat'", "COPY (SELECT t FROM notes) TO STDOUT WITH BINARY", "COPY BINARY notes TO STDOUT"],
)  # fmt: skip
def test_copy_that_no_detector_reads_is_denied(relay: SessionRelay, text: str) -> None:
    with w.Wire(relay.address) as client:
        (error,) = w.errors(client.ask(w.query(text)))
        assert error["C"] == "42501"
        assert "denied by policy: content: detectors cannot read" in error["M"]


def test_copy_from_is_recorded_with_its_bytes(relay: SessionRelay) -> None:
    with connect(relay) as connection:
        with connection.cursor().copy("COPY notes (id, t) FROM STDIN") as copy:
            copy.write(b"7\tseven\n8\teight\n")
        connection.execute("DELETE FROM notes WHERE id IN (7, 8)")
    record = next(item for item in reversed(relay.of_kind("response")) if item.response and item.response.status == "COPY 2")  # fmt: skip
    assert record.response is not None
    assert (record.response.bytes, record.response.error) == (16, None)
