"""Tokens that have to be asked for: at a CI service's endpoint with the job's own right to ask, or at the cloud's metadata service.

The supervisor asks on the job's behalf and must not become its tool. A job's variables may name the address, but the configuration
says which hosts are asked; only https (http on loopback), no redirects, small answers. Nothing of an
answer is believed here: `verify` judges the token.

A token is kept until shortly before it expires. A request runs in a thread of its own and whoever needs it waits a bounded time:
a service that hangs costs a job two seconds, and the flows after it nothing.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import httpx

from sidecar.errors import IdentityError
from sidecar.identity.bounded_http import ask
from sidecar.identity.compact import MAX_TOKEN_BYTES, peek
from sidecar.model.secret import Secret

log = logging.getLogger(__name__)

MAX_URL_CHARS: Final = 4096
_PLAIN_PLACE: Final = re.compile(r"[0-9A-Za-z.-]+(:[0-9]{1,5})?")
MAX_ANSWER_BYTES: Final = 2 * MAX_TOKEN_BYTES
MAX_ASKING: Final = 32
"""Requests under way at once; a host that wants more is told that its source is busy."""
MAX_KEPT: Final = 4096
RETRY_S: Final = 5.0
"""After a failure the same is not asked again sooner."""
RENEW_BEFORE_S: Final = 60.0
"""A kept token is asked for anew so long before it expires."""
UNDATED_S: Final = 60.0
"""How long a token is kept whose expiry cannot be read."""


class Question(Protocol):
    """Something that yields a token. `ask` blocks for a bounded time; it raises OSError, ValueError (a sentence without secrets) or
    httpx.HTTPError, and returns None where there is no token for this job."""

    @property
    def place(self) -> str:
        """Who is asked, for messages."""

    def key(self) -> bytes:
        """What makes two questions the same, as a digest."""

    def ask(self) -> Secret | None: ...


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A question over HTTP. `answer` names the JSON member that holds the token; empty: the whole body is the token."""

    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False, hash=False)
    answer: str
    body: Mapping[str, str] | None = None

    def key(self) -> bytes:
        """The job's right to ask is among it."""
        headers = sorted(f"{name}: {value}" for name, value in self.headers.items())
        parts = [self.method, self.url, self.answer, json.dumps(self.body), *headers]
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).digest()

    @property
    def place(self) -> str:
        return urlsplit(self.url).hostname or "no host"

    def ask(self) -> Secret | None:
        body, _ = ask(self.method, self.url, headers=self.headers, body=self.body, max_bytes=MAX_ANSWER_BYTES)
        return Secret(_token_in(body, self.answer))


@dataclass(slots=True)
class _Kept:
    until: float
    """Monotonic seconds."""
    token: Secret | None = None
    problem: str = ""


class TokenRequests:
    """Asks, keeps, waits. Thread-safe; blocks up to the caller's `wait_s`."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._kept: dict[bytes, _Kept] = {}
        self._asking: set[bytes] = set()

    def obtain(self, question: Question, wait_s: float) -> Secret | None:
        """Raises IdentityError: `source_unavailable`."""
        key = question.key()
        deadline = time.monotonic() + wait_s
        with self._changed:
            kept = self._current(key)
            if kept is None and key not in self._asking:
                self._start(key, question)
            while kept is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise _unavailable(f"{question.place} does not answer in time")
                self._changed.wait(left)
                kept = self._current(key)
                if kept is None and key not in self._asking:
                    raise _unavailable(f"{question.place} gave no token that is still good")
        if kept.problem:
            raise _unavailable(kept.problem)
        return kept.token

    def _current(self, key: bytes) -> _Kept | None:
        kept = self._kept.get(key)
        return kept if kept is not None and self._clock() < kept.until else None

    def _start(self, key: bytes, question: Question) -> None:
        if len(self._asking) >= MAX_ASKING:
            raise _unavailable(f"{MAX_ASKING} questions are under way already")
        self._asking.add(key)
        try:
            threading.Thread(target=self._run, args=(key, question), name="token", daemon=True).start()
        except RuntimeError as error:  # the process may start no more threads
            self._asking.discard(key)
            raise _unavailable(str(error)) from error

    def _run(self, key: bytes, question: Question) -> None:
        kept = _Kept(self._clock() + RETRY_S, problem=f"{question.place}: the question broke")
        try:
            token = question.ask()
            kept = _Kept(self._clock() + (_lifetime_s(token) if token else RETRY_S), token)
        except (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL) as error:
            kept.problem = f"{question.place}: {_said(error)}"
            log.warning("a token could not be obtained: %s", kept.problem)
        finally:
            with self._changed:
                self._asking.discard(key)
                self._kept.pop(key, None)
                while len(self._kept) >= MAX_KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = kept
                self._changed.notify_all()


def _unavailable(detail: str) -> IdentityError:
    return IdentityError(f"the token's source is not available: {detail}", reason="source_unavailable")


def _said(error: Exception) -> str:
    """An exception's text without the address, which is the job's and may hold anything."""
    return f"{type(error).__name__}: {error}"[:200] if isinstance(error, ValueError) else type(error).__name__


def _lifetime_s(token: Secret) -> float:
    """From the token's own `exp`, which nobody has verified: it only decides when to ask again."""
    try:
        _, claims = peek(token.reveal())
    except IdentityError:
        return UNDATED_S
    expires = claims.get("exp")
    if isinstance(expires, bool) or not isinstance(expires, int | float):
        return UNDATED_S
    return max(min(expires - time.time() - RENEW_BEFORE_S, 24 * 3600.0), RETRY_S)


def _token_in(body: bytes, answer: str) -> str:
    try:
        text = body.decode("utf-8")
        found: Any = text.strip() if not answer else json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError("the answer cannot be read") from None
    if answer:
        found = found.get(answer) if isinstance(found, dict) else None
    if not isinstance(found, str) or not found:
        raise ValueError(f"the answer holds no {answer or 'token'}")
    return found


def permitted(url: str, hosts: tuple[str, ...]) -> bool:
    """Whether an address that a job named may be asked: https to a host that the configuration names (`*.` before it: any below);
    http only to a named address on loopback. Nothing that another reader of addresses could take for another host."""
    if len(url) > MAX_URL_CHARS or re.search(r"[^\x21-\x7e]", url):
        return False
    try:
        parts = urlsplit(url)
        host, _ = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return False
    if not _PLAIN_PLACE.fullmatch(parts.netloc):
        return False
    if not any(
        host == name.lower() or (name.startswith("*.") and host.endswith(name[1:].lower())) for name in hosts
    ):
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def with_query(url: str, **values: str) -> str:
    """The address with these parameters, in place of its own of the same names."""
    parts = urlsplit(url)
    kept = [
        (name, value) for name, value in parse_qsl(parts.query, keep_blank_values=True) if name not in values
    ]
    return urlunsplit(parts._replace(query=urlencode([*kept, *values.items()]), fragment=""))
