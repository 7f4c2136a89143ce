"""The worker as it runs, driver and spool included, between real clients and a real server that offers TLS; only steering is missing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy

from sidecar.model.flow import Address
from tests.support import postgres_wire as w
from tests.support.free_port import free_port
from tests.support.postgres_server import PostgresServer
from tests.support.unsteered_worker import UnsteeredWorker

pytestmark = pytest.mark.servers

POLICY = """\
version: 1
default: allow
rules:
  - {name: no-drops, when: {protocol: postgres, statement: [DROP], table: public.kept}, deny: not here}
  - {name: pii, when: {protocol: postgres}, mask: {columns: {public.people.ssn: redact}}}
"""
USERS = {"scrammy": "scram-sha-256", "hashed": "md5", "clear": "password"}
PASSWORD = "pa'ss wörd"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(port=free_port()) as running:
        directory = tmp_path_factory.mktemp("tls")
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-keyout", directory / "key.pem", "-out", directory / "crt.pem"],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        data = running.directory / "data"
        for source, name, mode in (("key.pem", "server.key", 0o600), ("crt.pem", "server.crt", 0o644)):
            shutil.copy(directory / source, data / name)
            shutil.chown(data / name, "postgres", "postgres")
            (data / name).chmod(mode)
        rules = "".join(f"host all {user} 127.0.0.1/32 {method}\n" for user, method in USERS.items())
        (data / "pg_hba.conf").write_text(rules + (data / "pg_hba.conf").read_text())
        for user in USERS:
            running.sql(f"SET password_encryption = '{'md5' if user == 'hashed' else 'scram-sha-256'}'; "
                        f"CREATE ROLE {user} LOGIN PASSWORD '{PASSWORD.replace(chr(39), chr(39) * 2)}'")  # fmt: skip
        running.sql("ALTER SYSTEM SET max_connections = 400")
        running.sql("ALTER SYSTEM SET ssl = on")
        subprocess.run(
            ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--",
             str(running.bin / "pg_ctl"), "-D", str(data), "-w", "-m", "fast", "-l", str(running.directory / "log"), "restart"],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=running.directory, timeout=60,
        )  # fmt: skip
        running.sql("CREATE TABLE people (id int, ssn text); INSERT INTO people VALUES (1, '123-45-6789'); CREATE TABLE kept (id int, t text); CREATE TABLE numbers AS SELECT g AS id, repeat('x', 80) AS t FROM generate_series(1, 5000) g")  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def worker(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[UnsteeredWorker]:
    directory = tmp_path_factory.mktemp("worker")
    with UnsteeredWorker(Address("127.0.0.1", server.port), directory, policy=POLICY) as running:
        yield running


def dsn(worker: UnsteeredWorker, **more: str) -> str:
    parameters = {"host": worker.address.host, "port": str(worker.address.port), "user": "postgres", "dbname": "postgres", **more}  # fmt: skip
    return psycopg.conninfo.make_conninfo(**parameters)


def psql(worker: UnsteeredWorker, text: str, *options: str, stdin: bytes | None = None, **environ: str) -> subprocess.CompletedProcess[bytes]:  # fmt: skip
    return subprocess.run(
        ["psql", "-Xq", dsn(worker), *options, "-c", text], input=stdin, capture_output=True, timeout=60,
        env={"PATH": os.environ["PATH"], **environ},
    )  # fmt: skip


# -- encryption and authentication


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("sslmode", ["disable", "allow", "prefer"])
@pytest.mark.parametrize("binding", ["disable", "prefer"])
def test_every_authentication_over_the_servers_tls(
    worker: UnsteeredWorker, user: str, sslmode: str, binding: str
) -> None:
    with psycopg.connect(
        dsn(
            worker,
            user=user,
            password=PASSWORD,
            sslmode=sslmode,
            channel_binding=binding,
            gssencmode="disable",
        )
    ) as connection:
        found = connection.execute("SELECT ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        assert found.fetchone() == (True, "TLSv1.3")
        assert not connection.pgconn.ssl_in_use
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(dsn(worker, user=user, password="wrong", sslmode=sslmode))


def test_no_password_stands_in_any_record(worker: UnsteeredWorker) -> None:
    for path in worker.directory.glob("*.frames"):
        assert PASSWORD.encode() not in path.read_bytes()


def test_what_demands_tls_is_told_no_then_relayed_opaque(
    server: PostgresServer, worker: UnsteeredWorker, tmp_path: Path
) -> None:
    with pytest.raises(psycopg.OperationalError, match="does not support SSL"):
        psycopg.connect(dsn(worker, sslmode="require"))
    with UnsteeredWorker(Address("127.0.0.1", server.port), tmp_path, client_wants_tls=True) as opaque:
        for binding in ("prefer", "require"):
            with psycopg.connect(
                dsn(opaque, user="scrammy", password=PASSWORD, sslmode="require", channel_binding=binding)
            ) as connection:
                assert connection.pgconn.ssl_in_use
        gaps = opaque.records("gap")
        assert [gap["reason"] for gap in gaps] == ["client_requires_tls"] * 2
        assert not opaque.records("request")


@pytest.mark.parametrize("leaves", ["in order", "by reset"])
def test_a_client_that_leaves_while_the_servers_tls_begins(leaves: str, tmp_path: Path) -> None:
    """The worker finds both in one turn of its loop: the server's yes to TLS, and that nobody is left to speak for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        with UnsteeredWorker(Address("127.0.0.1", server.getsockname()[1]), tmp_path) as running:
            for attempt in range(20):
                client = socket.create_connection((running.address.host, running.address.port), timeout=10)
                client.sendall(w.startup(user="someone"))
                upstream, _ = server.accept()
                with upstream:
                    upstream.settimeout(10)
                    assert upstream.recv(8) == struct.pack("!II", 8, 80877103)
                    os.kill(running.process.pid, signal.SIGSTOP)
                    try:
                        if leaves == "by reset":
                            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        if attempt % 2:
                            client.close()
                        upstream.sendall(b"S")
                        client.close()
                    finally:
                        os.kill(running.process.pid, signal.SIGCONT)
                    with contextlib.suppress(ConnectionResetError):
                        while upstream.recv(65536):  # perhaps a ClientHello, then the end
                            pass
        assert len(running.records("close")) == 20


