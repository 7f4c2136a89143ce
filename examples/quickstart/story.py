"""What the quickstart saw, and whether all of it is as promised."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from approver import Approver
from evidence import Evidence


@dataclass(slots=True)
class Story:
    state: Path
    direct: str = ""
    steered: str = ""
    direct_loop: dict[str, float] = field(default_factory=dict)
    steered_loop: dict[str, float] = field(default_factory=dict)
    approver: Approver | None = None
    evidence: Evidence | None = None
    leaked: list[str] = field(default_factory=list)
    verified: str = ""
    refused: str = ""
    traces: list[str] = field(default_factory=list)
    server_saw: str = ""

    def part(self, output: str, heading: str) -> list[str]:
        """The lines of a report under `# heading`."""
        lines: list[str] = []
        inside = False
        for line in output.splitlines():
            if line.startswith("# "):
                inside = line == f"# {heading}"
            elif inside and line.strip():
                lines.append(line)
        return lines

    def denied_record(self) -> str:
        """The short id that the first denial in the steered report names."""
        named = re.search(r"sidecar why ([0-9a-f]+)", self.steered)
        return named[1] if named else "ID"

    def failures(self) -> list[str]:
        """Each promise that was not kept."""
        evidence = self.evidence or Evidence()
        cleaning = self.part(self.steered, "cleaning up")
        forgotten = self.part(self.steered, "a customer asked to be forgotten")
        old_client = self.part(self.steered, "an old client, by its old API call")
        promises = {
            "no masked value in the report": not self.leaked,
            "no masked value, token or password in a record": not evidence.secrets_found,
            "DROP denied": any("no-schema-changes" in line for line in cleaning),
            "unfiltered DELETE denied": any("no-unfiltered-deletes" in line for line in cleaning),
            "the session went on": "orders: 240" in cleaning,
            "the API call denied": any("read-only-api" in line for line in old_client),
            "the hold approved and carried out": "DELETE 1" in forgotten and bool(evidence.approved_by),
            "a verified principal": bool(evidence.principal),
            "the identity at the API": any(
                evidence.principal in line for line in self.part(self.steered, "totals")
            )
            and bool(evidence.principal),
            "the altered copy refused": bool(self.refused),
            "no kernel trace": not self.traces,
        }
        return [promise for promise, kept in promises.items() if not kept]
