"""`audit verify`, `export` and recovery beside instances that write, rotate, ship, retire, end and die in other processes: nothing
of that is a finding, and what is altered meanwhile is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidecar.audit import hostkey, read
from sidecar.audit.segment import (
    is_live,
    lock_path,
    open_lock,
    segment_paths,
    signature_path,
    stream_names,
)
from sidecar.audit.verify import verify
from tests.support.collectors import until
from tests.support.spools import Collector, make_spool, request, writer_of

MAX_BYTES = 300_000
TEXT = "x" * 700
LOOK_S = 2.0


class Instances:
    """Processes that write into one directory until they are ended."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._children: list[int] = []

    def start(self, story: Callable[[Path, random.Random], None], seed: int) -> int:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            with contextlib.suppress(BaseException):
                chance = random.Random(seed)
                while True:
                    story(self.directory, chance)
            os._exit(1)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(child, child)  # whoever of the two is first
        self._children.append(child)
        return child

    def running(self) -> bool:
        return all(os.waitpid(child, os.WNOHANG) == (0, 0) for child in self._children)

    def end(self) -> None:
        """With what they started."""
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
        self._children.clear()


@pytest.fixture
def instances(tmp_path: Path) -> Iterator[Instances]:
    Collector(make_directory(tmp_path / "audit"), tmp_path / "collector")
    started = Instances(tmp_path / "audit")
    try:
        yield started
    finally:
        started.end()


def make_directory(directory: Path) -> Path:
    make_spool(directory).close()
    return directory


def an_agent(directory: Path, chance: random.Random) -> None:
    """Long-lived: rotates, ships and removes what is shipped."""
    spool = make_spool(directory, max_bytes=MAX_BYTES)
    collector = Collector(directory, directory.parent / "collector")
    handle = spool.open_stream("w")
    writer = writer_of(handle)
    for number in range(1_500):
        writer.append(request(number, TEXT))
        if chance.random() < 0.05:
            following = spool.rotate(handle.stream)
            for late in range(chance.randrange(3)):  # the writer learns of it a little later
                writer.append(request(late, TEXT))
            writer.switch(following.fd)
        if chance.random() < 0.1:
            spool.commit()
        if chance.random() < 0.03:
            collector.take(spool, handle.stream)
            spool._measure_at = 0.0
    spool.close()


def an_exec(directory: Path, chance: random.Random) -> None:
    """Short-lived; its start recovers what the dead left."""
    spool = make_spool(directory, max_bytes=MAX_BYTES)
    collector = Collector(directory, directory.parent / "collector")
    handle = spool.open_stream("w")
    writer = writer_of(handle)
    writer.append_many([request(number, TEXT) for number in range(chance.randrange(4))])
    spool.commit()
    spool.close()
    collector.take(spool, handle.stream)


def one_that_dies(directory: Path, chance: random.Random) -> None:
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            an_agent(directory, chance)
        os._exit(1)
    time.sleep(chance.random() * 0.1)
    chance.random()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    an_exec(directory, chance)


def test_nothing_that_instances_do_is_a_finding(instances: Instances) -> None:
    for seed, story in enumerate((an_agent, an_exec, an_exec, one_that_dies)):
        instances.start(story, seed)
    end = time.monotonic() + LOOK_S
    looked = live = 0
    while time.monotonic() < end:
        report = verify(instances.directory)
        assert report.ok, report.findings
        live += any(stream.live for stream in report.streams)
        looked += 1
        texts = list(read.records(instances.directory))
        assert all(row["operation"]["text"] == TEXT for row in texts if row["kind"] == "request")
    assert instances.running()
    assert looked > 3
    assert live
    instances.end()
    make_spool(instances.directory).close()  # ends what was left
    report = verify(instances.directory)
    assert report.ok, report.findings
    assert not any(stream.live or stream.crashed for stream in report.streams)


# -- what is altered meanwhile


def a_writer(directory: Path, chance: random.Random) -> None:
    """Writes for ever into one stream, slowly, and ships nothing."""
    spool = make_spool(directory)
    handle = spool.open_stream("w")
    writer = writer_of(handle)
    for number in range(100_000):
        writer.append(request(number, TEXT))
        if number % 5 == 4:
            writer.switch(spool.rotate(handle.stream).fd)
        spool.commit()
        time.sleep(0.002)