def test_gss_encryption_is_declined_and_the_start_goes_on(worker: UnsteeredWorker) -> None:
    with socket.create_connection((worker.address.host, worker.address.port), timeout=10) as sock:
        for request in (80877104, 80877103):
            sock.sendall(b"\0\0\0\x08" + request.to_bytes(4))
            assert sock.recv(10) == b"N"
        sock.sendall(w.startup(user="postgres", database="postgres"))
        assert sock.recv(1) == b"R"


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
def test_a_target_that_has_to_have_tls(server: PostgresServer, tmp_path: Path, mode: str) -> None:
    ca = str(server.directory / "data" / "server.crt")
    options: dict[str, Any] = {"tls_mode": mode, "tls_ca": ca, "host": "localhost"}
    with UnsteeredWorker(Address("127.0.0.1", server.port), tmp_path / "1", **options) as worker, psycopg.connect(dsn(worker)) as connection:  # fmt: skip
        assert connection.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone() == (True,)  # fmt: skip
    if mode == "verify-full":
        with (
            UnsteeredWorker(
                Address("127.0.0.1", server.port), tmp_path / "2", **{**options, "host": "other.internal"}
            ) as worker,
            pytest.raises(psycopg.OperationalError, match="sidecar"),
        ):
            psycopg.connect(dsn(worker))


# -- cancelling and dying


def test_cancel_reaches_the_backend_it_means(worker: UnsteeredWorker) -> None:
    with psycopg.connect(dsn(worker)) as one, psycopg.connect(dsn(worker)) as other:
        timer = threading.Timer(0.3, one.cancel)
        timer.start()
        with pytest.raises(psycopg.errors.QueryCanceled):
            one.execute("SELECT pg_sleep(20)")
        timer.join()
        assert other.execute("SELECT 1").fetchone() == (1,)
        one.rollback()
        assert one.execute("SELECT 2").fetchone() == (2,)
    assert any(r["operation"]["kind"] == "cancel" for r in worker.records("request"))


