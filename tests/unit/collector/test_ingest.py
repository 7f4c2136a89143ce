"""The collector takes what is genuine and continues what it holds, once; everything else is refused with a reason, and stored nowhere."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest

from sidecar.audit import chain, hostkey
from sidecar.audit.batch import MAX_RECORDS, Batch, Header
from sidecar.audit.encode import encode_record
from sidecar.audit.outbox import Outbox
from sidecar.audit.receipt import RECEIPT, REFUSAL, Said, line_of, read_line
from sidecar.audit.shipper import Shipper
from sidecar.collector.app import create_app
from sidecar.collector.ingest import MAX_BODY_BYTES
from sidecar.collector.store import Refusal, Store, Unavailable
from sidecar.errors import AuditError
from sidecar.model.ids import IdSource
from sidecar.model.record import RECORD_VERSION
from sidecar.model.secret import Secret
from tests.support.collectors import CollectorProcess, until
from tests.support.spools import make_spool, request, writer_of

IDS = IdSource()
BOOT = "9a1f4b9c-0000-4000-8000-000000000000"


class Host:
    """Signs what a host would, and what none would."""

    def __init__(self, place: Path, name: str = "h") -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.key = hostkey.load_or_create(place)
        self.name = name
        self.stream = IDS.new(time.time_ns())

    def records(self, first: int, last: int, text: str = "SELECT") -> tuple[bytes, ...]:
        made = []
        for seq in range(first, last + 1):
            record = request(seq, f"{text} {seq}")
            record.v, record.host, record.stream, record.seq = RECORD_VERSION, self.name, self.stream, seq
            record.id = f"0190{seq:04d}-0000-7000-8000-{abs(hash(text)) % 10**12:012d}"
            made.append(encode_record(record))
        return tuple(made)

    def head(self, upto: int, text: str = "SELECT") -> bytes:
        """The chain's hash after record `upto`."""
        found = chain.genesis(self.key.public, self.stream, BOOT)
        for record in self.records(0, upto, text):
            found = chain.link(found, record)
        return found

    def batch(
        self, first: int, last: int, /, *, text: str = "SELECT", end: str = "", **changed: Any
    ) -> Batch:
        header = Header(
            self.name, self.stream, BOOT, first, last,
            self.head(first - 1, text), self.head(last, text), time.time_ns(), end,
        )  # fmt: skip
        return Batch.sign(replace(header, **changed), self.key, self.records(first, last, text))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "host")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "data")
    yield made
    made.close()


def held(store: Store) -> list[tuple[str, int]]:
    with sqlite3.connect(_file(store)) as db:
        found = db.execute("SELECT stream, seq FROM records ORDER BY stream, seq").fetchall()
    db.close()
    return found


def _file(store: Store) -> str:
    return str(store._db.execute("PRAGMA database_list").fetchone()["file"])


def test_it_is_a_write_ahead_log_that_syncs(store: Store) -> None:
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert Path(_file(store)).parent.stat().st_mode & 0o077 == 0


def test_batches_follow_each_other_with_any_bounds(store: Store, host: Host) -> None:
    assert not store.ingest(host.batch(0, 3), 1).repeated
    assert store.ingest(host.batch(0, 3), 1).repeated
    assert store.ingest(host.batch(1, 2), 1).repeated
    assert not store.ingest(host.batch(2, 6), 1).repeated  # an overlap: what is new of it
    assert not store.ingest(host.batch(7, 9, end="stopped"), 1).repeated
    assert store.ingest(host.batch(7, 9, end="stopped"), 1).repeated
    assert held(store) == [(host.stream, seq) for seq in range(10)]
    said = Said(**store.receipt(store.ingest(host.batch(0, 9, end="stopped"), 1), 1)["said"])
    assert (said.last, said.head, said.ended) == (9, host.head(9).hex(), True)


