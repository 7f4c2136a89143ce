"""curl, wget, httpx and urllib against nginx and an ASGI program, through the steered listener: nothing differs until a rule fires."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.audit.verify import verify
from tests.support.far_host import FarHost
from tests.support.http_far import CUSTOMERS, HttpFar
from tests.support.steered_job import SIDECAR, SteeredJob, peak_memory_bytes, pending_hold, worker_pids

pytestmark = [pytest.mark.root, pytest.mark.servers]

BIG_BYTES = 2 * 1024**3
POLICY = """\
version: 1
rules:
  - name: no-delete
    when: {protocol: http, method: [DELETE]}
    deny: not by a job
  - name: writes
    when: {protocol: http, method: [PUT]}
    approve: {within: 20s}
  - name: api-pii
    when: {protocol: http, path: ["/customers*", "/page.html"]}
    mask: {json: {"$.customers[*].ssn": redact}}
"""
MASKED = json.dumps(CUSTOMERS).replace("123-45-6789", "[redacted]")
PYTHON = """
import sys, urllib.request, urllib.error, httpx
api, nginx = sys.argv[1:]
print(urllib.request.urlopen(nginx + "/customers.json").read().decode())
with httpx.Client() as client:
    for number in range(30):
        client.get(nginx + "/customers.json")
    print(client.get(nginx + "/customers.json").text)
    print(client.request("DELETE", nginx + "/x").json()["rule"])
    print(client.post(api + "/up", content=iter([b"a" * 1000] * 50)).json()["body"])
    print(client.get(api + "/customers").text, client.get(api + "/after").status_code)
