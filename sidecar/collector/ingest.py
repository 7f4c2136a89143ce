"""`POST /v1/batches`: takes a signed batch, answers with a signed receipt (200) or a signed refusal (409)."""

from __future__ import annotations

import hmac
import logging
import time
from typing import Final

import orjson
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from sidecar.audit.batch import MAX_BATCH_BYTES, Batch
from sidecar.collector.store import Accepted, Refusal, Store, Unavailable
from sidecar.errors import AuditError
from sidecar.model.secret import Secret

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 2 * MAX_BATCH_BYTES


class Ingest:
    """`enrolment`: the token that hosts have to show; None: none is asked for (loopback)."""

    def __init__(self, store: Store, enrolment: Secret | None) -> None:
        self._store = store
        self._enrolment = enrolment

    def _enrolled(self, request: Request) -> bool:
        if self._enrolment is None:
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(
            given.strip().encode(), self._enrolment.reveal().strip().encode()
        )

    async def batches(self, request: Request) -> Response:
        if not self._enrolled(request):
            return PlainTextResponse("the enrolment token is not accepted\n", 401)
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    return PlainTextResponse(f"a batch has at most {MAX_BODY_BYTES} bytes\n", 413)
        except ClientDisconnect:
            return PlainTextResponse("the batch ended early\n", 400)
        try:
            accepted = await run_in_threadpool(self._take, body)
        except Refusal as refused:
            return json_response(self._store.refusal(refused, time.time_ns()), 409)
        except Unavailable as error:
            log.error("%s", error)
            return PlainTextResponse(error.message + "\n", 503)
        except AuditError as error:
            return PlainTextResponse(error.message + "\n", 400)
        return json_response(self._store.receipt(accepted, time.time_ns()))

    def _take(self, body: bytearray) -> Accepted:
        return self._store.ingest(Batch.decode(bytes(body)), time.time_ns())


def json_response(value: object, status: int = 200) -> Response:
    """Bytes become `{"hex": …}`: what is not text must not look like it."""
    return Response(
        orjson.dumps(value, default=_hex, option=orjson.OPT_NON_STR_KEYS),
        status,
        media_type="application/json",
    )


def _hex(value: object) -> object:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    raise TypeError(type(value).__name__)