def test_an_end_without_records(store: Store, host: Host) -> None:
    store.ingest(host.batch(0, 1), 1)
    store.ingest(host.batch(2, 1, end="worker died"), 1)
    with pytest.raises(Refusal, match="the stream has ended"):
        store.ingest(host.batch(2, 2), 1)
    assert held(store) == [(host.stream, 0), (host.stream, 1)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda host: host.batch(1, 3), "nothing is held of this stream and the batch begins with record 1"),
        (lambda host: host.batch(0, 3, prev=b"\0" * 32), "do not lead to its signed head"),
        (lambda host: host.batch(0, 3, boot="another"), "does not begin at its genesis"),
        (lambda host: host.batch(0, 3, last=2), "does not hold the records that its header names"),
        (lambda host: host.batch(0, 3, head=b"\0" * 32), "do not lead to its signed head"),
        (lambda host: replace(host.batch(0, 3), signature=b"\0" * 64), "signature does not hold"),
        (lambda host: replace(host.batch(0, 3), signature=b""), "signature does not hold"),
        (lambda host: replace(host.batch(0, 3), key=b""), "signature does not hold"),
        (lambda host: replace(host.batch(0, 3), records=host.records(0, 3, "DROP")), "signed head"),
        (lambda host: replace(host.batch(0, 3), records=host.records(0, 2)), "does not hold the records"),
        (
            lambda host: replace(host.batch(0, 3), records=host.records(0, 3)[::-1]),
            "do not lead to its signed head",
        ),
        (
            lambda host: Batch.sign(
                Header.decode(host.batch(0, 3).header), _other(host), host.records(0, 3)
            ),
            "does not begin at its genesis",
        ),
        (lambda host: _lying(host, "seq", 7), "record 0 names another place than it stands at"),
        (lambda host: _lying(host, "stream", "s"), "record 0 names another place than it stands at"),
        (lambda host: _lying(host, "host", "another"), "record 0 names another place than it stands at"),
        (lambda host: _lying(host, "ts_ns", -1), "record 0 has no time"),
        (lambda host: _lying(host, "ts_ns", 1 << 63), "record 0 has no time"),
        (lambda host: _of(host, (b"\xc1",)), "a record is no msgpack"),
        (lambda host: _of(host, (b"\x90",)), "a record is no map"),
        (lambda host: _of(host, (b"\x80",) * (MAX_RECORDS + 1)), "at most"),
    ],
)  # fmt: skip
def test_what_is_not_genuine_is_stored_nowhere(store: Store, host: Host, change: Any, said: str) -> None:
    with pytest.raises(AuditError, match=said):
        store.ingest(change(host), 1)
    assert held(store) == []
    store.ingest(host.batch(0, 3), 1)  # and is in nobody's way: not even the host's name is taken
    assert len(held(store)) == 4


def _other(host: Host) -> hostkey.HostKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    del host
    return hostkey.HostKey(Ed25519PrivateKey.from_private_bytes(b"o" * 32))


def _lying(host: Host, name: str, value: Any) -> Batch:
    record = msgpack.unpackb(host.records(0, 0)[0]) | {name: value}
    return _of(host, (msgpack.packb(record),))


def _of(host: Host, records: tuple[bytes, ...]) -> Batch:
    prev = head = chain.genesis(host.key.public, host.stream, BOOT)
    for record in records:
        head = chain.link(head, record)
    header = Header(host.name, host.stream, BOOT, 0, len(records) - 1, prev, head, 1)
    return Batch.sign(header, host.key, records)


def test_a_gap_a_fork_and_another_key_are_refused_with_what_is_held(
    store: Store, host: Host, tmp_path: Path
) -> None:
    store.ingest(host.batch(0, 3), 1)
    refusals = [
        (host.batch(6, 7), "records 4 to 5 are missing"),
        (host.batch(0, 5, text="DROP"), "the stream was forked"),
        (host.batch(0, 2, text="DROP"), "the stream was forked"),
        (host.batch(4, 5, text="DROP"), "the stream was forked"),
        (Host(tmp_path / "imposter").batch(0, 1), "known with another key"),
    ]
    before = held(store)
    for batch, said in refusals:
        with pytest.raises(Refusal, match=said) as refused:
            store.ingest(batch, 1)
        answer = store.refusal(refused.value, 5)
        word = read_line(line_of(answer), bytes.fromhex(answer["key"]), REFUSAL)
        assert said in word.reason
        if "key" not in said:
            assert (word.last, word.head) == (3, host.head(3).hex())
        assert held(store) == before
    store.ingest(host.batch(4, 5), 1)
    other = Host(tmp_path / "second", "h2")
    other.stream = host.stream  # somebody else's stream, under a name and key of their own
    with pytest.raises(Refusal, match="belongs to another host"):
        store.ingest(other.batch(0, 1), 1)


def test_a_restart_keeps_what_was_receipted(tmp_path: Path, host: Host) -> None:
    first = Store(tmp_path / "data")
    first.ingest(host.batch(0, 3), 1)
    key = first.key.public
    first.close()
    second = Store(tmp_path / "data")
    assert second.key.public == key
    assert second.ingest(host.batch(0, 3), 1).repeated
    second.ingest(host.batch(4, 4), 1)
    assert len(held(second)) == 5
    second.close()


