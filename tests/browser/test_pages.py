"""The collector's pages in a real browser, against real records and a real control socket with statements that are held."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import uvicorn

from sidecar.approvals.grants import GrantState
from sidecar.audit.outbox import Outbox
from sidecar.cli.collector import AgentApprovals
from sidecar.collector.app import create_app
from sidecar.collector.guard import page_token
from sidecar.collector.store import Store
from sidecar.control.client import Approvals
from sidecar.model.ids import IdSource
from tests.support.chromium import Chromium, Page
from tests.support.control_agent import SmallAgent, run_directory, serving
from tests.support.spools import flow_of, make_spool, writer_of

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(os.geteuid() != 0, reason="decides as root, as the agent's own page does"),
]

HOSTILE = (
    "SELECT '<script>alert(1)</script>', \"\"\"><img src=x onerror=alert(2)>\", '</pre><svg onload=alert(3)>',"
    " '{{ 7*7 }}{% raw %}', 'javascript:alert(4)', '\x00\x1b[2J\u202e', '&lt;b&gt;' -- <iframe srcdoc='<script>alert(5)</script>'>"
)


class Gateway(AgentApprovals):
    """As the command wires it, over the sockets in a directory of the test's."""

    def __init__(self, directory: Path) -> None:
        self._approvals = Approvals(directory)


@dataclass
class World:
    url: str
    token: str
    agent: SmallAgent
    flows: list[str]
    pages: list[Page] = field(default_factory=list)

    def park(self, statement: str = "DELETE FROM customers WHERE id = 42") -> str:
        hold = IdSource().new(time.time_ns())
        self.agent.park(hold, statement)
        return hold

    def state(self, hold: str) -> GrantState:
        grant = self.agent.grants.get(hold)
        assert grant is not None
        return grant.state


def fill(store: Store, place: Path) -> list[str]:
    """Real records, through the chain and the signatures."""
    spool = make_spool(place)
    writer = writer_of(spool.open_stream("w"))
    flows = []
    for number, (text, value) in enumerate(
        [
            ("SELECT name, ssn FROM customers WHERE region = 'north' ORDER BY name LIMIT 20", "Ann"),
            (HOSTILE, "<script>alert(6)</script>"),
            ("SELECT " + ", ".join(f"column_number_{n}" for n in range(60)), "x" * 300),
        ]
    ):
        records = flow_of(number, text, value=value)
        if number == 1:
            records[0].origin["cmdline"] = ["psql", "<script>alert(7)</script>"]
            records[0].principal["subject"] = "<script>alert(8)</script>"
        writer.append_many(records)
        flows.append(records[0].flow)
    spool.commit()
    outbox = Outbox(place, writer.stream, spool.host_key, after_seq=-1)
    while (found := outbox.next()) is not None:
        store.ingest(found[0], time.time_ns())
        outbox.taken(found[1])
    spool.close()
    return flows


@contextlib.contextmanager
def served(app: object) -> Iterator[int]:
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", http="h11"))  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    place = tmp_path_factory.mktemp("collector")
    store = Store(place / "data")
    flows = fill(store, place / "audit")
    token = page_token(place / "data")
    assert (place / "data" / "page.token").stat().st_mode & 0o777 == 0o600
    agent = SmallAgent()
    with run_directory() as directory, serving(agent, directory, relay_parent=os.getpid()):
        app = create_app(store, Gateway(directory), token=token, hosts=frozenset({"127.0.0.1", "localhost"}))
        with served(app) as port:
            yield World(f"http://127.0.0.1:{port}", token, agent, flows)
    store.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    made = Chromium()
    yield made
    made.close()


@pytest.fixture
def page(browser: Chromium) -> Page:
    made = browser.page()
    made.size(1280, 900)
    return made


def log_in(page: Page, world: World) -> None:
    page.go(world.url + "/approvals")
    assert "The page's token is needed" in page.text
    page.click("input[type=password]")
    page.type(world.token)
    with page.loading():
        page.press_enter()
    assert page.url == world.url + "/approvals"


