"""What a collector says under its own key: receipts (it holds a stream up to a head) and refusals (it cannot take it).

A line is canonical JSON `{"said": {…}, "sig": hex}`; `said.kind` is `receipt` or `refusal`. No byte of it is free.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sidecar.audit import hostkey
from sidecar.errors import AuditError

RECEIPT = "receipt"
REFUSAL = "refusal"


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Said:
    """`last` and `head` (hex): up to where the collector holds the stream; -1 and empty where it has nothing of it.
    `ended`: it holds the stream's end as well. `reason`: why it refused, empty in a receipt."""

    kind: str
    host: str
    stream: str
    last: int
    head: str
    ended: bool
    reason: str
    ts_ns: int
    v: int = 1

    def sign(self, key: hostkey.HostKey) -> dict[str, Any]:
        """The answer's body: what is said, its signature and the key it can be checked with."""
        said = {name: getattr(self, name) for name in self.__slots__}
        return {"said": said, "sig": key.sign(canonical(said)).hex(), "key": key.public.hex()}


def line_of(answer: dict[str, Any]) -> str:
    """What is kept of an answer. Raises AuditError where it has another shape."""
    try:
        return canonical({"said": answer["said"], "sig": answer["sig"]}).decode() + "\n"
    except (KeyError, TypeError, ValueError) as error:
        raise AuditError("the collector's answer has not the shape of a receipt") from error


def read_line(line: str, public: bytes, kind: str) -> Said:
    """Verify a kept line. Raises AuditError."""
    try:
        entry = json.loads(line)
        said = Said(**entry["said"])
        if line.encode() != canonical(entry) + b"\n" or set(entry) != {"said", "sig"}:
            raise ValueError("not canonical")
        if entry["sig"] != bytes.fromhex(entry["sig"]).hex() or not hostkey.verify(
            public, bytes.fromhex(entry["sig"]), canonical(entry["said"])
        ):
            raise ValueError("not signed by the collector")
        if said.kind != kind or not isinstance(said.last, int) or not isinstance(said.head, str):
            raise ValueError("not of this kind")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AuditError(f"a collector's {kind} does not hold: {error}") from error
    return said