def test_many_shippers_at_once(store: Store, tmp_path: Path) -> None:
    """Four hosts, each through two connections that send the same."""
    hosts = [Host(tmp_path / f"host{n}", f"h{n}") for n in range(4)]
    failures: list[BaseException] = []

    def ship(host: Host) -> None:
        try:
            for first in range(0, 40, 4):
                store.ingest(host.batch(first, first + 3), 1)
        except BaseException as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    threads = [threading.Thread(target=ship, args=(host,)) for host in hosts for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(held(store)) == sorted((host.stream, seq) for host in hosts for seq in range(40))


# -- over HTTP


def _call(app: Any, *requests: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8420") as client:
            return [await client.request(method, path, **how) for method, path, how in requests]

    return asyncio.run(ask())


def _post(app: Any, body: bytes, **headers: str) -> httpx.Response:
    return _call(app, ("POST", "/v1/batches", {"content": body, "headers": headers}))[0]


def test_answers(store: Store, host: Host) -> None:
    app = create_app(store, None, token="t" * 32)
    taken = _post(app, host.batch(0, 3).encode())
    assert taken.status_code == 200
    said = read_line(line_of(taken.json()), store.key.public, RECEIPT)
    assert (said.stream, said.last) == (host.stream, 3)
    refused = _post(app, host.batch(9, 9).encode())
    assert refused.status_code == 409
    assert "missing" in read_line(line_of(refused.json()), store.key.public, REFUSAL).reason
    for body in (b"", b"\xc1", b"\x90", b"[]", msgpack.packb({"header": 1}), host.batch(4, 5).encode()[:-9]):
        answer = _post(app, body)
        assert answer.status_code == 400, body
        assert "Traceback" not in answer.text
    assert _post(app, b"\x91" * 100_000).status_code == 400
    assert _call(app, ("GET", "/v1/batches", {}))[0].status_code == 405
    assert len(held(store)) == 4


def test_the_size_of_a_request_is_bounded(store: Store) -> None:
    app = create_app(store, None, token="t" * 32)
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 4 * MAX_BODY_BYTES:
            sent += 1 << 20
            yield b"\0" * (1 << 20)

    answer = _call(app, ("POST", "/v1/batches", {"content": endless()}))[0]
    assert answer.status_code == 413
    assert sent <= MAX_BODY_BYTES + (2 << 20)  # it stops reading there


def test_hosts_have_to_be_enrolled(store: Store, host: Host) -> None:
    app = create_app(store, None, token="t" * 32, enrolment=Secret("word"))
    batch = host.batch(0, 1).encode()
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "word"}):
        assert _post(app, batch, **headers).status_code == 401
    assert _post(app, batch, authorization="Bearer word").status_code == 200
    assert len(held(store)) == 2


@pytest.mark.root
def test_a_full_disk_is_no_refusal(tmp_path: Path) -> None:
    """What cannot be stored is not lost: the shipper keeps it, says so, and sends it once there is room."""
    data = tmp_path / "data"
    data.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", data], check=True)
    try:
        spool = make_spool(tmp_path / "audit")
        writer = writer_of(spool.open_stream("w"))
        with CollectorProcess(data) as collector:
            ballast = data / "ballast"
            with ballast.open("wb", buffering=0) as file:
                try:
                    while file.write(b"\0" * 4096) == 4096:
                        pass
                except OSError:
                    pass
            writer.append_many([request(number, "x" * 2000) for number in range(100)])
            spool.commit()
            sender = Shipper(spool, collector.url, None, backoff_s=(0.05,))
            sender.start()
            until(lambda: not sender.state().ok)
            assert "503: the store takes nothing: " in (sender.state().error or "")
            assert not list(spool.directory.glob("*.receipt"))
            assert not list(spool.directory.glob("*.refused"))
            ballast.unlink()
            until(lambda: list(spool.directory.glob("*.receipt")))
            until(lambda: sender.state().ok)
            asyncio.run(sender.stop(1.0))
        spool.close()
    finally:
        subprocess.run(["umount", "-l", data], check=True)


def test_a_store_that_fails_can_be_asked_again(store: Store, host: Host) -> None:
    store._db.execute("PRAGMA max_page_count = 20")
    big = host.batch(0, 300)
    for _ in range(2):
        with pytest.raises(Unavailable, match="full"):
            store.ingest(big, 1)
    store._db.execute("PRAGMA max_page_count = 100000")
    store.ingest(big, 1)
    assert len(held(store)) == 301


def test_another_version_of_the_store_is_not_touched(tmp_path: Path) -> None:
    Store(tmp_path / "data").close()
    with sqlite3.connect(tmp_path / "data" / "collector.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(AuditError, match="written by another version"):
        Store(tmp_path / "data")


def test_batches_are_joined_from_many_commits(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "audit")
    writer = writer_of(spool.open_stream("w"))
    for number in range(50):
        writer.append(request(number))
        spool.commit()
    outbox = Outbox(spool.directory, writer.stream, spool.host_key, after_seq=9)
    found = outbox.next()
    assert found is not None
    batch, header = found
    assert (header.first, header.last, len(batch.records)) == (10, 49, 40) or header.first == 0
    batch.check()
    spool.close()


def test_the_listener_says_what_is_wrong(tmp_path: Path) -> None:
    with CollectorProcess(tmp_path / "data") as first:
        second = subprocess.run(
            [os.path.join(os.path.dirname(os.sys.executable), "sidecar"), "collector",
             "--listen", f"127.0.0.1:{first.port}", "--data", str(tmp_path / "other")],
            capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
        assert second.returncode == 3
        assert "cannot be listened on: Address already in use" in second.stderr
        assert "Traceback" not in second.stderr
