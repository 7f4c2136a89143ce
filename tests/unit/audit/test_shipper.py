"""Every record reaches the collector once, whatever the collector does; a receipt counts only if it is one."""

from __future__ import annotations

import asyncio
import http.server
import json
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.audit import hostkey, read, shipper
from sidecar.audit.receipt import canonical
from sidecar.audit.retention import kept_receipt
from sidecar.audit.segment import receipt_path, refusal_path, segment_paths, signature_path
from sidecar.audit.shipper import Shipper
from sidecar.audit.spool import Spool
from sidecar.audit.verify import verify
from sidecar.collector.store import Refusal
from sidecar.model.secret import Secret
from tests.support.collectors import CollectorProcess, OddCollector, send, until
from tests.support.spools import flow_of, make_spool, request, writer_of

FAST = (0.02, 0.05)


@pytest.fixture(autouse=True)
def awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipper looks for new records more often than it does elsewhere."""
    monkeypatch.setattr(shipper, "IDLE_S", 0.02)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = make_spool(tmp_path / "audit")
    yield made
    made.close()


class Shipping:
    """A shipper that runs until the end of the block."""

    def __init__(self, spool: Spool, url: str, token: Secret | None = None) -> None:
        self.shipper = Shipper(spool, url, token, backoff_s=FAST)

    def __enter__(self) -> Shipper:
        self.shipper.start()
        return self.shipper

    def __exit__(self, *_: object) -> None:
        asyncio.run(self.shipper.stop(flush_s=5.0))


def receipted(spool: Spool, stream: str) -> int:
    kept = kept_receipt(spool.directory, stream)
    return kept[1].last if kept else -1


def stored(data: Path) -> list[tuple[str, int, str]]:
    with sqlite3.connect(data / "collector.sqlite") as db:
        rows = db.execute("SELECT stream, seq, id FROM records ORDER BY stream, seq").fetchall()
    db.close()
    return rows


def spooled(directory: Path) -> list[tuple[str, int, str]]:
    return sorted((row["stream"], row["seq"], row["id"]) for row in read.records(directory))


def test_the_collector_is_killed_again_and_again(spool: Spool, tmp_path: Path) -> None:
    """While records are written, and in the middle of its work: none is lost, none is there twice."""
    chance = random.Random(5)
    writers = [writer_of(spool.open_stream("w")) for _ in range(2)]
    number = 0
    with CollectorProcess(tmp_path / "data") as collector, Shipping(spool, collector.url) as shipping:
        for _ in range(3):
            end = time.monotonic() + chance.uniform(0.05, 0.3)
            while time.monotonic() < end:
                for writer in writers:
                    writer.append_many(flow_of(number, f"SELECT {number}, '{'x' * 3000}'"))
                    number += 1
                spool.commit()
            collector.kill()
            writers[0].append_many(flow_of(number))
            number += 1
            spool.commit()
            until(lambda: not shipping.state().ok)
            assert shipping.state().error
            collector.start()
        for writer in writers:
            spool.close_stream(writer.stream, "done")
        until(lambda: all(receipted(spool, writer.stream) == writer.seq - 1 for writer in writers))
        until(lambda: shipping.state().ok)
        assert shipping.state().last_receipt_ns
    report = verify(spool.directory)
    assert report.ok, report.findings
    assert [stream.receipted for stream in report.streams] == [stream.records for stream in report.streams]
    assert stored(tmp_path / "data") == spooled(spool.directory)
    assert number * 4 == len(spooled(spool.directory))


def _garbage(odd: OddCollector, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    send(handler, 200, b"\xff\x00 no JSON")


def _other_shape(odd: OddCollector, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    send(handler, 200, b'{"said": {"v": 1}, "sig": 5, "key": "00"}')


def _nested(odd: OddCollector, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    send(handler, 200, b"[" * 60_000)


def _broken(odd: OddCollector, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    send(handler, 500, b"internal error")


def _elsewhere(odd: OddCollector, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_response(302)
    handler.send_header("location", "http://127.0.0.1:1/")
    handler.send_header("content-length", "0")
    handler.end_headers()


def _huge(odd: OddCollector, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    send(handler, 200, b" " * 200_000)


def _hangs(odd: OddCollector, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    time.sleep(0.5)
    handler.close_connection = True


def _drips(odd: OddCollector, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    for _ in range(10):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def _closes(odd: OddCollector, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    odd.receipt(body)  # it has stored the batch, and its receipt is lost
    handler.close_connection = True


def _unsigned(odd: OddCollector, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    answer = odd.receipt(body)
    answer["said"]["last"] += 1
    send(handler, 200, json.dumps(answer).encode())


def _by_another(odd: OddCollector, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    """A good signature by a key that is not the collector's, under the collector's name."""
    answer = odd.receipt(body)
    answer["sig"] = _stranger().sign(canonical(answer["said"])).hex()
    send(handler, 200, json.dumps(answer).encode())


def _for_another(odd: OddCollector, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    answer = odd.receipt(body)
    answer["said"]["last"] += 7
    answer["sig"] = odd.store.key.sign(canonical(answer["said"])).hex()
    send(handler, 200, json.dumps(answer).encode())


def _honest(odd: OddCollector, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    try:
        send(handler, 200, json.dumps(odd.receipt(body)).encode())
    except Refusal as refused:
        send(handler, 409, json.dumps(odd.store.refusal(refused, time.time_ns())).encode())


def _stranger() -> hostkey.HostKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return hostkey.HostKey(Ed25519PrivateKey.from_private_bytes(b"s" * 32))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (_garbage, "the collector answers 200"),
        (_other_shape, "does not hold"),
        (_nested, "the collector answers 200"),
        (_broken, "the collector answers 500: internal error"),
        (_elsewhere, "the collector answers 302"),
        (_huge, "answer is too large"),
        (_hangs, "ReadTimeout"),
        (_drips, "takes too long"),
        (_closes, "RemoteProtocolError"),
        (_unsigned, "not signed by the collector"),
        (_by_another, "not signed by the collector"),
        (_for_another, "for something else"),
    ],
)
def test_what_is_no_receipt_counts_for_nothing(
    spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, said: str
) -> None:
    """Then the collector comes to its senses, and all of it goes through."""
    monkeypatch.setattr(shipper, "ANSWER_S", 0.2)
    writer = writer_of(spool.open_stream("w"))
    writer.append_many([request(number) for number in range(20)])
    spool.commit()
    with OddCollector(tmp_path / "data", answer) as odd:
        sender = Shipper(spool, odd.url, None, backoff_s=FAST)
        sender._client.timeout = 0.25
        sender.start()
        try:
            until(lambda: odd.asked >= 3)
            until(lambda: not sender.state().ok)
            assert said in (sender.state().error or ""), sender.state()
            assert sender.state().batches == 0
            assert receipted(spool, writer.stream) == -1
            assert not list(spool.directory.glob("*.receipt"))
            odd.answer = _honest
            until(lambda: receipted(spool, writer.stream) == 19)
            until(lambda: sender.state().ok)
            assert sender.state().error is None
        finally:
            asyncio.run(sender.stop(flush_s=1.0))
    assert verify(spool.directory).ok
    assert stored(tmp_path / "data") == spooled(spool.directory)


def test_retries_are_bounded_in_rate(spool: Spool, tmp_path: Path) -> None:
    writer = writer_of(spool.open_stream("w"))
    writer.append(request(0))
    spool.commit()
    with OddCollector(tmp_path / "data", _broken) as odd:
        sender = Shipper(spool, odd.url, None, backoff_s=(0.05, 0.2))
        sender.start()
        time.sleep(1.0)
        asyncio.run(sender.stop(flush_s=0.0))
        assert 4 <= odd.asked <= 10


def test_the_default_pauses_grow_to_a_bound() -> None:
    assert list(shipper.BACKOFF_S) == sorted(shipper.BACKOFF_S)
    assert shipper.BACKOFF_S[0] >= 0.5
    assert shipper.BACKOFF_S[-1] <= 60


def test_another_collector_in_its_place_is_not_believed(spool: Spool, tmp_path: Path) -> None:
    writer = writer_of(spool.open_stream("w"))
    writer.append(request(0))
    spool.commit()
    with OddCollector(tmp_path / "first", _honest) as odd, Shipping(spool, odd.url):
        until(lambda: receipted(spool, writer.stream) == 0)
    writer.append(request(1))
    spool.commit()
    with OddCollector(tmp_path / "second", _honest) as odd, Shipping(spool, odd.url) as shipping:
        until(lambda: not shipping.state().ok)
        assert "key is not the one that this host knows" in (shipping.state().error or "")
        assert receipted(spool, writer.stream) == 0
        assert not refusal_path(spool.directory, writer.stream).exists()
    assert verify(spool.directory).ok


def test_a_rolled_back_collector_shows_in_verify(spool: Spool, tmp_path: Path) -> None:
    data, backup = tmp_path / "data", tmp_path / "backup"
    writer = writer_of(spool.open_stream("w"))

    def ship_one(number: int, condition: Callable[[], bool]) -> None:
        writer.append(request(number))
        spool.commit()
        with OddCollector(data, _honest) as odd, Shipping(spool, odd.url):
            until(condition)

    ship_one(0, lambda: receipted(spool, writer.stream) == 0)
    shutil.copytree(data, backup)
    ship_one(1, lambda: receipted(spool, writer.stream) == 1)
    shutil.rmtree(data)
    backup.rename(data)
    ship_one(2, lambda: refusal_path(spool.directory, writer.stream).exists())
    report = verify(spool.directory)
    assert [(finding.stream, finding.seq) for finding in report.findings] == [(writer.stream, 1)]
    assert "records 1 to 1 are missing: this collector was rolled back" in report.findings[0].problem


def test_a_spool_that_was_cut_shows_in_verify(spool: Spool, tmp_path: Path) -> None:
    """Records and signatures cut to an earlier, consistent state: only the receipt knows."""
    writer = writer_of(spool.open_stream("w"))
    writer.append(request(0))
    spool.commit()
    (segment,) = segment_paths(spool.directory, writer.stream)
    sizes = {path: path.stat().st_size for path in (segment, signature_path(segment))}
    writer.append(request(1))
    spool.commit()
    with OddCollector(tmp_path / "data", _honest) as odd, Shipping(spool, odd.url):
        until(lambda: receipted(spool, writer.stream) == 1)
    assert verify(spool.directory).ok
    for path, size in sizes.items():
        with path.open("r+b") as file:
            file.truncate(size)
    report = verify(spool.directory)
    assert [finding.seq for finding in report.findings] == [1]
    assert "a collector holds a head that is not among the signed ones here" in report.findings[0].problem


def test_an_altered_receipt_shows_in_verify(spool: Spool, tmp_path: Path) -> None:
    writer = writer_of(spool.open_stream("w"))
    writer.append(request(0))
    spool.commit()
    with OddCollector(tmp_path / "data", _honest) as odd, Shipping(spool, odd.url):
        until(lambda: receipted(spool, writer.stream) == 0)
    path = receipt_path(spool.directory, writer.stream)
    good = path.read_text()
    changes: list[Callable[[str], str]] = [
        lambda text: text.replace('"last":0', '"last":1'),
        lambda text: text.replace('"ended":false', '"ended":true'),
        lambda text: text.replace('"sig":"', '"sig":"00'),
        lambda text: text.replace("{", "{ ", 1),
        lambda text: "",
    ]
    for change in changes:
        path.write_text(change(good))
        assert not verify(spool.directory).ok, change(good)
    path.write_text(good)
    assert verify(spool.directory).ok


def test_a_reinstalled_host_shows_in_verify(tmp_path: Path) -> None:
    with OddCollector(tmp_path / "data", _honest) as odd:
        first = make_spool(tmp_path / "audit")
        writer_of(first.open_stream("w")).append(request(0))
        first.commit()
        with Shipping(first, odd.url):
            until(lambda: odd.store.flows() or odd.asked)
        first.close()
    with OddCollector(tmp_path / "data", _honest) as odd:
        second = make_spool(tmp_path / "audit-of-the-new-system")
        writer = writer_of(second.open_stream("w"))
        writer.append(request(1))
        second.commit()
        with Shipping(second, odd.url):
            until(lambda: refusal_path(second.directory, writer.stream).exists())
        second.close()
        report = verify(second.directory)
        assert [finding.stream for finding in report.findings] == [writer.stream]
        assert "known with another key: it was reinstalled, or is somebody else" in report.findings[0].problem


def test_two_instances_ship_one_directory(tmp_path: Path) -> None:
    """Both take up what a third one left; nothing is stored twice."""
    with CollectorProcess(tmp_path / "data") as collector:
        third = make_spool(tmp_path / "audit")
        left = writer_of(third.open_stream("w"))
        for number in range(200):
            left.append(request(number))
        third.close()
        spools = [make_spool(tmp_path / "audit") for _ in range(2)]
        writers = [writer_of(spool.open_stream("w")) for spool in spools]
        with Shipping(spools[0], collector.url), Shipping(spools[1], collector.url):
            for number, (spool, writer) in enumerate(zip(spools, writers, strict=True)):
                writer.append(request(300 + number))
                spool.commit()
            until(lambda: all(receipted(spools[0], w.stream) == w.seq - 1 for w in (left, *writers)))
        for spool in spools:
            spool.close()
        report = verify(tmp_path / "audit")
        assert report.ok, report.findings
        assert stored(tmp_path / "data") == spooled(tmp_path / "audit")


def test_a_hanging_collector_does_not_hold_up_the_end(
    spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipper, "STOP_S", 0.3)
    writer_of(spool.open_stream("w")).append(request(0))
    spool.commit()
    release = threading.Event()

    def hang(odd: OddCollector, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        release.wait(30)
        handler.close_connection = True

    with OddCollector(tmp_path / "data", hang) as odd:
        sender = Shipper(spool, odd.url, None)
        sender.start()
        until(lambda: odd.asked)
        began = time.monotonic()
        asyncio.run(sender.stop(flush_s=0.3))
        assert time.monotonic() - began < 2
        release.set()
        sender._thread.join(5)
    assert verify(spool.directory).ok
