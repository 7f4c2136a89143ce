"""Two network namespaces joined by a veth pair: `near` runs the job and the inspector, `far` plays the host they dial."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Sequence
from typing import Any


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class FarHost:
    """Context manager. IPv4 10.78.x.1 (near) and .2 (far), IPv6 fd78:x::1 and ::2."""

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self.near, self.far = f"scn{tag}", f"scf{tag}"
        number = secrets.randbelow(250) + 1
        self.near_address, self.far_address = f"10.78.{number}.1", f"10.78.{number}.2"
        self.far_address6 = f"fd78:{number:x}::2"
        self._near6 = f"fd78:{number:x}::1"
        self.interface = f"v{tag}"

    def __enter__(self) -> FarHost:
        try:
            run("ip", "netns", "add", self.near)
            run("ip", "netns", "add", self.far)
            run(
                "ip",
                "link",
                "add",
                f"{self.interface}n",
                "netns",
                self.near,
                "type",
                "veth",
                "peer",
                "name",
                f"{self.interface}f",
                "netns",
                self.far,
            )
            for space, side, address, address6 in (
                (self.near, "n", self.near_address, self._near6),
                (self.far, "f", self.far_address, self.far_address6),
            ):
                for command in (
                    ("link", "set", "lo", "up"),
                    ("link", "set", f"{self.interface}{side}", "up"),
                    ("addr", "add", f"{address}/24", "dev", f"{self.interface}{side}"),
                    ("-6", "addr", "add", f"{address6}/64", "dev", f"{self.interface}{side}", "nodad"),
                ):
                    run("ip", "-n", space, *command)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for space in (self.near, self.far):
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)

    def popen(self, where: str, command: Sequence[str], **more: Any) -> subprocess.Popen[str]:
        """`nsenter`, not `ip netns exec`, which remounts /sys and hides cgroups and bpffs."""
        return subprocess.Popen(["nsenter", f"--net=/run/netns/{where}", *command], text=True, **more)

    def run(
        self, where: str, command: Sequence[str], timeout: float = 60, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", f"--net=/run/netns/{where}", *command],
            text=True, capture_output=True, timeout=timeout, check=False, env={**os.environ, **(env or {})},
        )  # fmt: skip