def test_flows_and_a_transcript(page: Page, world: World) -> None:
    page.go(world.url)
    assert "repo:acme/reports" in page.text
    assert "orders.internal:5432" in page.text
    with page.loading():
        page.click("tbody tr:last-child a")
    assert page.url.endswith(world.flows[0])
    for part in ("SELECT name, ssn FROM customers", "Ann", "NULL", "psql", "nightly.sh", "client_closed"):
        assert part in page.text
    page.go(world.url)
    page.click("input[name=q]")
    page.type("nobody at all")
    with page.loading():
        page.press_enter()
    assert "Nothing matches “nobody at all”" in page.text


def test_approve_is_clicked(page: Page, world: World) -> None:
    hold = world.park()
    log_in(page, world)
    assert "DELETE FROM customers WHERE id = 42" in page.text
    assert "repo:acme/reports" in page.text
    page.click(f"article[id='{hold[-8:]}'] input[name=reason]")
    page.type("agreed with Ann")
    assert world.state(hold) is GrantState.PENDING
    with page.loading():
        page.click(f"article[id='{hold[-8:]}'] button.approve")
    assert world.state(hold) is GrantState.APPROVED
    grant = world.agent.grants.get(hold)
    assert grant is not None
    assert grant.reason == "agreed with Ann"
    assert "agreed with Ann" in page.text
    assert page.evaluate(f"document.querySelector(\"article[id='{hold[-8:]}'] button\")") is None


def test_reject_is_clicked_on_a_narrow_screen(page: Page, world: World) -> None:
    page.size(360, 640)
    hold, other = world.park(), world.park("TRUNCATE other")
    log_in(page, world)
    with page.loading():
        page.click(f"article[id='{hold[-8:]}'] button.reject")
    assert world.state(hold) is GrantState.REJECTED
    assert world.state(other) is GrantState.PENDING
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_enter_in_the_reason_decides_nothing(page: Page, world: World) -> None:
    """A form's first button would be pressed: approval has to be meant."""
    hold = world.park()
    log_in(page, world)
    page.click(f"article[id='{hold[-8:]}'] input[name=reason]")
    page.type("hm")
    page.press_enter()
    time.sleep(0.3)
    assert world.state(hold) is GrantState.PENDING


def test_a_hold_that_has_gone_says_so(page: Page, world: World) -> None:
    hold = world.park()
    log_in(page, world)
    world.agent.grants.withdraw(hold, time.time_ns())
    with page.loading():
        page.click(f"article[id='{hold[-8:]}'] button.approve")
    assert "Not decided" in page.text
    assert world.state(hold) is GrantState.WITHDRAWN


def test_a_wrong_token(page: Page, world: World) -> None:
    page.go(world.url + "/approvals")
    page.click("input[type=password]")
    page.type("guessed")
    with page.loading():
        page.press_enter()
    assert "That is not the token." in page.text
    page.go(world.url + "/approvals")
    assert "The page's token is needed" in page.text


def test_no_record_runs_a_script(page: Page, world: World) -> None:
    hold = world.park(HOSTILE)
    log_in(page, world)
    for path in ("/", f"/flows/{world.flows[1]}", "/approvals", "/?q=" + "%3Cscript%3Ealert(9)%3C/script%3E"):
        page.go(world.url + path)
        time.sleep(0.1)
        assert page.dialogs == []
        assert page.evaluate("document.scripts.length") == 0
        assert page.evaluate("document.querySelectorAll('img, svg, iframe, object, embed').length") == 0
        assert "49{%" not in page.text
    page.go(f"{world.url}/flows/{world.flows[1]}")
    assert "<script>alert(1)</script>" in page.text  # shown, as text
    assert "{{ 7*7 }}{% raw %}" in page.text
    assert "<script>alert(8)</script>" in page.text
    # And were escaping ever to fail, the policy would still refuse.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    page.evaluate("(() => { const s = document.createElement('script'); s.textContent = 'document.title=2';"
                  " document.body.append(s) })()")  # fmt: skip
    time.sleep(0.2)
    assert page.evaluate("document.title") not in ("1", "2")
    assert all(url.startswith(world.url) for url in page.requested if not url.startswith("about:"))
    world.agent.grants.withdraw(hold, time.time_ns())


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Another site, which posts to ours."""

    body = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "evil.test"])
def test_another_origin_decides_nothing(page: Page, world: World, name: str) -> None:
    """A form of another site, or another port of this host, while the approver is logged in; with the right form token even."""
    hold = world.park()
    log_in(page, world)
    token = page.evaluate("document.querySelector('input[name=csrf]').value")
    form = (
        f"<form id=f method=post action='{world.url}/approvals/{hold}'><input name=csrf value='{token}'>"
        "<input name=decision value=approve><button id=b>win a prize</button></form>"
    )
    handler = type("Site", (Elsewhere,), {"body": form.encode()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        page.go(f"http://{name}:{server.server_address[1]}/")
        with page.loading():
            page.click("#b")
        assert "does not come from this page's form" in page.text
        assert world.state(hold) is GrantState.PENDING
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        world.agent.grants.withdraw(hold, time.time_ns())


def test_a_rebound_name_is_not_served(page: Page, world: World) -> None:
    """A name of the attacker's that resolves to 127.0.0.1: the same origin for its script, another Host for us."""
    port = world.url.rpartition(":")[2]
    page.go(f"http://rebound.example:{port}/approvals")
    assert page.text.strip() == "this name is not served here"
    page.go(f"http://localhost:{port}/")
    assert "orders.internal" in page.text


