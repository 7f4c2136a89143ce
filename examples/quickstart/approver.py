"""The quickstart plays the approver: watches for the report's hold and decides it with the real command."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from types import TracebackType

RULE = "customer-deletes"
POLL_S = 0.2
LOOK_S = 1.0  # a person looks before deciding


class Approver:
    """In a thread, between `with` and `stop`."""

    def __init__(self, sidecar: str) -> None:
        self.sidecar = sidecar
        self.seen: dict[str, object] | None = None
        self.answer = ""
        self._since_ns = time.time_ns()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="approver", daemon=True)

    def __enter__(self) -> Approver:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_S):
            hold = self._waiting()
            if hold is not None:
                self._ended.wait(LOOK_S)
                self.seen = hold
                decided = self._run("approvals", "approve", str(hold["id"]), "--reason", "ticket 1234")
                self.answer = (decided.stdout or decided.stderr).strip()
                return

    def _waiting(self) -> dict[str, object] | None:
        listed = self._run("approvals", "list", "--json")
        if listed.returncode != 0 or not listed.stdout:
            return None
        holds: list[dict[str, object]] = json.loads(listed.stdout)["holds"]
        ours = [
            hold for hold in holds if hold["rule"] == RULE and int(str(hold["opened_ns"])) > self._since_ns
        ]
        return ours[0] if ours else None

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.sidecar, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
