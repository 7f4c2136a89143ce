"""A private Docker engine in a network namespace of its own, which plays the host: bridge, iptables rules and forwarding stay in it.

Enter the namespace with nsenter, not with `ip netns exec`, which remounts /sys and hides cgroups.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from sidecar.kernel.cgroups import cgroup2_mount

IMAGE = "sidecar-test:1"
START_S = 30.0


class DockerHost:
    """Context manager. `address` is the engine's, `netns` the namespace's name: one of its own, or one that somebody else made. Its
    containers' cgroups are below `/<name>`."""

    def __init__(self, netns: str | None = None) -> None:
        self._owns_netns = netns is None
        self.netns = netns or "sct" + os.urandom(3).hex()
        self.directory = Path(tempfile.mkdtemp(prefix="sct-docker-", dir="/tmp"))
        self.socket = self.directory / "docker.sock"
        self.address = f"unix://{self.socket}"
        self._daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            if self._owns_netns:
                _run("ip", "netns", "add", self.netns)
            _run("nsenter", f"--net=/run/netns/{self.netns}", "ip", "link", "set", "lo", "up")
            (cgroup2_mount() / self.netns).mkdir(exist_ok=True)
            self.start()
            self._make_image()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def start(self) -> None:
        log = (self.directory / "log").open("ab")
        self._daemon = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.netns}", "dockerd", "--data-root", self.directory / "data",
             "--exec-root", self.directory / "run", "--pidfile", self.directory / "pid", "-H", self.address,
             "--cgroup-parent", f"/{self.netns}", "--dns", "172.17.0.1"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        log.close()
        deadline = time.monotonic() + START_S
        while subprocess.run(self._command("version"), capture_output=True, check=False).returncode != 0:
            if time.monotonic() > deadline or self._daemon.poll() is not None:
                raise RuntimeError((self.directory / "log").read_text(errors="replace")[-2000:])
            time.sleep(0.05)

    def stop(self) -> None:
        if self._daemon is not None:
            self._daemon.terminate()
            try:
                self._daemon.wait(20)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
            self._daemon = None

    def signal(self, number: signal.Signals) -> None:
        """To the engine itself; what runs in containers goes on."""
        assert self._daemon is not None
        os.kill(self._daemon.pid, number)

    def _command(self, *arguments: str) -> list[str]:
        return ["docker", "-H", self.address, *arguments]

    def docker(self, *arguments: str, timeout: float = 60) -> str:
        done = subprocess.run(
            self._command(*arguments), capture_output=True, text=True, timeout=timeout, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"docker {' '.join(arguments)}: {done.stderr}")
        return done.stdout.strip()

    def pid_of(self, container: str) -> int:
        return int(self.docker("inspect", "--format", "{{.State.Pid}}", container))

    def cgroup_of(self, identifier: str) -> Path:
        return cgroup2_mount() / self.netns / identifier

    def _make_image(self) -> None:
        root = self.directory / "image"
        for name in ("bin", "etc", "tmp"):
            (root / name).mkdir(parents=True)
        shutil.copy("/bin/busybox", root / "bin" / "busybox")
        for applet in subprocess.check_output(["/bin/busybox", "--list"], text=True).split():
            if applet != "busybox":
                (root / "bin" / applet).symlink_to("busybox")
        (root / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\n")
        with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as archive:
            subprocess.run(
                self._command("import", "-c", 'CMD ["sh"]', "-", IMAGE),
                stdin=archive.stdout,
                capture_output=True,
                check=True,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._daemon is not None and self._daemon.poll() is None:
            self.signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired, RuntimeError):
                listed = self.docker("ps", "-aq").split()
                if listed:
                    self.docker("rm", "-f", *listed)
        self.stop()
        mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for mount in sorted((m for m in mounted if m.startswith(f"{self.directory}/")), reverse=True):
            subprocess.run(["umount", "-l", mount], capture_output=True, check=False)
        if self._owns_netns:
            subprocess.run(["ip", "netns", "del", self.netns], capture_output=True, check=False)
        for hierarchy in {Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*"), cgroup2_mount()}:
            with contextlib.suppress(OSError):
                (hierarchy / self.netns).rmdir()
        shutil.rmtree(self.directory, ignore_errors=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
