"""Tables fit the terminal: what tells one row from another is never cut away."""

from __future__ import annotations

import io
import sys
import time

import pytest
from rich.console import Console

from sidecar.cli.flows import _table
from sidecar.control.protocol import FlowRow

ROW = FlowRow(
    flow="01a20e3a-d8d1-7e8c-9d67-ab6e6dbec09f",
    opened_ns=time.time_ns(),
    pid=1234567,
    exe="/usr/lib/postgresql/15/bin/psql",
    uid=1000,
    principal="repo:shop/reports:ref:refs/heads/main",
    target="db.shop.internal:5432",
    protocol="postgres",
    requests=123_456,
    denied=78,
    bytes_up=250,
    bytes_down=15_000,
    state="held",
)


@pytest.mark.parametrize("width", [60, 80, 100, 150, 200])
def test_open_flows_on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = io.StringIO()
    Console(file=shown, width=width).print(_table([("0a0a0a0a", ROW)], width))
    lines = shown.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    (row,) = [line for line in lines if "6dbec09f" in line]
    for part in ("psql" if width < 200 else "bin/psql", "db.sh", "123456", "78", "held"):
        assert part in row, shown.getvalue()
    assert ("1234567" in row) == (width >= 80)
    assert ("repo:" in row) == (width >= 100)
