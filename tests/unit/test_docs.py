"""What docs/ promises exists, and what exists is documented."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from sidecar.model.reasons import CloseReason, GapReason
from sidecar.policy import load_policy
from sidecar.session.commands import SessionLimits

DOCS = Path(__file__).parents[2] / "docs"


def test_the_policy_page_loads_and_passes() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "policy.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        results = load_policy(block, "docs/policy.md").run_tests()
        assert results
        assert [result for result in results if not result.ok] == []


def test_every_reason_and_limit_is_documented() -> None:
    text = (DOCS / "operations.md").read_text()
    words = [*CloseReason, *GapReason, *(field.name for field in dataclasses.fields(SessionLimits))]
    assert [word for word in words if f"`{word}`" not in text] == []
