"""The shop's HTTP API on the far host: customers as JSON, and reports that it takes in.

    api.py ADDRESS PORT JWKS_FILE

Says in each answer to a report who posted it: the subject of the token in X-Workload-Identity, if it
verifies.
"""

from __future__ import annotations

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jwt

CUSTOMERS = {
    1: {"id": 1, "name": "Ada Byron", "email": "ada@example.org", "ssn": "078-05-1120"},
    2: {"id": 2, "name": "Grace Murray", "email": "grace@example.org", "ssn": "219-09-9999"},
    3: {"id": 3, "name": "Edsger Wybe", "email": "edsger@example.org", "ssn": "457-55-5462"},
    4: {"id": 4, "name": "Barbara Huber", "email": "barbara@example.org", "ssn": "323-12-8741"},
}
AUDIENCE = "sidecar"
MAX_BODY_BYTES = 1_000_000


class ShopApi(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive
    wbufsize = 65_536  # head and body in one segment: two would wait for each other's acknowledgement
    jwks_file: Path

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if address.path != "/v1/customers":
            self._answer(404, {"error": "no such page"})
            return
        limit = int(parse_qs(address.query).get("limit", ["100"])[0])
        self._answer(200, {"customers": list(CUSTOMERS.values())[:limit]})

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", "0"))
        if size > MAX_BODY_BYTES:
            self._answer(413, {"error": "too large"})
            return
        totals = json.loads(self.rfile.read(size))["totals"]
        self._answer(201, {"customers": len(totals), "posted_by": self._posted_by()})

    def do_DELETE(self) -> None:
        match = re.fullmatch(r"/v1/customers/(\d+)", self.path)
        found = CUSTOMERS.pop(int(match[1]), None) if match else None
        self._answer(200 if found else 404, {"deleted": found["name"] if found else None})

    def _posted_by(self) -> str:
        token = self.headers.get("X-Workload-Identity")
        if token is None:
            return "unknown"
        keys = jwt.PyJWKSet.from_json(self.jwks_file.read_text())
        try:
            key = keys[jwt.get_unverified_header(token)["kid"]]
            return str(jwt.decode(token, key, algorithms=["ES256"], audience=AUDIENCE)["sub"])
        except (jwt.InvalidTokenError, KeyError) as error:
            return f"forged: {type(error).__name__}"

    def _answer(self, status: int, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        sys.stderr.write(f"{self.client_address[0]} {format % args}\n")


def main() -> None:
    address, port, jwks_file = sys.argv[1:]
    ShopApi.jwks_file = Path(jwks_file)
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer((address, int(port)), ShopApi).serve_forever()


if __name__ == "__main__":
    main()
