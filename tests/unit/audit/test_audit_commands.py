"""`sidecar audit` from the outside: every flag, nothing there, something damaged, something being written."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sidecar.audit.segment import segment_paths
from sidecar.audit.spool import Spool
from sidecar.cli import main
from sidecar.cli.audit import _clock
from tests.support.spools import flow_of, make_spool, request, writer_of

SIDECAR = Path(sys.executable).with_name("sidecar")


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Audit = Callable[..., Done]


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Audit:
    def call(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["sidecar", "audit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code is None or isinstance(ended.value.code, int)
        return Done(ended.value.code or 0, said.out, said.err)

    return call


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """Two streams that have ended, three flows."""
    spool = make_spool(tmp_path / "audit")
    for numbers in ((1, 2), (3,)):
        writer = writer_of(spool.open_stream("w"))
        for number in numbers:
            writer.append_many(flow_of(number, f"SELECT {number} AS wanted"))
    spool.close()
    return spool.directory


def damage(directory: Path, needle: bytes) -> Path:
    """Change one byte of the record that holds `needle`; returns its segment."""
    for path in directory.glob("*.seg"):
        data = path.read_bytes()
        if needle in data:
            path.write_bytes(data.replace(needle, needle[:-1] + b"X"))
            return path
    raise AssertionError(f"no record holds {needle!r}")


def test_tail_prints_the_newest_in_order(audit: Audit, closed: Path) -> None:
    done = audit("tail", "--directory", closed, "-n", "3", "--json")
    assert (done.status, done.err) == (0, "")
    assert [row["kind"] for row in done.rows] == ["request", "response", "close"]
    # Each line can be read alone: who and where stand in the flow's first record, which is not among these.
    assert all(row["principal"]["subject"] == "repo:acme/reports" for row in done.rows)
    assert all(row["target"]["host"] == "orders.internal" for row in done.rows)
    text = audit("tail", "--directory", closed).out.splitlines()
    assert len(text) == 12
    assert "psql[101] → orders.internal:5432" in text[0]
    assert audit("tail", "--directory", closed, "-n", "0").out == ""


def test_show_prints_a_transcript(audit: Audit, closed: Path) -> None:
    wanted = next(row for row in audit("export", "--directory", closed).rows if row["kind"] == "request")
    for name in (wanted["flow"], wanted["flow"][-8:], wanted["id"][-8:]):
        done = audit("show", "--directory", closed, name)
        assert done.status == 0, done.err
        for part in (
            "repo:acme/reports",
            "SELECT 1 AS wanted",
            "/usr/bin/psql",
            "bash[7]",
            "NULL",
            "client_closed",
        ):
            assert part in done.out
    rows = audit("show", "--directory", closed, wanted["flow"], "--json").rows
    assert [row["kind"] for row in rows] == ["open", "request", "response", "close"]
    missing = audit("show", "--directory", closed, "deadbeef")
    assert (missing.status, missing.out) == (1, "")
    assert "there is no flow deadbeef" in missing.err


def test_export_to_a_file_only_its_owner_reads(audit: Audit, closed: Path, tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    assert audit("export", "--directory", closed, "--out", out).status == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 12
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert rows == audit("export", "--directory", closed, "--json").rows
    refused = audit("export", "--directory", closed, "--out", tmp_path / "absent" / "x")
    assert (refused.status, refused.out) == (2, "")
    assert "absent" in refused.err


def test_the_configuration_names_the_directory(audit: Audit, closed: Path, tmp_path: Path) -> None:
    """Whoever gave `-c` to `exec` need not look up where the records are."""
    config = tmp_path / "sidecar.yaml"
    config.write_text(f"audit: {{directory: {closed}}}\n")
    for command in ("tail", "export", "verify"):
        named, configured = audit(command, "--directory", closed), audit(command, "-c", config)
        assert (configured.status, configured.out) == (0, named.out)


def test_what_is_not_of_today_has_its_date() -> None:
    now = datetime.datetime.now()
    assert _clock(int(now.timestamp() * 1e9)).count("-") == 0
    before = now - datetime.timedelta(days=2)
    assert _clock(int(before.timestamp() * 1e9)).startswith(f"{before:%Y-%m-%d %H:%M:%S}")


def test_verify_says_what_it_saw(audit: Audit, closed: Path) -> None:
    for where in ((closed,), ("--directory", closed)):
        done = audit("verify", *where)
        assert done.status == 0
        assert done.out == "ok: 12 records in 2 streams, 12 signed, 0 receipted, 0 not signed yet\n", done.out
    report = audit("verify", closed, "--json").rows[0]
    assert report["ok"] is True
    assert report["records"] == 12
    assert (report["findings"], report["notes"], report["gaps"]) == ([], [], {})
    assert [stream["end"] for stream in report["streams"]] == ["stopped", "stopped"]


@pytest.mark.parametrize("command", ["tail", "export", "verify", "show"])
def test_a_directory_that_is_not_there_or_empty(audit: Audit, tmp_path: Path, command: str) -> None:
    flow = ["abcd1234"] if command == "show" else []
    absent = audit(command, *flow, "--directory", tmp_path / "absent")
    assert (absent.status, absent.out) == (1, "")
    assert f"there is no audit directory {tmp_path / 'absent'}" in absent.err
    assert "hint: name one with --directory" in absent.err
    (tmp_path / "empty").mkdir()
    empty = audit(command, *flow, "--directory", tmp_path / "empty")
    if command in ("tail", "export"):
        assert (empty.status, empty.out, empty.err) == (0, "", "")
    elif command == "show":
        assert (empty.status, empty.out) == (1, "")
    else:
        assert (empty.status, empty.out) == (1, "")
        assert f"{tmp_path / 'empty'} is no audit directory: it holds nothing" in empty.err
        assert "hint: name one with --directory; where records were, all of them were removed" in empty.err
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("command", ["tail", "export", "verify", "show"])
def test_a_file_instead_of_a_directory(
    audit: Audit, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("audit:\n")
    flow = ["abcd1234"] if command == "show" else []
    named = audit(command, *flow, "--directory", tmp_path / "file")
    assert (named.status, named.out) == (2, "")
    assert "is a file" in named.err
    # As the configuration has it.
    configured = tmp_path / "sidecar.yaml"
    configured.write_text(f"audit: {{directory: {tmp_path / 'file'}}}\n")
    monkeypatch.setattr("sidecar.config.DEFAULT_FILE", configured)
    done = audit(command, *flow)
    assert (done.status, done.out) == (2, "")
    assert f"{tmp_path / 'file'} is a file, no audit directory" in done.err
    assert "hint: name the directory that holds it" in done.err


def test_verify_without_the_hosts_public_key(audit: Audit, closed: Path) -> None:
    (closed / "host.pub").unlink()
    done = audit("verify", closed)
    assert done.status == 1
    assert done.out.startswith(
        f"BAD  missing: {closed / 'host.pub'}. Without the host's public key nothing here can be verified: put it back"
    )
    assert not (closed / "host.pub").exists()
    for path in closed.iterdir():
        if path.name != "host.key":
            path.unlink()
    assert "BAD  missing: " in audit("verify", closed).out  # all the rest is gone too
    (closed / "host.pub").write_text("what?\n")
    broken = audit("verify", closed)
    assert broken.status == 1
    assert f"BAD  {closed / 'host.pub'} is no public key: nothing can be verified without it" in broken.out


def test_verify_of_another_directory(audit: Audit, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("hello")
    done = audit("verify", tmp_path)
    assert (done.status, done.out) == (1, "")
    assert f"{tmp_path} is no audit directory: it holds other files" in done.err


def test_usage(audit: Audit, closed: Path) -> None:
    for arguments in (("tail", "-n", "many"), ("show",), ("export", "--nonsense"), ("tail", "-n", "-1")):
        assert audit(*arguments, "--directory", closed).status == 2


def test_an_altered_record_is_named_and_the_others_are_still_read(audit: Audit, closed: Path) -> None:
    path = damage(closed, b"SELECT 1 AS wanted")
    done = audit("export", "--directory", closed)
    assert done.status == 1
    assert str(path) in done.err
    assert "byte " in done.err
    assert "record 1 (" in done.err
    assert "does not follow the chain: it was altered" in done.err
    assert "hint: sidecar audit verify" in done.err
    texts = [row["operation"]["text"] for row in done.rows if row["kind"] == "request"]
    assert texts == ["SELECT 3 AS wanted"]  # nothing of a stream after what does not hold, all of the other
    verified = audit("verify", closed)
    assert verified.status == 1
    assert ", record 1 (" in verified.out
    assert "altered" in verified.out
    report = audit("verify", closed, "--json").rows[0]
    assert [(finding["seq"], finding["problem"]) for finding in report["findings"]] == [
        (1, "altered: it does not follow the chain")
    ]
    assert report["findings"][0]["record"] in verified.out
    tail = audit("tail", "--directory", closed)
    assert tail.status == 1
    assert str(path) in tail.err
    assert "SELECT 3 AS wanted" in tail.out
    shown = audit("show", "--directory", closed, next(r["flow"] for r in done.rows if r["kind"] == "request"))
    assert shown.status == 0


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        (lambda data: b"XXXX" + data[4:], "a segment's header is damaged"),
        (lambda data: data[:-3], "the file goes on with what is no whole record"),
        (lambda data: data + b"\xff" * 40, "the file goes on with what is no whole record"),
        (lambda data: b"", "a segment's header is damaged"),
    ],
)
def test_a_damaged_file_is_named(
    audit: Audit, closed: Path, what: Callable[[bytes], bytes], problem: str
) -> None:
    path = min(closed.glob("*.seg"))
    path.write_bytes(what(path.read_bytes()))
    for command in ("export", "tail"):
        done = audit(command, "--directory", closed)
        assert done.status == 1, command
        assert f"{path}, byte " in done.err
        assert problem in done.err
        assert "SELECT 3 AS wanted" in done.out
    assert audit("verify", closed).status == 1


def test_control_characters_do_nothing_to_a_terminal(audit: Audit, tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "audit")
    writer = writer_of(spool.open_stream("w"))
    writer.append_many(flow_of(1, "SELECT '\x1b]0;owned\x07'", value="\x1b[2J"))
    spool.close()
    assert "\x1b" not in audit("tail", "--directory", spool.directory).out
    flow = audit("export", "--directory", spool.directory).rows[0]["flow"]
    shown = audit("show", flow, "--directory", spool.directory).out
    assert "\x1b" not in shown
    assert "\\x1b[2J" in shown


def test_tail_follows_what_is_written(tmp_path: Path) -> None:
    """Nothing left out or shown twice: over a rotation, a new stream, records that are not committed yet."""
    spool = make_spool(tmp_path / "audit")
    handle = spool.open_stream("w")
    writer = writer_of(handle)
    writer.append_many([request(number) for number in range(5)])
    command = [str(SIDECAR), "audit", "tail", "-f", "-n", "2", "--json", "--directory", str(spool.directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        seen = [json.loads(process.stdout.readline()) for _ in range(2)]
        _write_on(spool, handle.stream, writer)
        while len(seen) < 12:
            seen.append(json.loads(process.stdout.readline()))
        process.terminate()
        left, said = process.communicate(timeout=10)
        assert (left, said) == ("", "")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    texts = [row["operation"]["text"] for row in seen]
    assert sorted(texts, key=lambda text: int(text.split()[1])) == [f"SELECT {n}" for n in range(3, 15)]
    spool.close()


def _write_on(spool: Spool, stream: str, writer: Any) -> None:
    writer.append_many([request(number) for number in range(5, 8)])
    following = spool.rotate(stream)
    time.sleep(0.3)  # the reader sees the new segment while the writer is still in the old one
    writer.append(request(8))
    writer.switch(following.fd)
    writer.append_many([request(number) for number in range(9, 12)])
    other = writer_of(spool.open_stream("another"))
    other.append_many([request(number) for number in range(12, 15)])


def test_a_pipe_that_closes_early_is_no_error(closed: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{SIDECAR} audit export --directory {closed} | head -n 1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert json.loads(done.stdout)["kind"] == "open"
    assert done.stderr == ""


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """Below a directory that others may enter; pytest's own are this user's alone."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


