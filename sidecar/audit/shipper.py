"""Ships signed batches to the collector and keeps its receipts. A thread of its own: the supervisor never waits for it."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from sidecar.audit import hostkey
from sidecar.audit.batch import Header
from sidecar.audit.segment import stream_names
from sidecar.audit.spool import Spool
from sidecar.errors import AuditError
from sidecar.model.secret import Secret

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 10.0
IDLE_S: Final = 0.25
BACKOFF_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
MAX_RECEIPT_BYTES: Final = 65_536


@dataclass(frozen=True, slots=True)
class ShippingState:
    url: str
    ok: bool
    error: str | None
    batches: int
    last_receipt_ns: int


class Shipper:
    """One upstream. Idempotent: what has no receipt is sent again, and the collector knows it."""

    def __init__(self, spool: Spool, url: str, token: Secret | None) -> None:
        self._spool = spool
        self._directory = spool.directory
        self._url = url.rstrip("/")
        self._token = token
        self._last: dict[str, int] = {}
        self._ended: set[str] = set()
        self._stop = threading.Event()
        self._drain = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)
        self._state = ShippingState(self._url, True, None, 0, 0)

    def start(self) -> None:
        self._thread.start()

    def state(self) -> ShippingState:
        return self._state

    async def stop(self, flush_s: float) -> None:
        """Ship what is left for at most `flush_s`, then end."""
        self._drain.set()
        await asyncio.to_thread(self._thread.join, flush_s)
        self._stop.set()
        await asyncio.to_thread(self._thread.join, TIMEOUT_S + 1)

    def _run(self) -> None:
        failures = 0
        headers = {"content-type": "application/msgpack"}
        if self._token is not None:
            headers["authorization"] = f"Bearer {self._token.reveal()}"
        with httpx.Client(timeout=TIMEOUT_S, headers=headers, trust_env=False) as client:
            while not self._stop.is_set():
                try:
                    shipped = self._ship_once(client)
                except (httpx.HTTPError, AuditError, OSError, ValueError) as error:
                    message = f"{type(error).__name__}: {error}"[:300]
                    if failures == 0:
                        log.warning("records are not shipped to %s for now: %s", self._url, message)
                    self._state = ShippingState(
                        self._url, False, message, self._state.batches, self._state.last_receipt_ns
                    )
                    pause = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)] * random.uniform(0.7, 1.3)
                    failures += 1
                    if self._drain.is_set() and failures > 3:
                        return
                    self._stop.wait(min(pause, 0.5) if self._drain.is_set() else pause)
                    continue
                failures = 0
                if not shipped:
                    if self._drain.is_set():
                        return
                    self._stop.wait(IDLE_S)

    def _ship_once(self, client: httpx.Client) -> bool:
        """One batch of each stream. True where anything was sent."""
        sent = False
        for stream in stream_names(self._directory):
            if stream in self._ended:
                continue
            if stream not in self._last:
                self._last[stream] = self._receipted(stream)
            found = self._spool.batch(stream, self._last[stream])
            if found is None:
                continue
            batch, last = found
            response = client.post(f"{self._url}/v1/batches", content=batch.encode())
            if response.status_code != 200:
                raise AuditError(f"the collector answers {response.status_code}: {response.text[:200]}")
            if len(response.content) > MAX_RECEIPT_BYTES:
                raise AuditError("the collector's receipt is too large")
            self._keep(stream, response.json(), Header.decode(batch.header))
            self._last[stream] = last
            self._state = ShippingState(self._url, True, None, self._state.batches + 1, time.time_ns())
            sent = True
        return sent

    def _receipted(self, stream: str) -> int:
        path = self._directory / f"{stream}.receipts"
        if not path.is_file():
            return -1
        return max(
            (int(json.loads(line)["receipt"]["last"]) for line in path.read_text().splitlines()), default=-1
        )

    def _keep(self, stream: str, answer: dict[str, Any], header: Header) -> None:
        """Check and store a receipt. Raises AuditError where it is not for what was sent, or of another collector."""
        key_path = self._directory / "collector.pub"
        public = bytes.fromhex(answer["key"])
        if not key_path.is_file():
            key_path.write_text(public.hex() + "\n")
        elif hostkey.load_public(key_path) != public:
            raise AuditError(
                "the collector's key is not the one that this host knows",
                hint=f"was it reinstalled? remove {key_path} to trust it",
            )
        receipt = answer["receipt"]
        signed = _canonical(receipt)
        if not hostkey.verify(public, bytes.fromhex(answer["sig"]), signed):
            raise AuditError("the collector's receipt is not signed by it")
        if (
            receipt["stream"] != stream
            or receipt["last"] != header.last
            or receipt["head"] != header.head.hex()
        ):
            raise AuditError("the collector's receipt is for something else")
        line = _canonical({"receipt": receipt, "sig": answer["sig"]}) + b"\n"
        with Path(self._directory / f"{stream}.receipts").open("ab") as file:
            file.write(line)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
