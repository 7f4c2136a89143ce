"""`sidecar run` as a process of its own in the near namespace, and what the far host's API answers to whom."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sidecar.kernel import cgroups
from tests.support.far_host import FarHost
from tests.support.steered_job import SIDECAR

POLICY = """\
version: 1
rules:
  - name: api-pii
    when: {protocol: http}
    mask: {json: {"$.customers[*].ssn": redact}}
"""
READY_S = 60


class Run:
    """Context manager: one `sidecar run` in the near namespace."""

    def __init__(self, hosts: FarHost, directory: Path, scope: str) -> None:
        self.hosts = hosts
        self.audit = directory / "audit"
        self.config = directory / "sidecar.yaml"
        directory.mkdir(exist_ok=True)
        (directory / "policy.yaml").write_text(POLICY)
        self.config.write_text(
            f"steering:\n  scope: {scope}\n  ports: {{8080: auto}}\npolicy: policy.yaml\naudit: {{directory: {self.audit}}}\n"
        )
        self.said: list[str] = []
        self.instance = ""
        self._ready = threading.Event()

    def __enter__(self) -> Run:
        self.process = self.hosts.popen(
            self.hosts.near,
            [SIDECAR, "run", "-c", str(self.config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(READY_S)
        if not self.instance:
            self.end()
            pytest.fail("".join(self.said))
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if "instance " in line and " runs" in line:
                self.instance = line.partition("instance ")[2].split()[0]
                self._ready.set()
        self._ready.set()

    def status(self) -> dict[str, Any]:
        command = [SIDECAR, "status", "--json", "--instance", self.instance]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        (found,) = json.loads(done.stdout)["instances"]
        assert done.returncode == (0 if found["ok"] else 1)
        return dict(found)

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(30)
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def __exit__(self, *_: object) -> None:
        self.end()
        in_near = f"from sidecar.kernel.removal import remove_all; remove_all({self.instance!r})"
        self.hosts.run(self.hosts.near, [sys.executable, "-c", in_near])  # its table is there


def ask(hosts: FarHost, cgroup: Path | None) -> str:
    """What the API answers a process of this cgroup, or of the test's own."""

    def enter() -> None:
        if cgroup is not None:
            cgroups.move(0, cgroup)

    url = f"http://{hosts.far_address}:8080/customers"
    client = hosts.popen(
        hosts.near, ["curl", "-sS", "-m", "10", url], stdout=subprocess.PIPE, preexec_fn=enter
    )
    return str(client.communicate(timeout=20)[0])


def is_steered(answer: str) -> bool:
    assert '"customers"' in answer
    return "[redacted]" in answer


def exported(audit: Path) -> list[dict[str, Any]]:
    command = [SIDECAR, "audit", "export", "--directory", str(audit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]
