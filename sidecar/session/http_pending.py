"""One request between its verdict and the end of its answer, and what passed of either's body."""

from __future__ import annotations

import hashlib

from sidecar.model.reasons import CloseReason
from sidecar.model.verdict import MaskPlan, Verdict


class Passed:
    """Counts and digests all of a body that passed, and keeps its beginning for the record."""

    __slots__ = ("_digest", "size", "stored")

    def __init__(self) -> None:
        self.stored = bytearray()
        self.size = 0
        self._digest = hashlib.sha256()

    def note(self, part: memoryview | bytes, keep_bytes: int) -> None:
        """`keep_bytes` bounds what is stored."""
        self.size += len(part)
        self._digest.update(part)
        room = keep_bytes - len(self.stored)
        if room > 0:
            self.stored += part[:room]

    def digest(self) -> str:
        return self._digest.hexdigest()


class Pending:
    """A request that was forwarded and is not answered yet (or one that we answer in its turn)."""

    __slots__ = (
        "answer",
        "body",
        "body_whole",
        "close",
        "close_detail",
        "held_ns",
        "may_switch",
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
        """Ours."""
        self.close: CloseReason | None = None
        """The flow ends with this answer."""
        self.close_detail: str | None = None
        self.may_switch = False
        """An upgrade or a tunnel was asked for."""
        self.held_ns = 0
        self.body = Passed()
        """Of the request, where it streamed."""
        self.body_whole = False
