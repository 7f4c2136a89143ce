"""Real clients through the session to a real server: psql and psycopg notice nothing until a rule fires."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from sidecar.model.flow import Address
from sidecar.model.principal import Attachment, Principal
from sidecar.policy import load_policy
from sidecar.session.postgres import PostgresSession
from tests.support.free_port import free_port
from tests.support.postgres_server import PostgresServer
from tests.support.session_relay import SessionRelay, Settings

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
    when: {protocol: postgres}
    mask:
      columns: {public.customers.ssn: redact, public.customers.card: {keep_last: 4}, public.customers.salary: null}
      detect: {email: redact}
"""
SCHEMA = """
DROP TABLE IF EXISTS customers CASCADE; DROP TABLE IF EXISTS notes CASCADE;
CREATE TABLE customers (id int PRIMARY KEY, name text, ssn text, card varchar(20), salary numeric, born date);
INSERT INTO customers SELECT i, 'name ' || i, '123-45-678' || i, '411111111111111' || i, 1000 + i, '2000-01-01'
  FROM generate_series(1, 3) i;
CREATE VIEW people AS SELECT id, ssn AS secret FROM customers;
CREATE TABLE notes (id int, body text); INSERT INTO notes VALUES (1, 'write to ada@example.org');
"""


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(port=free_port()) as running:
        yield running


@contextmanager
def relaying(
    server: PostgresServer, settings: Settings | None = None, policy: str = POLICY
) -> Iterator[SessionRelay]:
    engine = load_policy(policy, "policy.yaml")
    with SessionRelay(PostgresSession, engine, Address("127.0.0.1", server.port), settings) as relay:
        yield relay


@pytest.fixture
def relay(server: PostgresServer) -> Iterator[SessionRelay]:
    server.sql(SCHEMA)
    with relaying(server) as running:
        yield running


def dsn(relay: SessionRelay, **more: str) -> str:
    words = {
        "host": relay.address.host,
        "port": str(relay.address.port),
        "user": "postgres",
        "dbname": "postgres",
    }
    return " ".join(f"{name}={value}" for name, value in {**words, "connect_timeout": "10", **more}.items())


def psql(relay: SessionRelay, *texts: str, **environ: str) -> subprocess.CompletedProcess[str]:
    arguments = [argument for text in texts for argument in ("-c", text)]
    return subprocess.run(
        ["psql", "-XqAt", "-v", "VERBOSITY=verbose", dsn(relay), *arguments],
        capture_output=True, text=True, timeout=30, check=False, env={**os.environ, **environ},
    )  # fmt: skip


# -- denials


def test_psql_shows_the_denial_and_goes_on(relay: SessionRelay) -> None:
    done = psql(relay, "SELECT 1", "DROP TABLE customers", "SELECT 2")
    assert done.stdout.split() == ["1", "2"]
    assert "42501: denied by policy: no-drops: schema changes go through the migration job" in done.stderr
    record = next(
        record for record in relay.of_kind("request") if record.verdict and record.verdict.action == "deny"
    )
    assert f"HINT:  sidecar why {record.id[-8:]}" in done.stderr or "HINT:  sidecar why " in done.stderr
    assert b"DROP TABLE" not in relay.upstream


def test_a_denial_aborts_the_transaction_as_any_error_does(
    server: PostgresServer, relay: SessionRelay
) -> None:
    done = psql(
        relay, "BEGIN", "DROP TABLE customers", "INSERT INTO notes VALUES (7, 'x')", "COMMIT", "SELECT 5"
    )
    assert "25P02" in done.stderr
    assert done.stdout.split() == ["5"]
    assert server.sql("SELECT count(*) FROM notes") == "1"


@pytest.mark.parametrize("prepare", [True, False])
def test_psycopg_in_a_transaction(server: PostgresServer, relay: SessionRelay, prepare: bool) -> None:
    with psycopg.connect(dsn(relay)) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="denied by policy: no-drops"):
            connection.execute("DROP TABLE customers", prepare=prepare)
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.INERROR
        connection.rollback()
        assert connection.execute("SELECT %s::int", (4,), prepare=prepare).fetchone() == (4,)
        with (
            connection.transaction(),
            pytest.raises(psycopg.errors.InsufficientPrivilege),
            connection.transaction(),
        ):
            connection.execute("TRUNCATE customers", prepare=prepare)
    assert server.sql("SELECT count(*) FROM customers") == "3"