def test_without_a_browser(world: World) -> None:
    """Each condition by itself."""
    hold = world.park()
    path, form = f"{world.url}/approvals/{hold}", {"decision": "approve"}
    with httpx.Client(trust_env=False) as client:
        origin = {"origin": world.url}
        assert client.post(path, data=form).status_code == 403
        assert client.post(path, data=form, headers=origin).status_code == 403
        assert client.post(f"{world.url}/login", data={"token": world.token}).status_code == 403
        assert (
            client.post(
                f"{world.url}/login", data={"token": world.token}, headers={"origin": "http://evil.test"}
            ).status_code
            == 403
        )
        answer = client.post(
            f"{world.url}/login", data={"token": world.token, "after": "//evil.test/"}, headers=origin
        )
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        shown = client.get(f"{world.url}/approvals").text
        csrf = shown.partition('name="csrf" value="')[2].partition('"')[0]
        good = form | {"csrf": csrf}
        refused = [
            ({"decision": "approve"}, origin),
            (form | {"csrf": "0" * 64}, origin),
            (form | {"csrf": csrf[:-1] + ("0" if csrf[-1] != "0" else "1")}, origin),
            (good, {}),
            (good, {"origin": "null"}),
            (good, {"origin": "http://evil.test"}),
            (good, {"origin": world.url.replace("http:", "https:")}),
            (good, {"origin": world.url + "0"}),
        ]
        for data, headers in refused:
            assert client.post(path, data=data, headers=headers).status_code == 403, (data, headers)
        for name in ("evil.test", "127.0.0.1.evil.test", "evil.test:80", "", "[::1]"):
            rebound = client.post(path, data=good, headers={"host": name, "origin": f"http://{name}"})
            assert rebound.status_code == 421, name
        assert client.get(path).status_code == 405
        assert world.state(hold) is GrantState.PENDING
        large = client.post(path, data=good | {"reason": "x" * 10_000}, headers=origin)
        assert large.status_code == 403
        with httpx.Client(
            trust_env=False
        ) as stranger:  # a session of one's own does not go with another's form
            stranger.post(f"{world.url}/login", data={"token": world.token}, headers=origin)
            assert stranger.post(path, data=good, headers=origin).status_code == 403
        forged = httpx.post(
            path, data=good, headers=origin | {"cookie": "sidecar_page=1-2.3"}, trust_env=False
        )
        assert forged.status_code == 403
        assert client.post(path, data=good, headers=origin).status_code == 303
        assert world.state(hold) is GrantState.APPROVED
        for url in (
            world.url,
            f"{world.url}/approvals",
            f"{world.url}/static/sidecar.css",
            f"{world.url}/none",
        ):
            headers = client.get(url).headers
            assert headers["content-security-policy"].startswith("default-src 'none'"), url
            assert headers["x-frame-options"] == "DENY"
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"
            assert "server" not in headers or "uvicorn" in headers["server"]