def last_close(worker: UnsteeredWorker, flow: str) -> dict[str, Any]:
    for _ in range(100):
        found = [record for record in worker.records("close") if record["flow"] == flow]
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError("the flow was not closed")


def flow_of(worker: UnsteeredWorker, text: str) -> str:
    return next(
        str(r["flow"]) for r in worker.records("request") if text in (r["operation"].get("text") or "")
    )


def test_a_client_that_dies_in_mid_result(server: PostgresServer, worker: UnsteeredWorker) -> None:
    client = w.Wire(worker.address)
    client.send(w.query("SELECT 'dies here', repeat('x', 1000) FROM generate_series(1, 1000000)"))
    assert client.read() is not None
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.socket.close()
    closed = last_close(worker, flow_of(worker, "dies here"))
    assert closed["reason"] == "client_closed"
    for _ in range(100):
        if server.sql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%dies here%' AND pid <> pg_backend_pid()") == "0":  # fmt: skip
            break
        time.sleep(0.05)
    else:
        pytest.fail("the backend goes on")


@pytest.mark.parametrize("size", [60, 3 * MIB], ids=["a short answer", "a long answer"])
def test_a_client_that_has_reset_while_its_answer_arrives(size: int, tmp_path: Path) -> None:
    """The worker finds both in one turn of its loop. That is no fault of its own: the record says what the client did."""
    answer = w.description(w.column("t")) + w.row(b"x" * size) + w.complete("SELECT 1") + w.ready()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        with UnsteeredWorker(Address("127.0.0.1", server.getsockname()[1]), tmp_path) as running:
            for attempt in range(20):
                client = socket.create_connection((running.address.host, running.address.port), timeout=10)
                client.settimeout(10)
                client.sendall(w.startup(user="someone"))
                upstream, _ = server.accept()
                with upstream:
                    upstream.settimeout(10)
                    upstream.recv(8)
                    upstream.sendall(b"N")
                    upstream.recv(65536)
                    upstream.sendall(w.message(b"R", bytes(4)) + w.ready())
                    client.recv(65536)
                    client.sendall(w.query("SELECT t FROM u"))
                    upstream.recv(65536)
                    os.kill(running.process.pid, signal.SIGSTOP)
                    try:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        if attempt % 2:
                            client.close()
                        upstream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * MIB)
                        sending = threading.Thread(target=send_all, args=(upstream, answer))
                        sending.start()
                        time.sleep(0.02)
                        client.close()
                    finally:
                        os.kill(running.process.pid, signal.SIGCONT)
                    sending.join(10)
                    assert not sending.is_alive()
        reasons = {record["reason"] for record in running.records("close")}
        assert reasons == {"client_closed"}


@pytest.mark.parametrize("size", [60, 150_000])
def test_peers_that_read_slowly_get_every_byte_in_order(size: int, tmp_path: Path) -> None:
    """What the kernel takes only a part of goes on by the transport, behind nothing and before everything."""
    rounds = 30
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # inherited by what it accepts
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(10)
        with (
            UnsteeredWorker(Address("127.0.0.1", server.getsockname()[1]), tmp_path) as running,
            socket.socket() as client,
        ):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(20)
            client.connect((running.address.host, running.address.port))
            client.sendall(w.startup(user="someone"))
            upstream, _ = server.accept()
            with upstream:
                upstream.settimeout(20)
                upstream.recv(8)
                upstream.sendall(b"N")
                upstream.recv(65536)
                upstream.sendall(w.message(b"R", bytes(4)) + w.ready())
                while not client.recv(65536).endswith(w.ready()):
                    pass
                for number in range(rounds):
                    asked = w.query(f"SELECT '{number:08d}{'q' * size}'")
                    answer = (
                        w.description(w.column("t"))
                        + w.row(f"{number:08d}".encode() + b"x" * size)
                        + w.complete("SELECT 1")
                        + w.ready()
                    )
                    for sender, receiver, data in ((client, upstream, asked), (upstream, client, answer)):
                        sending = threading.Thread(target=send_all, args=(sender, data))
                        sending.start()
                        time.sleep(0.01)
                        got = bytearray()
                        while len(got) < len(data):
                            piece = receiver.recv(1000 if size < 1000 else 20_000)
                            assert piece, f"cut off after {len(got)} of {len(data)}"
                            got += piece
                        assert got == data
                        sending.join()
        assert len(running.records("request")) == rounds