try: urllib.request.urlopen(urllib.request.Request(nginx + "/x", method="DELETE"))
except urllib.error.HTTPError as error: print(error.code, error.headers["Content-Type"])
"""


@pytest.fixture(scope="module")
def far() -> Iterator[HttpFar]:
    with FarHost() as hosts, HttpFar(hosts, big_bytes=BIG_BYTES) as servers:
        yield servers


@pytest.fixture
def job(far: HttpFar, tmp_path: Path) -> SteeredJob:
    return SteeredJob(far.hosts, tmp_path, POLICY)


def urls(far: HttpFar) -> tuple[str, str]:
    return f"http://{far.hosts.far_address}:8080", f"http://{far.hosts.far_address}"


def test_python_clients_and_kept_connections(far: HttpFar, job: SteeredJob) -> None:
    before = len(far.nginx_log())
    done = job.run(sys.executable, "-c", PYTHON, *urls(far))
    assert done.stdout.splitlines() == [
        MASKED, MASKED, "no-delete", "50000", f"{MASKED} 200", "403 application/problem+json",
    ], done.stderr  # fmt: skip
    seen = far.nginx_log()[before:]
    assert len(seen) == 32
    assert not [row for row in seen if row[2] == "DELETE"]
    by_connection = {row[0] for row in seen}
    assert len(by_connection) == 2  # urllib's, and one that httpx kept over a denial
    assert max(int(row[1]) for row in seen) == 31
    assert verify(job.audit).ok


def test_curl_and_wget(far: HttpFar, job: SteeredJob) -> None:
    api, nginx = urls(far)
    script = f"""
    curl -s --compressed {nginx}/customers.json; echo
    curl -s --http2 {api}/customers; echo
    curl -s -0 {nginx}/customers.json; echo
    curl -s -r 0-20 {nginx}/customers.json; echo
    curl -s -o /dev/null -w '%{{http_code}}\\n' -I {nginx}/customers.json
    curl -s -o /dev/null -w '%{{http_code}}\\n' {nginx}/page.html
    curl -s -o /dev/null -w '%{{http_code}}\\n' {nginx}/customers-missing
    curl -s -H 'Expect: 100-continue' -H 'Transfer-Encoding: chunked' -d @{__file__} {api}/up | head -c 60; echo
    curl -s -o /dev/null -w '%{{http_code}} %{{http_code}} %{{num_connects}}\\n' -X DELETE {nginx}/a --next -s -o /dev/null -w '%{{num_connects}}\\n' {nginx}/customers.json
    wget -q -O - {nginx}/customers.json; echo
    """
    done = job.run("sh", "-c", script)
    lines = done.stdout.splitlines()
    assert lines[:4] == [MASKED, MASKED, MASKED, MASKED], done.stdout
    assert lines[4:7] == ["200", "403", "404"]
    assert lines[7].startswith('{"method": "POST", "path": "/up"')
    assert lines[8:10] == ["403 403 1", "0"]
    assert lines[10] == MASKED
    assert verify(job.audit).ok


def test_a_hold_is_shown_approved_and_rejected(far: HttpFar, job: SteeredJob) -> None:
    api, _ = urls(far)

    def curl() -> subprocess.Popen[str]:
        return job.start("curl", "-s", "-w", " %{http_code}", "-T", "-", "-H", "Content-Type: application/json",
                         f"{api}/orders/7?key=zz1", stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def feed(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.write('{"state": "void", "password": "zz2"}')
        process.stdin.close()
        process.stdin = None

    before = len(far.ask("/requests"))
    running = curl()
    feed(running)
    hold = pending_hold()
    shown = subprocess.run(
        [SIDECAR, "approvals", "show", hold["id"]], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    assert f"PUT {far.hosts.far_address}/orders/7?key=[removed]" in shown
    assert '"state": "void"' in shown
    assert "curl" in shown
    assert "zz" not in shown
    assert len(far.ask("/requests")) == before
    subprocess.run([SIDECAR, "approvals", "approve", hold["id"]], check=True, capture_output=True, timeout=30)
    out, _ = running.communicate(timeout=30)
    assert out.endswith(" 200")
    (got,) = far.ask("/requests")[before:]
    assert (got["method"], got["path"], got["body"]) == ("PUT", "/orders/7", 36)
    again = subprocess.run(
        [SIDECAR, "approvals", "approve", hold["id"]], capture_output=True, check=False, timeout=30
    )
    assert again.returncode != 0

    running = curl()
    feed(running)
    hold = pending_hold()
    subprocess.run(
        [SIDECAR, "approvals", "reject", hold["id"], "--reason", "not today"],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    out, _ = running.communicate(timeout=30)
    assert "not today" in out
    assert out.endswith(" 403")
    assert len(far.ask("/requests")) == before + 1

    leaving = job.start("curl", "-s", "-m", "2", "-X", "PUT", f"{api}/orders/8", stdout=subprocess.PIPE)
    leaving.communicate(timeout=30)
    assert leaving.returncode == 28  # curl's own time-out
    assert [row["hold"]["state"] for row in job.records("decision")] == ["approved", "rejected", "withdrawn"]
    assert len(far.ask("/requests")) == before + 1
    assert verify(job.audit).ok


def test_two_gigabytes_each_way_at_constant_memory(far: HttpFar, job: SteeredJob) -> None:
    api, nginx = urls(far)
    big = far.directory / "www" / "big"
    script = (
        f"curl -s -o /dev/null -w '%{{size_download}}\\n' {nginx}/big && "
        f"curl -s -o /dev/null -w '%{{size_upload}}\\n' -H 'Expect:' -X POST -T {big} {api}/up && echo done && cat"
    )
    running = job.start("sh", "-c", script, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert running.stdout is not None
        lines = [running.stdout.readline().strip() for _ in range(3)]
        assert lines == [str(BIG_BYTES), str(BIG_BYTES), "done"]
        peaks = [peak_memory_bytes(pid) for pid in worker_pids(running.pid)]
        assert peaks
        assert max(peaks) < 120 * 1024**2
    finally:
        running.communicate("", timeout=30)
    sizes = [
        (row["response"]["bytes"], (row.get("operation") or {}).get("body_bytes"))
        for row in job.records("response")
    ]
    assert sizes[0][0] == BIG_BYTES
    assert sizes[1][1] == BIG_BYTES


SLOW = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 8080)) as sock:
    sock.sendall(b"GET /endless HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n")
    sock.recv(1000)
    print("reading stopped", flush=True)
    sys.stdin.readline()
    got = 0
    while got < 100_000_000:
        got += len(sock.recv(1_000_000))
    print("went on", flush=True)
"""


def test_a_slow_reader_slows_the_sender_down(far: HttpFar, job: SteeredJob) -> None:
    running = job.start(
        sys.executable, "-c", SLOW, far.hosts.far_address, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert running.stdout is not None
        assert running.stdin is not None
        assert running.stdout.readline() == "reading stopped\n"
        sent = -1
        deadline = time.monotonic() + 20
        while sent != (sent := far.ask("/sent")):
            assert time.monotonic() < deadline, "the sender is never slowed down"
            time.sleep(1)
        assert 0 < sent < 40 * 1024**2  # what two pairs of socket buffers and our own bound hold
        assert max(peak_memory_bytes(pid) for pid in worker_pids(running.pid)) < 100 * 1024**2
        running.stdin.write("\n")
        running.stdin.flush()
        assert running.stdout.readline() == "went on\n"
    finally:
        running.communicate("", timeout=30)
