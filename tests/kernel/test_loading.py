"""The hooks are compiled and pass the verifier, with our own nine headers and with the kernel's."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.kernel import maps, run_state

pytestmark = pytest.mark.root

LOAD = """
import json, os, sys
from sidecar.kernel import loader, maps, run_state
with run_state.host_lock():
    run_state.mount_bpf()
    found = loader.load(run_state.OWNERS_PIN)
names = {}
for name in maps.ATTACH_TYPES:
    names[name] = maps.program_info(found[name])[1]
print(json.dumps([sorted(found), names]))
run_state.unmount_if_unused()
"""


def loaded(**environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "SIDECAR_KERNEL_HEADERS"}
    return subprocess.run(
        [sys.executable, "-c", LOAD],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        env=env | environment,
    )


def assert_loaded(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    found, names = json.loads(done.stdout)
    assert set(maps.ATTACH_TYPES) <= set(found)
    assert names == {name: name[:15] for name in maps.ATTACH_TYPES}
    assert run_state.states() or not os.path.ismount(run_state.BPF_DIRECTORY)


def test_without_kernel_headers() -> None:
    """Whatever the host has: a source tree that is not there would fail."""
    assert_loaded(loaded(BCC_KERNEL_SOURCE="/nonexistent"))


def test_with_kernel_headers() -> None:
    build = Path(os.environ.get("BCC_KERNEL_SOURCE", f"/lib/modules/{platform.release()}/build"))
    if (
        not (build / "include" / "linux" / "kconfig.h").is_file()
        and not (build / "include/generated").is_dir()
    ):
        pytest.skip(f"no kernel headers in {build}: apt-get install linux-headers-{platform.release()}")
    assert_loaded(loaded(SIDECAR_KERNEL_HEADERS="1"))


def test_headers_that_are_not_there_are_an_error_with_a_hint() -> None:
    done = loaded(SIDECAR_KERNEL_HEADERS="1", BCC_KERNEL_SOURCE="/nonexistent")
    assert done.returncode != 0
    assert "SteeringError: the kernel hooks could not be loaded" in done.stderr