def test_psycopg_pipeline(relay: SessionRelay) -> None:
    with psycopg.connect(dsn(relay), autocommit=True) as connection:
        with connection.pipeline() as pipeline:
            first = connection.execute("SELECT 1")
            pipeline.sync()
            denied = connection.execute("DROP TABLE customers")
            skipped = connection.execute("SELECT 2")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                pipeline.sync()
                denied.fetchone()
            with pytest.raises(psycopg.Error):
                skipped.fetchone()
            last = connection.execute("SELECT 3")
            pipeline.sync()
            assert last.fetchone() == (3,)
            assert first.fetchone() == (1,)
        assert connection.execute("SELECT 4").fetchone() == (4,)


def test_a_syntax_error_is_the_servers_own(server: PostgresServer, relay: SessionRelay) -> None:
    text = "SELECT * FRO customers"
    seen = []
    for target in (dsn(relay), f"host={server.directory} port={server.port} user=postgres dbname=postgres"):
        with psycopg.connect(target) as connection, pytest.raises(psycopg.errors.SyntaxError) as caught:
            connection.execute(text)
        diagnosis = caught.value.diag
        seen.append((diagnosis.sqlstate, diagnosis.message_primary, diagnosis.statement_position))
    assert seen[0] == seen[1]


# -- masks

MASKED = ("[redacted]", "************1111", None)


@pytest.mark.parametrize(
    "text",
    [
        "SELECT ssn, card, salary FROM customers WHERE id = 1",
        "SELECT c.ssn AS a, c.card AS b, c.salary AS d FROM customers c WHERE id = 1",
        "SELECT * FROM (SELECT ssn, card, salary FROM customers WHERE id = 1) q",
        "WITH q AS (SELECT * FROM customers WHERE id = 1) SELECT ssn, card, salary FROM q",
    ],
)
@pytest.mark.parametrize("prepare", [True, False, None])
def test_masks_follow_the_column(relay: SessionRelay, text: str, prepare: bool | None) -> None:
    with psycopg.connect(dsn(relay)) as connection:
        for _ in range(3):
            row = connection.execute(text, prepare=prepare).fetchone()
            assert row is not None
            assert row[0] == "[redacted]"
            assert row[1].endswith("1111")
            assert "4111" not in row[1]
            assert row[2] is None


@pytest.mark.parametrize(
    "text",
    [
        "SELECT ssn || '' FROM customers",
        "SELECT upper(ssn) FROM customers",
        "SELECT customers FROM customers",
        "SELECT row_to_json(c) FROM customers c",
        "SELECT max(ssn) FROM customers",
        "SELECT secret FROM people",
        "SELECT string_agg(ssn, ',') FROM customers",
        "SELECT (SELECT ssn FROM customers LIMIT 1)",
        "SELECT ssn FROM customers UNION ALL SELECT 'x'",
        "TABLE customers",
        "UPDATE notes SET body = 'x' FROM customers RETURNING customers.ssn",
        "EXPLAIN ANALYZE SELECT ssn FROM customers WHERE ssn = '123-45-6781'",
    ],
)
def test_nothing_derived_leaks(relay: SessionRelay, text: str) -> None:
    with psycopg.connect(dsn(relay)) as connection:
        try:
            rows = connection.execute(text).fetchall()
        except psycopg.errors.InsufficientPrivilege:
            return
    shown = str([row for row in rows if not text.startswith("EXPLAIN")])
    assert "123-45-678" not in shown
    for record in relay.of_kind("response"):
        assert record.response is not None
        if not text.startswith("EXPLAIN"):
            assert "123-45-678" not in str(record.response.sample)


def test_binary_results_are_null_where_masked(relay: SessionRelay) -> None:
    with psycopg.connect(dsn(relay)) as connection:
        cursor = connection.cursor(binary=True)
        row = cursor.execute(
            "SELECT id, ssn, card, salary, name FROM customers WHERE id = %s", (1,)
        ).fetchone()
    assert row == (1, None, None, None, "name 1")


def test_detectors_look_into_rows_and_copies(relay: SessionRelay) -> None:
    with psycopg.connect(dsn(relay)) as connection:
        assert connection.execute("SELECT body FROM notes").fetchone() == ("write to [redacted]",)
        with connection.cursor().copy("COPY notes TO STDOUT") as copy:
            assert b"".join(bytes(part) for part in copy) == b"1\twrite to [redacted]\n"


