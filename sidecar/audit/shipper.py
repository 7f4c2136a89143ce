"""Ships signed batches to the collector and keeps its receipts. A thread of its own: the supervisor never waits for it.

Idempotent: what has no receipt is sent again, and the collector knows it. A stream that the collector refuses is kept and tried
again from time to time; it stops no other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any, Final

import httpx

from sidecar.audit import hostkey
from sidecar.audit.batch import Batch, Header
from sidecar.audit.outbox import Outbox
from sidecar.audit.receipt import RECEIPT, REFUSAL, Said, line_of, read_line
from sidecar.audit.retention import COLLECTOR_KEY, kept_receipt
from sidecar.audit.segment import is_live, receipt_path, refusal_path, stream_names
from sidecar.audit.spool import Spool
from sidecar.errors import AuditError
from sidecar.model.secret import Secret

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 10.0
IDLE_S: Final = 0.25
SURVEY_S: Final = 2.0
"""How often the directory is looked through for streams that other instances left."""
BACKOFF_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
JITTER: Final = (0.7, 1.3)
REFUSED_S: Final = 60.0
"""How long a refused stream rests."""
MAX_ANSWER_BYTES: Final = 65_536
ANSWER_S: Final = 20.0
"""For all of an answer; TIMEOUT_S is for each part of it."""
STOP_S: Final = 1.0
"""What is on its way when the flush is over is left; it has no receipt and is sent again."""
FLUSH_ATTEMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class ShippingState:
    url: str
    ok: bool
    error: str | None
    batches: int
    last_receipt_ns: int


@dataclass(slots=True)
class _Shipping:
    outbox: Outbox
    failures: int = 0
    rest_until: float = 0.0
    problem: str = ""


class _Refused(AuditError):
    """The collector, or our own files, will not have this stream; others go on."""


@dataclass(slots=True)
class _Streams:
    open: dict[str, _Shipping] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    """Streams whose end has a receipt, or that are gone."""


class Shipper:
    """One upstream."""

    def __init__(
        self,
        spool: Spool,
        url: str,
        token: Secret | None,
        *,
        client: httpx.Client | None = None,
        backoff_s: tuple[float, ...] = BACKOFF_S,
    ) -> None:
        """`client` is for a transport of the caller's own (TLS with a private authority); it is closed in the end."""
        self._spool = spool
        self._directory = spool.directory
        self._url = url.rstrip("/")
        self._token = token
        self._backoff_s = backoff_s
        self._client = client or httpx.Client(timeout=TIMEOUT_S, trust_env=False)
        self._streams = _Streams()
        self._surveyed = 0.0
        self._stop = threading.Event()
        self._drain = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)
        self._state = ShippingState(self._url, True, None, 0, 0)

    def start(self) -> None:
        self._thread.start()

    def state(self) -> ShippingState:
        """May be called from any thread."""
        return self._state

    async def stop(self, flush_s: float) -> None:
        """Ship what is left for at most `flush_s`, then end."""
        self._drain.set()
        await asyncio.to_thread(self._thread.join, flush_s)
        self._stop.set()
        await asyncio.to_thread(self._thread.join, STOP_S)

    # -- the thread

    def _run(self) -> None:
        failures = 0
        with self._client:
            while not self._stop.is_set():
                try:
                    shipped = self._round()
                except (httpx.HTTPError, AuditError, OSError) as error:
                    self._failed(error, first=failures == 0)
                    pause = self._backoff_s[min(failures, len(self._backoff_s) - 1)] * random.uniform(*JITTER)
                    failures += 1
                    if self._drain.is_set() and failures > FLUSH_ATTEMPTS:
                        return
                    self._pause(min(pause, self._backoff_s[0]) if self._drain.is_set() else pause)
                    continue
                if failures:
                    log.info("records are shipped to %s again", self._url)
                failures = 0
                if not shipped:
                    if self._drain.is_set():
                        return
                    self._pause(IDLE_S)

    def _pause(self, seconds: float) -> None:
        """Ended early by `stop`; a long one also by the beginning of the flush."""
        until = time.monotonic() + seconds
        draining = self._drain.is_set()
        while (left := until - time.monotonic()) > 0 and not self._stop.wait(min(left, IDLE_S)):
            if self._drain.is_set() and not draining:
                return

    def _failed(self, error: Exception, *, first: bool) -> None:
        message = (
            f"{type(error).__name__}: {error}"[:300] if not isinstance(error, AuditError) else error.message
        )
        if first:
            log.warning("records are not shipped to %s for now: %s", self._url, message)
        self._state = replace(self._state, ok=False, error=message)

    def _round(self) -> bool:
        """One batch of each stream that has one. True where anything was sent. Raises what is wrong with the collector as
        a whole; what is wrong with one stream rests that stream."""
        sent = False
        self._survey()
        for name, shipping in list(self._streams.open.items()):
            if self._stop.is_set():
                return False
            if shipping.rest_until > time.monotonic():
                continue
            try:
                sent |= self._ship(name, shipping)
            except _Refused as error:
                self._rest(name, shipping, error)
        problems = [shipping.problem for shipping in self._streams.open.values() if shipping.problem]
        self._state = replace(self._state, ok=not problems, error=problems[0] if problems else None)
        return sent

    def _rest(self, name: str, shipping: _Shipping, error: AuditError) -> None:
        if shipping.problem != error.message:
            log.error("stream %s is not shipped: %s", name, error.message)
        shipping.problem = error.message
        shipping.rest_until = time.monotonic() + REFUSED_S
        self._streams.open[name] = _Shipping(
            self._outbox(name) or shipping.outbox, rest_until=shipping.rest_until, problem=shipping.problem
        )

    def _survey(self) -> None:
        """Take up streams: our own at once, those that other instances left from time to time."""
        now = time.monotonic()
        if self._surveyed and now < self._surveyed + SURVEY_S and not self._drain.is_set():
            names = self._spool.own_streams()
        else:
            self._surveyed = now
            names = stream_names(self._directory)
            self._streams.done.intersection_update(names)
        for name in names:
            if name in self._streams.open or name in self._streams.done:
                continue
            if not self._spool.owns(name) and is_live(self._directory, name):
                continue
            outbox = self._outbox(name)
            if outbox is None:
                self._streams.done.add(name)
            else:
                self._streams.open[name] = _Shipping(outbox)

    def _outbox(self, name: str) -> Outbox | None:
        """None where the collector holds all of the stream and its end."""
        try:
            kept = kept_receipt(self._directory, name)
        except AuditError as error:
            log.error(
                "the receipt of stream %s does not hold, the stream is shipped from its start: %s",
                name,
                error,
            )
            kept = None
        if kept is not None and kept[1].ended:
            return None
        after = kept[1].last if kept is not None else -1
        return Outbox(self._directory, name, self._spool.host_key, after_seq=after)

    def _ship(self, name: str, shipping: _Shipping) -> bool:
        try:
            found = shipping.outbox.next()
        except (AuditError, OSError) as error:
            raise _Refused(f"its files cannot be read: {error}") from error
        if found is None:
            return False
        batch, header = found
        self._keep(name, self._post(name, batch), header)
        shipping.outbox.taken(header)
        shipping.problem = ""
        refusal_path(self._directory, name).unlink(missing_ok=True)
        self._state = replace(self._state, batches=self._state.batches + 1, last_receipt_ns=time.time_ns())
        if shipping.outbox.ended:
            del self._streams.open[name]
            self._streams.done.add(name)
        return True

    def _post(self, name: str, batch: Batch) -> dict[str, Any]:
        """The collector's answer to a batch it took. Raises _Refused, AuditError or httpx.HTTPError."""
        headers = {"content-type": "application/msgpack", "accept-encoding": "identity"}
        if self._token is not None:
            headers["authorization"] = f"Bearer {self._token.reveal()}"
        url = f"{self._url}/v1/batches"
        body = bytearray()
        until = time.monotonic() + ANSWER_S
        with self._client.stream("POST", url, content=batch.encode(), headers=headers) as response:
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    raise AuditError("the collector's answer is too large")
                if time.monotonic() > until:
                    raise AuditError("the collector's answer takes too long")
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if response.status_code == 409 and isinstance(answer, dict):
            said = self._read(answer, REFUSAL)
            if said.stream == name:
                hostkey.write_whole(refusal_path(self._directory, name), line_of(answer))
            raise _Refused(f"the collector refuses it: {said.reason}")
        if response.status_code in (400, 413):
            raise _Refused(
                "the collector does not understand it: "
                + bytes(body[:200]).decode("utf-8", "replace").strip()
            )
        if response.status_code == 401:
            raise AuditError("the collector does not accept the enrolment token (upstream.token)")
        if response.status_code != 200 or not isinstance(answer, dict):
            text = bytes(body[:200]).decode("utf-8", "replace").strip()
            raise AuditError(f"the collector answers {response.status_code}: {text}")
        return answer

    def _read(self, answer: dict[str, Any], kind: str) -> Said:
        """Verify an answer under the collector's key, which is pinned with the first one. Raises AuditError."""
        path = self._directory / COLLECTOR_KEY
        try:
            public = bytes.fromhex(answer["key"])
        except (KeyError, TypeError, ValueError) as error:
            raise AuditError("the collector's answer names no key") from error
        said = read_line(line_of(answer), public, kind)
        if not path.exists():
            hostkey.write_whole(path, public.hex() + "\n")
        elif hostkey.load_public(path) != public:
            raise AuditError(
                "the collector's key is not the one that this host knows",
                hint=f"was it reinstalled? remove {path} to trust it",
            )
        return said

    def _keep(self, name: str, answer: dict[str, Any], header: Header) -> None:
        """Check and store a receipt. Raises AuditError where it is not for what was sent."""
        said = self._read(answer, RECEIPT)
        if (said.stream, said.last, said.head, said.ended) != (
            name, header.last, header.head.hex(), bool(header.end),
        ):  # fmt: skip
            raise AuditError("the collector's receipt is for something else")
        if self._is_behind(name, said):
            return
        hostkey.write_whole(receipt_path(self._directory, name), line_of(answer))

    def _is_behind(self, name: str, said: Said) -> bool:
        """Whether another instance, which ships the same dead one's stream, keeps a newer receipt."""
        try:
            kept = kept_receipt(self._directory, name)
        except AuditError:
            return False
        return kept is not None and (kept[1].last, kept[1].ended) > (said.last, said.ended)
