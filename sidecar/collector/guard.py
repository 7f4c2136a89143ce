"""Who may ask the collector what: headers on every answer, names it is served under, the page's token, sessions, form tokens.

The page's token is a random word in a file that only its owner reads. Whoever gives it gets a session, in a cookie that is signed
with a key of this process's life. A form carries a token bound to the session, and its request must name our own origin.
"""

from __future__ import annotations

import hmac
import os
import secrets
import time
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidecar.errors import ConfigurationError

TOKEN_FILE: Final = "page.token"
COOKIE: Final = "sidecar_page"
SESSION_S: Final = 12 * 3600
MAX_FORM_BYTES: Final = 8192

HEADERS: Final = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def page_token(directory: Path) -> str:
    """Read the page's token, or make it (0600). Raises ConfigurationError where others can read it."""
    path = directory / TOKEN_FILE
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        if path.stat().st_mode & 0o077:
            raise ConfigurationError(
                f"the page's token {path} can be read by others",
                hint=f"rm {path}: the next start makes another",
            ) from None
        found = path.read_text(encoding="ascii").strip()
        if found:
            return found
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    token = secrets.token_urlsafe(24)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
    return token


class Guard:
    """Middleware: the headers of every answer; a Host that is not ours is refused (DNS rebinding), where `hosts` names any."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        if self._hosts and host_name(Request(scope).headers.get("host", "")) not in self._hosts:
            refusal = PlainTextResponse("this name is not served here\n", 421)
            await refusal(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


def host_name(host: str) -> str:
    """A Host header's name: without port and brackets, lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


class Sessions:
    """Sessions of whoever gave the page's token."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._key = secrets.token_bytes(32)

    def _mac(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), "sha256").hexdigest()

    def token_is(self, given: str) -> bool:
        return hmac.compare_digest(given.strip().encode(), self._token.encode())

    def begin(self, response: Response, *, secure: bool) -> None:
        text = f"{int(time.time())}-{secrets.token_hex(16)}"
        response.set_cookie(
            COOKIE, f"{text}.{self._mac(text)}",
            httponly=True, samesite="strict", secure=secure, max_age=SESSION_S, path="/",
        )  # fmt: skip

    def of(self, request: Request) -> str | None:
        """The session that the request belongs to, None where there is none that holds."""
        text, _, mac = request.cookies.get(COOKIE, "").partition(".")
        if not hmac.compare_digest(self._mac(text).encode(), mac.encode()):
            return None
        began = text.partition("-")[0]
        return text if began.isdigit() and 0 <= time.time() - int(began) < SESSION_S else None

    def form_token(self, session: str) -> str:
        return self._mac("form " + session)

    def form_is_ours(self, session: str | None, given: str) -> bool:
        return session is not None and hmac.compare_digest(given.encode(), self.form_token(session).encode())


def same_origin(request: Request) -> bool:
    """A browser names the origin of every POST; without one it is no browser's form."""
    return request.headers.get("origin") == f"{request.url.scheme}://{request.headers.get('host')}"


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a small form; empty where it is too large."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            return {}
    return dict(parse_qsl(body.decode("utf-8", "replace")))
