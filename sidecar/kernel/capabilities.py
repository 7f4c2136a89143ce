"""What this host can do, for `sidecar doctor`: each prerequisite with its fix."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.errors import SidecarError
from sidecar.kernel import cgroups, loader, maps, nft, run_state, steering

MINIMUM_KERNEL = (5, 14)
"""Network namespace cookies in sock_addr hooks and as a socket option."""

PROBE_MARK: Final = 0x51DF0000
PROBE_PORT: Final = 1
"""What the doctor's table names for a moment: a mark that nobody sets (see steering.MARK_BASE) and a port that nobody serves."""


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    detail: str
    hint: str = ""


def cgroup2_mount() -> Path:
    return cgroups.cgroup2_mount()


def current_netns_cookie() -> int:
    return steering.netns_cookie()


def _kernel() -> Check:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    return Check("kernel", numbers >= MINIMUM_KERNEL, release, "Linux 5.14 or newer is needed")


def _cgroup2() -> Check:
    try:
        return Check("cgroup2", True, str(cgroups.cgroup2_mount()))
    except SidecarError as error:
        return Check("cgroup2", False, error.message, error.hint or "")


def _hooks() -> Check:
    try:
        with run_state.host_lock():
            run_state.mount_bpf()
            descriptors = loader.load(run_state.OWNERS_PIN)
    except SidecarError as error:
        return Check("bpf hooks", False, error.message, error.hint or "")
    for descriptor in descriptors.values():
        os.close(descriptor)
    run_state.unmount_if_unused()
    return Check("bpf hooks", True, f"{len(maps.ATTACH_TYPES)} programs accepted by the verifier")


def _nftables() -> Check:
    table = nft.Table(os.urandom(4).hex(), PROBE_MARK, PROBE_PORT)
    try:
        try:
            table.apply()
        finally:
            table.delete()
    except (SidecarError, OSError) as error:
        return Check("nftables", False, str(error), "the kernel needs nf_tables with NAT for the inet family")
    return Check("nftables", True, "redirect, conntrack status and reject are accepted")


def probe() -> list[Check]:
    """All checks, in the order in which to mend them. Loads the hooks without attaching them."""
    checks = [
        Check("root", os.geteuid() == 0, f"uid {os.geteuid()}", "sudo sidecar doctor"),
        _kernel(),
        _cgroup2(),
        Check(
            "BTF",
            Path("/sys/kernel/btf/vmlinux").is_file(),
            "/sys/kernel/btf/vmlinux",
            "a kernel with CONFIG_DEBUG_INFO_BTF; the distribution's have it",
        ),
        Check(
            "bcc",
            importlib.util.find_spec("bcc") is not None,
            "python3-bpfcc",
            "apt-get install python3-bpfcc",
        ),
    ]
    if os.geteuid() == 0:
        checks += [_hooks(), _nftables()]
    checks.append(
        Check(
            "IPv6",
            Path("/proc/net/if_inet6").is_file(),
            "loopback ::1 is used for IPv6 clients",
            "without it only IPv4 is steered, and IPv6 connections cannot be made either",
        )
    )
    return checks
