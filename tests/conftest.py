"""Tiers and their needs. A missing privilege skips locally, with a reason, and fails in CI (CI=true)."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

CI = os.environ.get("CI", "") not in ("", "0", "false")


def _missing(item: pytest.Item) -> str | None:
    names = {marker.name for marker in item.iter_markers()}
    if "root" in names and os.geteuid() != 0:
        return "needs root: BPF, nftables, network namespaces"
    if "servers" in names and not list(Path("/usr/lib/postgresql").glob("*/bin/postgres")):
        return "needs the distribution's PostgreSQL: run scripts/setup"
    if "browser" in names and not shutil.which("chromium"):
        return "needs chromium: run scripts/setup"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = _missing(item)
    if reason is None:
        return
    if CI:
        pytest.fail(f"{reason} (in CI nothing is skipped)")
    pytest.skip(reason)


def _version(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "absent"
    return (
        (done.stdout or done.stderr).strip().splitlines()[0]
        if (done.stdout or done.stderr).strip()
        else "absent"
    )


def pytest_report_header(config: pytest.Config) -> list[str]:
    postgres = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return [
        f"kernel: {platform.release()}  uid: {os.geteuid()}  CI: {CI}",
        f"bcc: {_version('dpkg-query', '-W', '-f=${Version}', 'python3-bpfcc')}",
        f"postgres: {_version(str(postgres[-1]), '--version') if postgres else 'absent'}",
        f"nft: {_version('nft', '--version')}  nginx: {_version('nginx', '-v')}",
    ]
