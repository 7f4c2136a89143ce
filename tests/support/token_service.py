"""Small servers on loopback that hand out tokens as the documents of GitHub Actions, Buildkite, Google and Azure say."""

from __future__ import annotations

import http.server
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.loopback_http import LoopbackServer

RIGHT_TO_ASK = "right-to-ask"


class TokenService(LoopbackServer):
    """`give(audience)` makes a token. `mode`: `serve`, `hang`, `error`, `redirect`, `garbage`, `huge`, `nothing`. `asked` holds the
    audiences that were asked for."""

    def __init__(self, give: Callable[[str], str]) -> None:
        super().__init__()
        self.give = give
        self.mode = "serve"
        self.asked: list[str] = []

    def github(self) -> dict[str, str]:
        """A GitHub Actions job's variables."""
        return {
            "GITHUB_ACTIONS": "true",
            "ACTIONS_ID_TOKEN_REQUEST_URL": self.origin + "/abc/idtoken/run/job?api-version=2.0",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": RIGHT_TO_ASK,
        }

    def buildkite(self) -> dict[str, str]:
        """A Buildkite job's variables."""
        return {
            "BUILDKITE": "true",
            "BUILDKITE_AGENT_ENDPOINT": self.origin + "/v3",
            "BUILDKITE_AGENT_ACCESS_TOKEN": RIGHT_TO_ASK,
            "BUILDKITE_JOB_ID": "0190b6f2-0000-4000-8000-000000000001",
        }

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        if request.command == "POST":
            self._post(request)
        else:
            self._get(request)

    def _get(self, request: http.server.BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        headers = request.headers
        if parts.path.startswith("/abc/idtoken/"):
            if headers["authorization"] != f"bearer {RIGHT_TO_ASK}" or query.get("api-version") != "2.0":
                return self._say(request, 401, {"message": "no"})
            return self._give(request, query["audience"], lambda token: {"count": len(token), "value": token})
        if parts.path == "/computeMetadata/v1/instance/service-accounts/default/identity":
            if headers["metadata-flavor"] != "Google" or query.get("format") != "full":
                return self._say(request, 403, {})
            return self._give(request, query["audience"], lambda token: token)
        if parts.path == "/metadata/identity/oauth2/token":
            if headers["metadata"] != "true" or not query.get("api-version"):
                return self._say(request, 400, {"error": "invalid_request"})
            return self._give(
                request, query["resource"], lambda token: {"access_token": token, "token_type": "Bearer"}
            )
        return self._say(request, 404, {})

    def _post(self, request: http.server.BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["content-length"])))
        right = request.headers["authorization"] == f"Token {RIGHT_TO_ASK}"
        if not right or request.path != "/v3/jobs/0190b6f2-0000-4000-8000-000000000001/oidc/tokens":
            return self._say(request, 401, {"message": "no"})
        return self._give(request, body["audience"], lambda token: {"token": token}, status=201)

    def _give(
        self,
        request: http.server.BaseHTTPRequestHandler,
        audience: str,
        shape: Callable[[str], Any],
        *,
        status: int = 200,
    ) -> None:
        self.asked.append(audience)
        match self.mode:
            case "hang":
                self.released.wait(10)
            case "error":
                self._say(request, 500, {"message": "later"})
            case "redirect":
                self._say(request, 302, {}, location=self.origin + request.path)
            case "garbage":
                self._say(request, 200, "<html>sign in</html>")
            case "huge":
                self._say(request, 200, "x" * 1_000_000)
            case "nothing":
                self._say(request, 200, {})
            case _:
                self._say(request, status, shape(self.give(audience)))

    def _say(
        self, request: http.server.BaseHTTPRequestHandler, status: int, body: Any, *, location: str = ""
    ) -> None:
        raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        request.send_response(status)
        if location:
            request.send_header("location", location)
        request.send_header("content-length", str(len(raw)))
        request.end_headers()
        request.wfile.write(raw)


@contextmanager
def token_service(give: Callable[[str], str]) -> Iterator[TokenService]:
    with TokenService(give) as service:
        yield service