def _as_another_user(*arguments: str) -> Done:
    done = subprocess.run(
        [str(SIDECAR), "audit", *arguments],
        capture_output=True, text=True, check=False, timeout=20, user=65534, group=65534, extra_groups=[],
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_is_told(closed: Path, elsewhere: Path) -> None:
    closed = Path(shutil.copytree(closed, elsewhere / "audit"))
    closed.chmod(0o700)
    for command in ("tail", "export", "verify"):
        done = _as_another_user(command, "--directory", str(closed))
        assert (done.status, done.out) == (3, ""), command
        assert f"{closed} may not be read by this user: Permission denied" in done.err
        assert "hint: run it as root" in done.err
    # What may be read in part says nothing of the rest, and is no tampering.
    closed.chmod(0o755)
    for command in ("export", "verify"):
        done = _as_another_user(command, "--directory", str(closed))
        assert (done.status, done.out) == (3, ""), command
        assert "Permission denied" in done.err
    for path in closed.iterdir():
        if path.name != "host.key":
            path.chmod(0o644)
    done = _as_another_user("verify", str(closed))
    assert done.status == 0, done
    assert "note whether host.key is this key's was not looked at: it may not be read" in done.out


def test_segments_that_retention_takes_away_are_no_damage(audit: Audit, tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "audit")
    handle = spool.open_stream("w")
    writer = writer_of(handle)
    writer.append_many([request(1), request(2)])
    writer.switch(spool.rotate(handle.stream).fd)
    writer.append(request(3))
    spool.close()
    segment_paths(spool.directory, handle.stream)[0].unlink()
    done = audit("export", "--directory", spool.directory)
    assert (done.status, [row["seq"] for row in done.rows]) == (0, [2])


def test_tail_reads_only_what_it_may_need(audit: Audit, closed: Path) -> None:
    """A segment that was last written long before the newest records holds none of them."""
    path = damage(closed, b"SELECT 1 AS wanted")
    opened_ns = min(row["ts_ns"] for row in audit("export", "--directory", closed).rows)
    os.utime(path, ns=(0, opened_ns - 120 * 10**9))
    done = audit("tail", "--directory", closed, "-n", "4")
    assert (done.status, done.err) == (0, "")
    assert "SELECT 3 AS wanted" in done.out
    more = audit("tail", "--directory", closed, "-n", "5")  # more than the other stream has
    assert more.status == 1
    assert str(path) in more.err


PEAK = """
import resource, sys
from pathlib import Path
from sidecar.audit import read
from sidecar.audit.verify import verify
def look(directory):
    assert verify(directory).ok
    exported = sum(1 for _ in read.joined(directory))
    assert len(read.Follower(directory).newest(50)) == 50
    return exported, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for name in sys.argv[1:]: print(*look(Path(name)))
"""


def test_memory_does_not_grow_with_the_records(tmp_path: Path) -> None:
    """The larger spool has 20 times as many, in more streams; as objects they would take above 100 MB."""
    for name, streams, flows in (("small", 2, 250), ("large", 10, 1_000)):
        spool = make_spool(tmp_path / name)
        for _ in range(streams):
            writer = writer_of(spool.open_stream("w"))
            for number in range(flows):
                writer.append_many(flow_of(number, "SELECT " + "x" * 100))
            spool.commit()
        spool.close()
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    (few, before), (many, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (few, many) == (2_000, 40_000)
    assert after - before < 8 * 1024**2
