"""`sidecar exec` in the near namespace with a configuration and a policy of the test's own, and what it left in the audit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.far_host import FarHost

STEERING = "{ports: {5432: postgres, 80: auto, 8080: auto, 2525: auto}}"
SIDECAR = str(Path(sys.executable).parent / "sidecar")


class SteeredJob:
    """One directory: configuration, policy, audit."""

    def __init__(
        self, hosts: FarHost, directory: Path, policy: str, extra: str = "", *, steering: str = STEERING
    ) -> None:
        self.hosts = hosts
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "policy.yaml").write_text(policy)
        self.audit = directory / "audit"
        self.authority = directory / "ca"
        self.config = directory / "sidecar.yaml"
        self.config.write_text(
            f"steering: {steering}\npolicy: policy.yaml\n"
            f"audit: {{directory: {self.audit}}}\ntls: {{authority: {{directory: {self.authority}}}}}\n{extra}"
        )

    def command(self, *command: str) -> list[str]:
        return [SIDECAR, "exec", "-c", str(self.config), "--", *command]

    def run(
        self, *command: str, env: dict[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        return self.hosts.run(self.hosts.near, self.command(*command), env=env, timeout=timeout)

    def start(self, *command: str, **more: Any) -> subprocess.Popen[str]:
        return self.hosts.popen(self.hosts.near, self.command(*command), **more)

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        done = subprocess.run(
            [SIDECAR, "audit", "export", "--directory", str(self.audit)],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        return [row for row in rows if kind is None or row["kind"] == kind]


def pending_hold(timeout_s: float = 20.0) -> dict[str, Any]:
    """The only hold that waits, as `sidecar approvals list --json` prints it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        listed = subprocess.run(
            [SIDECAR, "approvals", "list", "--json"], capture_output=True, text=True, check=False, timeout=30
        )
        found = json.loads(listed.stdout or "[]")
        rows = found if isinstance(found, list) else found.get("holds", [])
        waiting: list[dict[str, Any]] = [row for row in rows if row["state"] == "pending"]
        if waiting:
            return waiting[0]
        time.sleep(0.2)
    raise AssertionError(f"nothing is held: {listed.stderr}")


def worker_pids(front: int) -> list[int]:
    """The inspector's workers, below the process that a test started."""
    children = {0: [front]}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, queue = [], [front]
    while queue:
        pid = queue.pop()
        queue += children.get(pid, [])
        try:
            if b"sidecar.proxy.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def peak_memory_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