def send_all(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        sock.sendall(data)


def test_a_server_that_dies_in_mid_result(server: PostgresServer, worker: UnsteeredWorker) -> None:
    with w.Wire(worker.address) as client:
        pid = int(w.rows(client.ask(w.query("SELECT pg_backend_pid()")))[0][0] or b"0")
        client.send(
            w.query("SELECT 'mid row', repeat('x', 1000), pg_sleep(0.0001) FROM generate_series(1, 1000000)")
        )
        assert client.read() is not None
        server.sql(f"SELECT pg_terminate_backend({pid})")
        found = []
        while (item := client.read()) is not None:
            found.append(item)
    assert w.errors(found)[-1]["C"] == "57P01"  # the server's own last word
    flow = flow_of(worker, "mid row")
    assert last_close(worker, flow)["reason"] == "server_closed"
    responses = [record for record in worker.records("response") if record["flow"] == flow]
    assert responses[-1]["response"]["error"]


def test_idle_in_transaction_is_ended_by_the_server(worker: UnsteeredWorker) -> None:
    with psycopg.connect(dsn(worker)) as connection:
        connection.execute("SET idle_in_transaction_session_timeout = '200ms'")
        time.sleep(0.6)
        with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
            connection.execute("SELECT 1")
        connection.close()


# -- copying, pipelines, notifications


@pytest.mark.parametrize("form", ["text", "csv", "binary"])
def test_copy_in_and_out(server: PostgresServer, worker: UnsteeredWorker, form: str) -> None:
    rows = [(number, f'row {number}\t\\ "quoted" é' * 20) for number in range(5000)]
    with psycopg.connect(dsn(worker), autocommit=True) as connection:
        connection.execute("TRUNCATE kept")
        with connection.cursor().copy("COPY (SELECT g, repeat('v', 50) FROM generate_series(1, 20000) g) TO STDOUT (FORMAT " + form + ")") as copy:  # fmt: skip
            out = b"".join(bytes(part) for part in copy)
        source = f"host={server.directory} port={server.port} user=postgres dbname=postgres"
        with psycopg.connect(source) as direct, direct.cursor().copy("COPY (SELECT g, repeat('v', 50) FROM generate_series(1, 20000) g) TO STDOUT (FORMAT " + form + ")") as copy:  # fmt: skip
            assert out == b"".join(bytes(part) for part in copy)
        with connection.cursor().copy(f"COPY kept FROM STDIN (FORMAT {form})") as copy:
            if form == "csv":
                for number, text in rows:
                    copy.write(f'{number},"{text.replace(chr(34), chr(34) * 2)}"\n')
            else:
                if form == "binary":
                    copy.set_types(["int4", "text"])
                for row in rows:
                    copy.write_row(row)
        assert connection.execute("SELECT count(*), min(id), max(t) FROM kept").fetchone() == (5000, 0, max(t for _, t in rows))  # fmt: skip
        with (
            pytest.raises(psycopg.errors.InvalidTextRepresentation),
            connection.cursor().copy("COPY kept FROM STDIN") as copy,
        ):
            copy.write("no number\tx\n")
        with (
            pytest.raises(psycopg.errors.QueryCanceled),
            connection.cursor().copy("COPY kept FROM STDIN") as copy,
        ):
            copy.write("7\tx\n")
            raise psycopg.errors.QueryCanceled("given up by the client")
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (5000,)


def test_a_pipeline_with_an_error_and_a_denial_in_the_middle(worker: UnsteeredWorker) -> None:
    with psycopg.connect(dsn(worker), autocommit=True) as connection:
        for bad, error in (("SELECT 1/0", psycopg.errors.DivisionByZero), ("DROP TABLE kept", psycopg.errors.InsufficientPrivilege)):  # fmt: skip
            with pytest.raises(error), connection.pipeline() as pipeline:
                first = connection.execute("SELECT 'before'")
                pipeline.sync()
                connection.execute(bad)
                connection.execute("SELECT 'skipped'")
                pipeline.sync()
                connection.execute("SELECT 'after'")
            assert first.fetchone() == ("before",)
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_many_statements_in_one_text(worker: UnsteeredWorker) -> None:
    done = psql(worker, "SELECT 1; SELECT 'zwei'; CREATE TEMP TABLE x (i int); INSERT INTO x VALUES (1), (2); SELECT count(*) FROM x", "-At")  # fmt: skip
    assert (done.stdout, done.stderr) == (b"1\nzwei\n2\n", b"")


def test_a_server_side_cursor(worker: UnsteeredWorker) -> None:
    with psycopg.connect(dsn(worker)) as connection, connection.cursor("c") as cursor:
        cursor.itersize = 700
        cursor.execute("SELECT id, t FROM numbers")
        assert sum(number for number, _ in cursor) == 5000 * 5001 // 2


def test_listen_and_notify(worker: UnsteeredWorker) -> None:
    with psycopg.connect(dsn(worker), autocommit=True) as ear, psycopg.connect(dsn(worker), autocommit=True) as mouth:  # fmt: skip
        ear.execute("LISTEN news")
        mouth.execute("SELECT pg_notify('news', 'payload')")
        (heard,) = list(ear.notifies(timeout=5, stop_after=1))
        assert (heard.channel, heard.payload) == ("news", "payload")


def test_a_function_call_message(worker: UnsteeredWorker) -> None:
    """Large objects through libpq's fast path, which psql's \\lo_import uses: it cannot be judged, so masks in force deny it."""
    with w.Wire(worker.address) as client:
        oid = int(
            w.rows(client.ask(w.query("SELECT 'pg_catalog.abs(int4)'::regprocedure::oid")))[0][0] or b"0"
        )
        call = w.message(b"F", oid.to_bytes(4) + b"\0\0" + b"\0\1" + b"\0\0\0\2-7" + b"\0\0")
        found = client.ask(call)
        assert w.errors(found)[0]["C"] == "42501"
        assert w.rows(client.ask(w.query("SELECT 1"))) == [[b"1"]]


# -- size and number


def test_a_million_rows_in_bounded_memory(worker: UnsteeredWorker) -> None:
    worker.forget_peak()
    before = worker.memory()
    done = subprocess.run(
        ["psql", "-XqAt", dsn(worker), "-o", "/dev/null", "-c", "SELECT g, repeat('x', 80) FROM generate_series(1, 1000000) g"],
        capture_output=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert worker.memory() - before < 40 * MIB
    response = next(r for r in reversed(worker.records("response")) if r["response"].get("rows") == 1_000_000)
    assert len(response["response"]["sample"]) == 100
    assert response["response"]["digest"]


def test_parameters_of_fifty_megabytes(worker: UnsteeredWorker) -> None:
    large = "é" * (25 * MIB)
    with psycopg.connect(dsn(worker)) as connection:
        for binary in ("%s", "%b"):
            value: Any = large.encode() if binary == "%b" else large
            found = connection.execute(f"SELECT length({binary})", (value,)).fetchone()
            assert found == ((50 if binary == "%b" else 25) * MIB,)
        found = connection.execute("SELECT %s", (large,)).fetchone()
        assert found == (large,)
    (record,) = [r for r in worker.records("request") if r["operation"].get("text") == "SELECT $1"][-1:]
    assert len(record["operation"]["parameters"][0]) <= 65536
    worker.forget_peak()
    time.sleep(0.1)
    assert worker.memory("VmRSS") < 400 * MIB


def test_three_hundred_flows_at_once(worker: UnsteeredWorker) -> None:
    async def job(number: int) -> int:
        connection = await asyncpg.connect(
            host=worker.address.host,
            port=worker.address.port,
            user="postgres",
            database="postgres",
            timeout=60,
        )
        try:
            async with connection.transaction():
                await connection.execute("SET LOCAL application_name = $$n$$")
                await gate.wait()
                return int(await connection.fetchval("SELECT $1::int + pg_backend_pid() * 0", number))
        finally:
            await connection.close()

    gate = asyncio.Event()

    async def run() -> list[int]:
        limit = asyncio.Semaphore(40)

        async def opening(number: int) -> int:
            return await job(number)

        tasks = []
        for number in range(300):
            async with limit:
                tasks.append(asyncio.create_task(opening(number)))
                if number % 20 == 19:
                    await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        gate.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(run()) == list(range(300))


# -- other clients


def test_asyncpg(worker: UnsteeredWorker) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(
            host=worker.address.host, port=worker.address.port, user="scrammy", password=PASSWORD, database="postgres"
        )  # fmt: skip
        rows = await connection.fetch("SELECT $1::int[] AS a, $2::timestamptz AS b", [1, 2], None)
        assert rows[0]["a"] == [1, 2]
        await connection.executemany("SELECT $1::text", [(str(number),) for number in range(100)])
        async with connection.transaction():
            cursor = await connection.cursor("SELECT g FROM generate_series(1, 100) g")
            assert len(await cursor.fetch(10)) == 10
            assert len(await cursor.fetch(1000)) == 90
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="denied by policy: no-drops"):
            await connection.execute("DROP TABLE kept")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetch("DROP TABLE kept")
        with pytest.raises(asyncio.TimeoutError):  # cancels by a request of its own
            await connection.fetch("SELECT pg_sleep(10)", timeout=0.3)
        assert await connection.fetchval("SELECT 3") == 3
        await connection.close()

    asyncio.run(run())


def test_asyncpg_gets_null_where_binary_values_are_masked(worker: UnsteeredWorker) -> None:
    async def run() -> list[Any]:
        connection = await asyncpg.connect(host=worker.address.host, port=worker.address.port, user="postgres", database="postgres")  # fmt: skip
        try:
            return list(await connection.fetch("SELECT id, ssn FROM people"))
        finally:
            await connection.close()

    (row,) = asyncio.run(run())
    assert (row["id"], row["ssn"]) in ((1, None), (1, "[redacted]"))


def test_psycopg_async(worker: UnsteeredWorker) -> None:
    async def run() -> None:
        async with await psycopg.AsyncConnection.connect(dsn(worker)) as connection:
            cursor = await connection.execute("SELECT %s::int", (5,), binary=True)
            assert await cursor.fetchone() == (5,)
            async with connection.pipeline():
                results = [await connection.execute("SELECT %s::text", (str(n),)) for n in range(50)]
            assert [await item.fetchone() for item in results] == [(str(n),) for n in range(50)]
            cursor = await connection.execute("SELECT id, ssn FROM people")
            assert await cursor.fetchall() == [(1, "[redacted]")]

    asyncio.run(run())


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_sqlalchemy(worker: UnsteeredWorker, driver: str) -> None:
    url = f"postgresql+{driver}://postgres@{worker.address.host}:{worker.address.port}/postgres"
    metadata = sqlalchemy.MetaData()
    items = sqlalchemy.Table(
        f"items_{driver}", metadata,
        sqlalchemy.Column("id", sqlalchemy.Integer, primary_key=True), sqlalchemy.Column("name", sqlalchemy.String(40)),
    )  # fmt: skip

    def work(connection: sqlalchemy.Connection) -> None:
        metadata.create_all(connection)
        connection.execute(items.insert(), [{"name": f"n{number}"} for number in range(200)])
        assert (
            connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(items)).scalar() == 200
        )
        savepoint = connection.begin_nested()
        with pytest.raises(sqlalchemy.exc.ProgrammingError, match="denied by policy"):
            connection.execute(sqlalchemy.text("DROP TABLE kept"))
        savepoint.rollback()
        assert sqlalchemy.inspect(connection).get_columns(items.name)[1]["name"] == "name"
        metadata.drop_all(connection)

    if driver == "psycopg":
        engine = sqlalchemy.create_engine(url)
        with engine.begin() as connection:
            work(connection)
        engine.dispose()
        return
    from sqlalchemy.ext.asyncio import create_async_engine

    async def run() -> None:
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(work)
        await engine.dispose()

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["simple", "extended", "prepared"])
def test_pgbench(server: PostgresServer, worker: UnsteeredWorker, mode: str) -> None:
    where = ["-h", worker.address.host, "-p", str(worker.address.port), "-U", "postgres"]
    environment = {"PATH": f"{server.bin}:{os.environ['PATH']}"}
    subprocess.run(["pgbench", *where, "-i", "-q", "-s", "1", "postgres"], env=environment, check=True, capture_output=True, timeout=100)  # fmt: skip
    done = subprocess.run(
        ["pgbench", *where, "-M", mode, "-c", "8", "-t", "50", "-n", "postgres"],
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "number of transactions actually processed: 400/400" in done.stdout
    assert "number of failed transactions: 0" in done.stdout


def test_pg_dump_and_pg_restore(server: PostgresServer, tmp_path: Path) -> None:
    """With no rule that masks: a dump of masked columns is denied, as COPY is."""
    server.sql("CREATE DATABASE source")
    wanted = "SELECT md5(string_agg(d::text, '' ORDER BY id)) FROM dumped d"
    source = f"host={server.directory} port={server.port} user=postgres dbname=source"
    with psycopg.connect(source) as direct:
        direct.execute("CREATE TABLE dumped (id serial PRIMARY KEY, doc jsonb, raw bytea, t text)")
        direct.execute(
            "INSERT INTO dumped (doc, raw, t) SELECT jsonb_build_object('n', g),"
            " decode(lpad(to_hex(g), 8, '0'), 'hex'), E'tab\\t' || g FROM generate_series(1, 2000) g"
        )
        direct.execute("SELECT lo_from_bytea(0, '\\x0102')")
        expected = direct.execute(wanted).fetchone()
    with UnsteeredWorker(Address("127.0.0.1", server.port), tmp_path / "w") as worker:
        where = ["-h", worker.address.host, "-p", str(worker.address.port), "-U", "postgres"]
        for form, options in (("custom", []), ("plain", ["--inserts"]), ("directory", ["-j", "2"])):
            file = tmp_path / form
            subprocess.run(["pg_dump", *where, "-F", form[0], "-f", str(file), *options, "source"], check=True, capture_output=True, timeout=100)  # fmt: skip
            server.sql("DROP DATABASE IF EXISTS restored")
            server.sql("CREATE DATABASE restored")
            command = ["psql", *where, "-Xq", "-v", "ON_ERROR_STOP=1", "-d", "restored", "-f", str(file)]
            if form != "plain":
                command = ["pg_restore", *where, "-d", "restored", *(["-j", "2"] if form == "directory" else []), str(file)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, timeout=100)
            assert done.returncode == 0, done.stderr
            with psycopg.connect(dsn(worker, dbname="restored")) as connection:
                found = connection.execute(wanted).fetchone()
            assert found == expected


# -- the worker itself


def test_a_killed_worker_leaves_a_connection_error_and_whole_records(
    server: PostgresServer, tmp_path: Path
) -> None:
    worker = UnsteeredWorker(Address("127.0.0.1", server.port), tmp_path)
    worker.__enter__()
    client = w.Wire(worker.address)
    client.ask(w.query("SELECT 'seen'"))
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait(10)
    with contextlib.suppress(ConnectionError):
        client.send(w.query("SELECT 'unseen'"))
        assert client.read() is None
    client.socket.close()
    assert [r["operation"]["text"] for r in worker.records("request")] == ["SELECT 'seen'"]
    with contextlib.suppress(AssertionError):
        worker.__exit__(None, None, None)
