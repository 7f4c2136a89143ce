"""One request between its verdict and the end of its answer, and what was passed on of that answer."""

from __future__ import annotations

from typing import Any

from sidecar.model.verdict import MaskPlan, Verdict


class Pending:
    """A request that was forwarded and is not answered yet (or one that we answer in its turn)."""

    __slots__ = (
        "answer",
        "body_bytes",
        "body_digest",
        "close",
        "held_ns",
        "method",
        "plan",
        "record_id",
        "started_ns",
        "verdict",
    )

    def __init__(self, method: str, record_id: str, started_ns: int) -> None:
        self.method = method
        self.record_id = record_id
        self.started_ns = started_ns
        self.plan: MaskPlan | None = None
        self.verdict: Verdict | None = None
        self.answer: bytes | None = None
        self.close = False
        self.held_ns = 0
        self.body_bytes = 0
        self.body_digest: Any = None


class Answer:
    """What was passed on of the response under way."""

    __slots__ = ("digest", "size", "stored")

    def __init__(self, digest: Any = None) -> None:
        self.stored = bytearray()
        self.size = 0
        self.digest = digest

    def note(self, part: memoryview | bytes, keep_bytes: int) -> None:
        self.size += len(part)
        self.digest.update(part)
        room = keep_bytes - len(self.stored)
        if room > 0:
            self.stored += part[:room]
