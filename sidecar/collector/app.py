"""The collector's ASGI application: ingest, API, pages. Loopback by default; every page under a strict content security policy."""

from __future__ import annotations

import hmac
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import orjson
from jinja2 import Environment, PackageLoader, select_autoescape
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from sidecar.audit.batch import MAX_BATCH_BYTES, Batch
from sidecar.collector.approvals import ApprovalsGateway
from sidecar.collector.store import Store
from sidecar.collector.views import clock, transcript
from sidecar.errors import AuditError, SidecarError
from sidecar.model.secret import Secret

TOKEN_FILE: Final = "page.token"
COOKIE: Final = "sidecar_page"
MAX_FORM_BYTES: Final = 8192
SESSION_S: Final = 12 * 3600

HEADERS: Final = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}


def page_token(directory: Path) -> str:
    """The random word that the page asks for before it decides anything: in a file that only its owner reads."""
    path = directory / TOKEN_FILE
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text().strip()
    token = secrets.token_urlsafe(24)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
    return token


class _Guard(BaseHTTPMiddleware):
    """Headers on every answer; a Host that is not ours is refused (DNS rebinding)."""

    def __init__(self, app: Any, hosts: frozenset[str]) -> None:
        super().__init__(app)
        self._hosts = hosts

    async def dispatch(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        host = (request.headers.get("host") or "").rpartition(":")[0] or request.headers.get("host", "")
        if self._hosts and host.strip("[]") not in self._hosts:
            return PlainTextResponse("this name is not served here\n", 421)
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers[name] = value
        return response


class Collector:
    """Handlers over one store."""

    def __init__(
        self, store: Store, approvals: ApprovalsGateway | None, token: str, enrolment: Secret | None
    ) -> None:
        self.store = store
        self.approvals = approvals
        self._token = token
        self._enrolment = enrolment
        self._key = secrets.token_bytes(32)
        self._templates = Environment(
            loader=PackageLoader("sidecar.collector", "templates"), autoescape=select_autoescape(default=True)
        )
        self._templates.filters["clock"] = clock

    def _page(self, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(
            self._templates.get_template(name).render(approvals=self.approvals is not None, **values), status
        )

    # -- ingest and API

    async def ingest(self, request: Request) -> Response:
        if self._enrolment is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._enrolment.reveal().encode()):
                return PlainTextResponse("the enrolment token is not accepted\n", 401)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > 2 * MAX_BATCH_BYTES:
                return PlainTextResponse("the batch is too large\n", 413)
        try:
            batch = Batch.decode(bytes(body))
            accepted = await run_in_threadpool(self.store.ingest, batch, time.time_ns())
        except AuditError as error:
            return PlainTextResponse(error.message + "\n", 409)
        return _json(self.store.receipt(accepted, time.time_ns()))

    async def api_flows(self, request: Request) -> Response:
        limit = _number(request.query_params.get("limit"), 100)
        before = _number(request.query_params.get("before"), 0) or None
        return _json(
            {
                "flows": await run_in_threadpool(
                    self.store.flows, request.query_params.get("q", "")[:200], limit, before
                )
            }
        )

    async def api_flow(self, request: Request) -> Response:
        records = await run_in_threadpool(self.store.flow, request.path_params["flow"])
        return _json({"records": records}) if records else PlainTextResponse("no such flow\n", 404)

    async def api_record(self, request: Request) -> Response:
        record = await run_in_threadpool(self.store.record, request.path_params["record"])
        return _json(record) if record else PlainTextResponse("no such record\n", 404)

    # -- pages

    async def index(self, request: Request) -> Response:
        text = request.query_params.get("q", "")[:200]
        before = _number(request.query_params.get("before"), 0) or None
        flows = await run_in_threadpool(self.store.flows, text, 100, before)
        return self._page(
            "flows.html", flows=flows, q=text, more=flows[-1]["ts_ns"] if len(flows) == 100 else None
        )

    async def flow(self, request: Request) -> Response:
        records = await run_in_threadpool(self.store.flow, request.path_params["flow"])
        if not records:
            return self._page(
                "message.html", 404, title="No such flow", text="It may not have been shipped yet."
            )
        return self._page("flow.html", **transcript(records))

    def _session(self, request: Request) -> str | None:
        value = request.cookies.get(COOKIE, "")
        stamp, _, mac = value.partition(".")
        if not stamp.isdigit() or not hmac.compare_digest(self._mac(stamp), mac):
            return None
        return stamp if time.time() - int(stamp) < SESSION_S else None

    def _mac(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), "sha256").hexdigest()

    async def holds(self, request: Request) -> Response:
        assert self.approvals is not None
        session = self._session(request)
        if session is None:
            return self._page("login.html")
        try:
            views = await run_in_threadpool(self.approvals.list)
        except (SidecarError, OSError) as error:
            return self._page("message.html", 503, title="No agent answers", text=str(error))
        return self._page("approvals.html", holds=views, csrf=self._mac("csrf" + session))

    async def login(self, request: Request) -> Response:
        if not _same_origin(request):
            return PlainTextResponse("the request does not come from this page\n", 403)
        form = await _form(request)
        if not hmac.compare_digest(form.get("token", "").strip().encode(), self._token.encode()):
            return self._page("login.html", 403, wrong=True)
        stamp = str(int(time.time()))
        response = RedirectResponse("/approvals", 303)
        response.set_cookie(
            COOKIE,
            f"{stamp}.{self._mac(stamp)}",
            httponly=True,
            samesite="strict",
            max_age=SESSION_S,
            path="/",
        )
        return response

    async def decide(self, request: Request) -> Response:
        assert self.approvals is not None
        session = self._session(request)
        form = await _form(request)
        if (
            session is None
            or not _same_origin(request)
            or not hmac.compare_digest(form.get("csrf", ""), self._mac("csrf" + session))
        ):
            return PlainTextResponse("the request does not come from this page's form\n", 403)
        try:
            await run_in_threadpool(
                self.approvals.decide,
                request.path_params["hold"],
                form.get("decision") == "approve",
                "web page",
                form.get("reason", "")[:500],
            )
        except (SidecarError, OSError) as error:
            return self._page("message.html", 409, title="Not decided", text=str(error))
        return RedirectResponse("/approvals", 303)