def test_copy_of_masked_columns_is_denied_and_of_others_passes(relay: SessionRelay) -> None:
    with psycopg.connect(dsn(relay), autocommit=True) as connection:
        with (
            pytest.raises(psycopg.errors.InsufficientPrivilege),
            connection.cursor().copy("COPY customers TO STDOUT") as copy,
        ):
            list(copy)
        with connection.cursor().copy("COPY (SELECT id, name FROM customers) TO STDOUT") as copy:
            assert b"".join(bytes(part) for part in copy) == b"1\tname 1\n2\tname 2\n3\tname 3\n"
        for parameters in (None, (1,)):
            text = "COPY notes FROM STDIN" if parameters is None else "COPY notes (id, body) FROM STDIN"
            with connection.cursor().copy(text) as copy:
                for number in range(1000):
                    copy.write_row((number, "a body of some length" * 10))
        assert connection.execute("SELECT count(*) FROM notes").fetchone() == (2001,)
        assert connection.execute("SELECT ssn FROM customers WHERE id = 1").fetchone() == ("[redacted]",)


def test_large_rows_and_statements(relay: SessionRelay) -> None:
    with psycopg.connect(dsn(relay)) as connection:
        big = "x" * (20 * 1024 * 1024)
        assert connection.execute("SELECT length(%s::text)", (big,)).fetchone() == (len(big),)
        connection.execute(f"INSERT INTO notes VALUES (9, '{big[: 9 * 1024 * 1024]}')")
        row = connection.execute("SELECT body FROM notes WHERE id = 9").fetchone()
        assert row is not None
        assert len(row[0]) == 9 * 1024 * 1024


def test_a_server_side_cursor(relay: SessionRelay) -> None:
    with psycopg.connect(dsn(relay)) as connection, connection.cursor("c") as cursor:
        cursor.execute("SELECT id, ssn FROM customers ORDER BY id")
        assert cursor.fetchall() == [(1, "[redacted]"), (2, "[redacted]"), (3, "[redacted]")]


# -- records


def test_what_is_recorded(relay: SessionRelay) -> None:
    with psycopg.connect(dsn(relay), autocommit=True) as connection:
        connection.execute("SELECT id, ssn FROM customers WHERE id < %s AND ssn <> %s", (3, "123-45-6789"))
    request = next(r for r in relay.of_kind("request") if r.operation and r.operation.kind == "execute")
    assert request.operation is not None
    assert request.operation.text == "SELECT id, ssn FROM customers WHERE id < $1 AND ssn <> $2"
    assert request.operation.parameters is not None
    assert request.operation.parameters[1] == "[masked parameter $2]"
    response = next(r for r in relay.of_kind("response") if r.request == request.id).response
    assert response is not None
    assert (response.status, response.rows) == ("SELECT 2", 2)
    assert response.sample[0][1] == "[redacted]"
    assert [(column.name, column.masked) for column in response.columns] == [("id", None), ("ssn", "pii")]
    assert response.digest is not None
    assert relay.records.index(request) < next(
        i for i, r in enumerate(relay.records) if r.kind == "response" and r.request == request.id
    )


# -- holds


def test_hold_approve_reject(server: PostgresServer, relay: SessionRelay) -> None:
    notices: list[str] = []
    with psycopg.connect(dsn(relay), autocommit=True) as connection:
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))

        def decide(outcome: str) -> None:
            relay.wait_for(lambda: relay.holds)
            hold = relay.holds.pop()
            time.sleep(0.05)
            relay.decide(hold.hold_id, outcome, reason="because")

        for outcome, left in (("rejected", "3"), ("expired", "3"), ("approved", "2")):
            thread = threading.Thread(target=decide, args=(outcome,))
            thread.start()
            try:
                connection.execute("DELETE FROM customers WHERE id = %s", (1,))
                assert outcome == "approved"
            except psycopg.errors.InsufficientPrivilege as error:
                assert outcome in str(error)  # noqa: PT017 - which of the three it is decides
            thread.join(10)
            assert server.sql("SELECT count(*) FROM customers") == left
    assert len(notices) == 3
    assert notices[0].startswith("held by policy: customer-deletes")


# -- identity


ATTACHED = Settings(
    attachment=Attachment(
        postgres_setting="workload.identity",
        postgres_application_name="repo:acme/orders",
        reserved_setting="workload.identity",
    ),
    principal=Principal("https://issuer.example", "repo:acme/orders"),
)


