"""The collector's pages and its read API. Everything shown comes from hosts and jobs: it is escaped, and no page runs a script."""

from __future__ import annotations

from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from sidecar.collector import views
from sidecar.collector.approvals import ApprovalsGateway
from sidecar.collector.guard import Sessions, form_of, same_origin
from sidecar.collector.ingest import json_response
from sidecar.collector.peer_user import is_ours
from sidecar.collector.store import MAX_FLOW_PAGE, MAX_PAGE, Store
from sidecar.errors import SidecarError

PAGE: Final = 100
MAX_QUERY: Final = 200
MAX_REASON: Final = 500
DECIDER: Final = "web page"


class Pages:
    """Handlers over one store. Reading takes a session or the page's token; with `open_to_own_user`, being root or the user that this
    process runs as is enough, over loopback."""

    def __init__(
        self,
        store: Store,
        approvals: ApprovalsGateway | None,
        sessions: Sessions,
        *,
        open_to_own_user: bool,
        token_file: str,
    ) -> None:
        self._store = store
        self._approvals = approvals
        self._sessions = sessions
        self._open_to_own_user = open_to_own_user
        self._token_file = token_file
        self._templates = Environment(
            loader=PackageLoader("sidecar.collector", "templates"),
            autoescape=select_autoescape(default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {"clock": views.clock, "day": views.day, "duration": views.duration}

    def _page(self, name: str, code: int = 200, /, **values: Any) -> HTMLResponse:
        shown = self._templates.get_template(name).render(approvals=self._approvals is not None, **values)
        return HTMLResponse(shown, code)

    async def _may_read(self, request: Request) -> bool:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._sessions.of(request) is not None or self._sessions.token_is(given):
            return True
        ends = request.scope.get("client"), request.scope.get("server")
        return self._open_to_own_user and await run_in_threadpool(is_ours, *ends)

    # -- API

    async def api_flows(self, request: Request) -> Response:
        if not await self._may_read(request):
            return PlainTextResponse("the page's token is needed\n", 401)
        query = request.query_params
        flows = await run_in_threadpool(
            self._store.flows,
            query.get("q", "")[:MAX_QUERY],
            _number(query.get("limit"), PAGE, MAX_PAGE),
            _number(query.get("before"), 0) or None,
        )
        return json_response({"flows": flows})

    async def api_flow(self, request: Request) -> Response:
        if not await self._may_read(request):
            return PlainTextResponse("the page's token is needed\n", 401)
        records = await run_in_threadpool(
            self._store.flow,
            request.path_params["flow"],
            _number(request.query_params.get("limit"), MAX_FLOW_PAGE, MAX_FLOW_PAGE),
            _number(request.query_params.get("offset"), 0, 1 << 40),
        )
        return (
            json_response({"records": records}) if records else json_response({"error": "no such flow"}, 404)
        )

    async def api_record(self, request: Request) -> Response:
        if not await self._may_read(request):
            return PlainTextResponse("the page's token is needed\n", 401)
        record = await run_in_threadpool(self._store.record, request.path_params["record"])
        return json_response(record) if record else json_response({"error": "no such record"}, 404)

    # -- pages

    async def index(self, request: Request) -> Response:
        if not await self._may_read(request):
            return self._login("/")
        text = request.query_params.get("q", "")[:MAX_QUERY]
        before = _number(request.query_params.get("before"), 0) or None
        flows = await run_in_threadpool(self._store.flows, text, PAGE, before)
        more = flows[-1]["ts_ns"] if len(flows) == PAGE else None
        return self._page("flows.html", flows=flows, q=text, more=more, later=before is not None)

    async def flow(self, request: Request) -> Response:
        if not await self._may_read(request):
            return self._login(request.url.path)
        flow = request.path_params["flow"]
        offset = _number(request.query_params.get("offset"), 0, 1 << 40)
        records = await run_in_threadpool(self._store.flow, flow, MAX_FLOW_PAGE, offset)
        if not records:
            return self._page(
                "message.html",
                404,
                title="No such flow",
                text="It may not have been shipped yet.",
                status="absent",
            )
        opened = await run_in_threadpool(self._store.opening, flow)
        return self._page(
            "flow.html",
            f=views.transcript(flow, opened, records),
            offset=offset,
            following=offset + MAX_FLOW_PAGE if len(records) == MAX_FLOW_PAGE else None,
        )

    # -- approvals

    def _login(self, after: str, *, wrong: bool = False) -> HTMLResponse:
        return self._page(
            "login.html", 403 if wrong else 200, wrong=wrong, after=after, token_file=self._token_file
        )

    async def holds(self, request: Request) -> Response:
        assert self._approvals is not None
        session = self._sessions.of(request)
        if session is None:
            return self._login("/approvals")
        try:
            found = await run_in_threadpool(self._approvals.list)
        except (SidecarError, OSError) as error:
            return self._page(
                "message.html", 503, title="No agent answers", text=_words(error), status="unavailable"
            )
        waiting = [views.hold(item) for item in found if item.state == "pending"]
        decided = [views.hold(item) for item in found if item.state != "pending"]
        return self._page(
            "approvals.html", waiting=waiting, decided=decided, form_token=self._sessions.form_token(session)
        )

    async def login(self, request: Request) -> Response:
        if not same_origin(request):
            return PlainTextResponse("the request does not come from this page\n", 403)
        form = await form_of(request)
        after = form.get("after", "/")
        if not after.startswith("/") or after.startswith(("//", "/\\")):
            after = "/"
        if not self._sessions.token_is(form.get("token", "")):
            return self._login(after, wrong=True)
        response = RedirectResponse(after, 303)
        self._sessions.begin(response, secure=request.url.scheme == "https")
        return response

    async def decide(self, request: Request) -> Response:
        assert self._approvals is not None
        session = self._sessions.of(request)
        form = await form_of(request)
        if not same_origin(request) or not self._sessions.form_is_ours(session, form.get("csrf", "")):
            return PlainTextResponse("the request does not come from this page's form\n", 403)
        decision = form.get("decision")
        if decision not in ("approve", "reject"):
            return PlainTextResponse("approve or reject\n", 400)
        try:
            await run_in_threadpool(
                self._approvals.decide,
                request.path_params["hold"],
                decision == "approve",
                DECIDER,
                form.get("reason", "")[:MAX_REASON],
            )
        except (SidecarError, OSError) as error:
            return self._page("message.html", 409, title="Not decided", text=_words(error), status="refused")
        return RedirectResponse("/approvals", 303)


def _words(error: Exception) -> str:
    return error.message if isinstance(error, SidecarError) else str(error)


def _number(text: str | None, default: int, bound: int = (1 << 63) - 1) -> int:
    return min(int(text), bound) if text and text.isascii() and text.isdigit() and len(text) < 20 else default
