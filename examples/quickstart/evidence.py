"""What the audit says about the report, read back with `sidecar audit`."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from far_host import FarHostError


@dataclass(slots=True)
class Evidence:
    records: int = 0
    flows: int = 0
    principal: str = ""
    issuer: str = ""
    processes: list[str] = field(default_factory=list)
    """From the job's root down to the process that opened the held flow: `name (pid)`."""
    held_by_rule: str = ""
    held_statement: str = ""
    approved_by: str = ""
    held_s: float = 0.0
    denied: list[tuple[str, str]] = field(default_factory=list)
    """Rule, and what was not sent."""
    secrets_found: list[str] = field(default_factory=list)
    """Values that must not be in any record, and are."""


def collect(sidecar: str, audit: Path, must_not_appear: tuple[str, ...] = ()) -> Evidence:
    exported = subprocess.run(
        [sidecar, "audit", "export", "--directory", str(audit)], capture_output=True, text=True, check=False
    )
    if exported.returncode != 0:
        raise FarHostError(f"the records cannot be read: {exported.stderr.strip()}")
    records: list[dict[str, Any]] = [json.loads(line) for line in exported.stdout.splitlines()]
    evidence = Evidence(records=len(records), flows=sum(record["kind"] == "open" for record in records))
    evidence.secrets_found = [secret for secret in must_not_appear if secret in exported.stdout]
    for record in records:
        _look_at(record, evidence)
    return evidence


def _look_at(record: dict[str, Any], evidence: Evidence) -> None:
    principal = record.get("principal")
    if principal and not evidence.principal:
        evidence.principal, evidence.issuer = principal["subject"], principal["issuer"]
    verdict = record.get("verdict") or {}
    operation = record.get("operation") or {}
    shown = operation.get("text") or f"{operation.get('method', '')} {operation.get('path', '')}"
    if record["kind"] == "request" and verdict.get("action") == "deny":
        evidence.denied.append((verdict["rule"], shown))
    if record["kind"] == "request" and verdict.get("action") == "hold":
        evidence.held_by_rule, evidence.held_statement = verdict["rule"], shown
        evidence.processes = _tree(record.get("origin") or {})
    decision = record.get("hold") or {}
    if record["kind"] == "decision" and decision.get("state") == "approved":
        evidence.approved_by = decision.get("by") or ""
    held_ns = (record.get("timing") or {}).get("held_ns", 0)
    evidence.held_s = max(evidence.held_s, held_ns / 1e9)


def _tree(origin: dict[str, Any]) -> list[str]:
    """Ancestors are nearest first in a record; people read from the top."""
    above = [f"{process['comm']} ({process['pid']})" for process in reversed(origin.get("ancestors", []))]
    name = origin.get("comm") or Path(origin.get("exe", "?")).name
    return [*above, f"{name} ({origin.get('tgid')})"]


def tampered_copy_is_refused(sidecar: str, audit: Path, copy: Path) -> str:
    """Change one byte in the middle of the largest segment of a copy; what `audit verify` says to that."""
    shutil.copytree(audit, copy)
    try:
        segment = max(
            (path for path in copy.rglob("*.seg*") if path.is_file()), key=lambda path: path.stat().st_size
        )
        data = bytearray(segment.read_bytes())
        data[len(data) // 2] ^= 0x01
        segment.write_bytes(data)
        done = subprocess.run(
            [sidecar, "audit", "verify", str(copy)], capture_output=True, text=True, check=False
        )
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    if done.returncode == 0:
        raise FarHostError("a copy of the audit with one byte changed still verifies")
    return (done.stdout + done.stderr).strip()