def test_the_identity_is_attached_and_cannot_be_changed(server: PostgresServer) -> None:
    server.sql(SCHEMA)
    with relaying(server, ATTACHED) as relay, psycopg.connect(dsn(relay), autocommit=True) as connection:
        show = "SELECT current_setting('workload.identity'), current_setting('application_name')"
        pid = connection.info.backend_pid
        expected = (f"assertion-for-{pid}", "repo:acme/orders")
        assert connection.execute(show).fetchone() == expected
        for text in (
            "SET workload.identity = 'x'",
            "RESET workload.identity",
            "SELECT set_config('workload.identity', 'x', false)",
            "SELECT set_config('workload.' || 'identity', 'x', false)",
            'SET LOCAL "Workload.Identity" = 1',
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match=r"identity\.attach"):
                connection.execute(text)
        for text in ("RESET ALL", "DISCARD ALL"):
            connection.execute(text)
            found = connection.execute(show).fetchone()
            assert found is not None
            assert found[0] == expected[0]


def test_startup_options_cannot_set_it(server: PostgresServer) -> None:
    with relaying(server, ATTACHED) as relay:
        done = psql(relay, "SELECT 1", PGOPTIONS="-c workload.identity=x")
        assert "identity.attach" in done.stderr
        relay.wait_for(lambda: relay.reasons)
        assert relay.reasons == ["denied"]


def test_required_identity(server: PostgresServer) -> None:
    with relaying(server, Settings(identity_required=True)) as relay:
        done = psql(relay, "SELECT 1")
        assert "a verified identity is required and there is none (no_token)" in done.stderr
        relay.wait_for(lambda: relay.reasons)
        assert relay.reasons == ["identity_required"]
        assert not relay.upstream


# -- TLS and authentication


@pytest.fixture(scope="module")
def secured(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Turns TLS and SCRAM on; returns the authority's certificate."""
    directory = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=orders.internal",
         "-addext", "subjectAltName=DNS:orders.internal", "-keyout", directory / "key.pem", "-out", directory / "crt.pem"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    data = server.directory / "data"
    for source, name, mode in (("key.pem", "server.key", 0o600), ("crt.pem", "server.crt", 0o644)):
        shutil.copy(directory / source, data / name)
        shutil.chown(data / name, "postgres", "postgres")
        (data / name).chmod(mode)
    rules = (data / "pg_hba.conf").read_text()
    (data / "pg_hba.conf").write_text("host all scrammy 127.0.0.1/32 scram-sha-256\n" + rules)
    server.sql("CREATE ROLE scrammy LOGIN PASSWORD 'a-password'")
    server.sql("ALTER SYSTEM SET ssl = on")
    server.sql("SELECT pg_reload_conf()")
    time.sleep(0.5)
    return directory / "crt.pem"


def test_scram_with_tls_upstream(server: PostgresServer, secured: Path) -> None:
    settings = Settings(tls_mode="verify-full", tls_ca=str(secured), host="orders.internal")
    with relaying(server, settings) as relay:
        with psycopg.connect(dsn(relay, user="scrammy", password="a-password")) as connection:
            assert connection.execute(
                "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
            ).fetchone() == (True,)
            assert not connection.pgconn.ssl_in_use
        assert relay.tls == 1
        assert "a-password" not in str(relay.records)


def test_tls_is_used_where_it_is_offered(server: PostgresServer, secured: Path) -> None:
    with relaying(server) as relay, psycopg.connect(dsn(relay)) as connection:
        assert connection.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone() == (
            True,
        )
    with relaying(server, Settings(tls_mode="disable")) as relay, psycopg.connect(dsn(relay)) as connection:
        assert connection.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone() == (
            False,
        )


def test_a_client_that_demands_tls_is_relayed_opaque_and_recorded(
    server: PostgresServer, secured: Path
) -> None:
    with relaying(server) as relay:
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(dsn(relay, sslmode="require"))
        relay.wait_for(lambda: relay.of_kind("close"))
        assert relay.of_kind("close")[0].detail == "the client left after our answer N: it requires TLS"
    with relaying(server, Settings(client_wants_tls=True)) as relay:
        with psycopg.connect(dsn(relay, sslmode="require")) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
            assert connection.pgconn.ssl_in_use
        assert [record.reason for record in relay.of_kind("gap")] == ["client_requires_tls"]


def test_a_failed_login_is_the_servers_own(server: PostgresServer, secured: Path) -> None:
    with (
        relaying(server) as relay,
        pytest.raises(psycopg.OperationalError, match="password authentication failed"),
    ):
        psycopg.connect(dsn(relay, user="scrammy", password="wrong"))