def _same_origin(request: Request) -> bool:
    """A browser names the origin of every POST; without one it is no browser's form."""
    return request.headers.get("origin") == f"{request.url.scheme}://{request.headers.get('host')}"


async def _form(request: Request) -> dict[str, str]:
    from urllib.parse import parse_qsl

    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            return {}
    return dict(parse_qsl(body.decode("utf-8", "replace")))


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isdigit() and len(text) < 20 else default


def _json(value: Any) -> Response:
    return Response(
        orjson.dumps(value, default=_hex, option=orjson.OPT_NON_STR_KEYS), media_type="application/json"
    )


def _hex(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    raise TypeError(type(value).__name__)


def create_app(
    store: Store,
    approvals: ApprovalsGateway | None,
    *,
    token: str,
    enrolment: Secret | None = None,
    hosts: frozenset[str] = frozenset(),
) -> Starlette:
    """`hosts`: the names under which it may be called; empty: any."""
    collector = Collector(store, approvals, token, enrolment)
    routes: list[Any] = [
        Route("/v1/batches", collector.ingest, methods=["POST"]),
        Route("/v1/flows", collector.api_flows),
        Route("/v1/flows/{flow}", collector.api_flow),
        Route("/v1/records/{record}", collector.api_record),
        Route("/", collector.index),
        Route("/flows/{flow}", collector.flow),
        Mount("/static", StaticFiles(packages=[("sidecar.collector", "static")])),
    ]
    if approvals is not None:
        routes += [
            Route("/approvals", collector.holds),
            Route("/approvals/login", collector.login, methods=["POST"]),
            Route("/approvals/{hold}", collector.decide, methods=["POST"]),
        ]
    return Starlette(routes=routes, middleware=[Middleware(_Guard, hosts=hosts)])
