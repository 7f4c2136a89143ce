"""One question over HTTP, bounded in time and size. Redirects are never followed: who is asked was decided before."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

import httpx

FETCH_S: Final = 10.0
"""What one question may take in all."""
CONNECT_S: Final = 5.0
READ_S: Final = 5.0


def ask(
    method: str,
    url: str,
    *,
    max_bytes: int,
    headers: Mapping[str, str] | None = None,
    body: Mapping[str, str] | None = None,
) -> tuple[bytes, httpx.Headers]:
    """Body and headers of a 200 or 201. `body` is sent as JSON. Blocks up to about `FETCH_S`. Raises OSError, httpx.HTTPError,
    httpx.InvalidURL, or ValueError with a sentence that repeats nothing of question or answer."""
    deadline = time.monotonic() + FETCH_S
    with httpx.stream(
        method,
        url,
        headers={"accept": "application/json", **(headers or {})},
        json=body,
        timeout=httpx.Timeout(FETCH_S, connect=CONNECT_S, read=READ_S),
        follow_redirects=False,
    ) as response:
        if response.status_code not in (200, 201):
            raise ValueError(f"status {response.status_code}")
        found = bytearray()
        for chunk in response.iter_bytes(16_384):
            found += chunk
            if len(found) > max_bytes:
                raise ValueError(f"more than {max_bytes} bytes")
            if time.monotonic() > deadline:
                raise ValueError(f"not complete within {FETCH_S:.0f} s")
        return bytes(found), response.headers
