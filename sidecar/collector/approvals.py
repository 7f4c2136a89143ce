"""What the page needs of whoever holds the pending statements; implemented by control.client, wired by the command line."""

from __future__ import annotations

from typing import Any, Protocol


class ApprovalsGateway(Protocol):
    def list(self) -> list[Any]:
        """Hold views (control.protocol.HoldView), pending ones first."""
        ...

    def decide(self, hold_id: str, approve: bool, by: str, reason: str) -> Any:
        """Raises ControlError where it is refused."""
        ...