def flip(directory: Path, stream: str) -> None:
    path = segment_paths(directory, stream)[1]
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


def remove_a_segment(directory: Path, stream: str) -> None:
    path = segment_paths(directory, stream)[1]
    path.unlink()


def remove_a_segment_and_its_signatures(directory: Path, stream: str) -> None:
    path = segment_paths(directory, stream)[1]
    path.unlink()
    signature_path(path).unlink()


def remove_signatures(directory: Path, stream: str) -> None:
    signature_path(segment_paths(directory, stream)[1]).unlink()


def cut_records(directory: Path, stream: str) -> None:
    path = segment_paths(directory, stream)[1]
    os.truncate(path, path.stat().st_size - 100)


def cut_signatures(directory: Path, stream: str) -> None:
    path = signature_path(segment_paths(directory, stream)[1])
    os.truncate(path, path.stat().st_size - 20)


def remove_the_lock(directory: Path, stream: str) -> None:
    lock_path(directory, stream).unlink()


def remove_all_of_it(directory: Path, stream: str) -> None:
    for path in directory.glob(f"{stream}.*"):
        path.unlink()


@pytest.mark.parametrize(
    ("how", "problem", "record"),
    [
        (flip, "altered: it does not follow the chain", 9),
        (remove_a_segment, "missing: ", 0),
        (remove_a_segment_and_its_signatures, "missing: signatures go from record 5 to 10", 5),
        (remove_signatures, "000001.sig is missing", 5),
        (cut_records, "are no whole record", 9),
        (cut_signatures, "missing: signatures go from record 9 to 10", 9),
        (remove_the_lock, "", None),
        (remove_all_of_it, "missing: ", None),
    ],
)
def test_what_is_altered_beside_a_writer_is_found(
    instances: Instances, how: Callable[[Path, str], None], problem: str, record: int | None
) -> None:
    instances.start(a_writer, 1)
    directory = instances.directory
    until(lambda: any(len(segment_paths(directory, name)) > 3 for name in stream_names(directory)))
    (stream,) = stream_names(directory)
    before = verify(directory)
    assert before.ok, before.findings
    assert before.streams[0].live
    how(directory, stream)
    after = verify(directory)
    assert instances.running()
    (finding,) = after.findings
    assert finding.stream == stream
    assert problem in finding.problem
    if record is not None:
        assert finding.seq == record


# -- locks


def test_a_lock_file_that_another_instance_removed_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A starting instance takes the file of a stream that is just being made for a dead one's, locks it and removes it."""
    lock = fcntl.flock
    removed: list[str] = []

    def removed_before_it_is_locked(descriptor: int, how: int) -> None:
        if not removed:
            removed.append("")
            lock_path(tmp_path, "s").unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_before_it_is_locked)
    held = open_lock(tmp_path, "s", create=True)
    assert held is not None
    assert os.path.samestat(os.fstat(held), lock_path(tmp_path, "s").stat())
    assert is_live(tmp_path, "s")
    os.close(held)
    removed.clear()
    assert open_lock(tmp_path, "s") is None  # recovery leaves alone what has ended meanwhile


def test_a_reader_that_looks_in_that_moment_keeps_no_stream_from_being_made(tmp_path: Path) -> None:
    path = lock_path(tmp_path, "s")
    path.touch()
    reader = os.open(path, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    gone = threading.Timer(0.1, os.close, (reader,))
    gone.start()
    held = open_lock(tmp_path, "s", create=True)
    gone.join()
    assert held is not None
    os.close(held)


def test_instances_that_start_at_once_have_one_key(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    directory.mkdir()
    start, go = os.pipe()
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                os.close(go)
                os.read(start, 1)
                for number in range(40):
                    made = hostkey.load_or_create(directory, f"{number}.key", f"{number}.pub")
                    assert made.public == hostkey.load_public(directory / f"{number}.pub")
                status = 0
            os._exit(status)
        children.append(child)
    os.close(start)
    os.close(go)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    assert len(list(directory.iterdir())) == 80
