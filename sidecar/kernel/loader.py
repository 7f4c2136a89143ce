"""Compiles and loads the hooks: the only module that imports bcc, run as a short-lived child, because LLVM stays resident.

Passes the descriptors of programs and maps over a unix socket (SCM_RIGHTS) and exits. Works without kernel headers: the
programs touch UAPI contexts and helpers only, and bpf/headers holds the nine files that bcc looks for. Where the host has
real headers they are not needed and not used, so that every host compiles the same text; SIDECAR_KERNEL_HEADERS=1 uses them.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, Final

from sidecar.errors import PrerequisiteError, SteeringError
from sidecar.kernel.maps import ATTACH_TYPES

HOOKS: Final = ("connect", "egress", "sendmsg", "bind")
MAPS: Final = (
    "config",
    "heartbeat",
    "ports",
    "exclude4",
    "exclude6",
    "steered",
    "flows",
    "events",
    "lost",
    "owners",
)
TIMEOUT_S: Final = 120.0
"""A virtual machine under emulation takes 16 s."""

PROG_TYPE_CGROUP_SKB, PROG_TYPE_CGROUP_SOCK_ADDR = 8, 18
_USE_HEADERS: Final = "SIDECAR_KERNEL_HEADERS"
_PR_SET_PDEATHSIG: Final = 1


def source_directory() -> Path:
    """bpf/ of the checkout, or of the installed package."""
    here = Path(__file__).resolve().parent.parent
    for candidate in (here.parent / "bpf", here / "bpf"):
        if (candidate / "include" / "common.h").is_file():
            return candidate
    raise PrerequisiteError(
        "the BPF sources are not installed", hint="install from a checkout: scripts/setup"
    )


def source_text(directory: Path) -> str:
    """One compilation unit: bcc rewrites map accesses only in the text that it is given, not in what that includes."""
    parts = [(directory / "include" / "common.h").read_text()]
    parts += [(directory / f"{hook}.bpf.c").read_text() for hook in HOOKS]
    return "\n".join(parts)


def compiler_flags(directory: Path, owners_pin: Path) -> list[str]:
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    return [
        f"-I{directory}/include",
        "-I/usr/include",
        f"-I/usr/include/{multiarch}",
        f'-DSIDECAR_OWNERS_PIN="{owners_pin}"',
        "-Wno-address-of-packed-member",
    ]


def load(owners_pin: Path) -> dict[str, int]:
    """Run the child; returns descriptors by name of program or map. Raises PrerequisiteError or SteeringError with what it said."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            child = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "sidecar.kernel.loader",
                    str(theirs.fileno()),
                    str(owners_pin),
                    str(os.getpid()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd="/",
                env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent.parent)},
            )
        ours.settimeout(TIMEOUT_S)
        descriptors = array.array("i")
        try:
            data, ancillary, _, _ = ours.recvmsg(65536, socket.CMSG_SPACE(64 * 4), socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            child.kill()
            data, ancillary = b"", []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(payload[: len(payload) - len(payload) % 4])
        output, _ = child.communicate()
    if not data:
        said = output.decode(errors="replace").strip().splitlines()
        message = "\n".join(said[-12:]) if said else f"exit status {child.returncode}"
        if "No module named 'bcc'" in message:
            raise PrerequisiteError(
                "bcc is missing",
                hint="apt-get install python3-bpfcc, and use a venv with system site packages",
            )
        raise SteeringError(f"the kernel hooks could not be loaded: {message}", hint="sidecar doctor")
    names = json.loads(data)
    return dict(zip(names, descriptors, strict=True))


def _compile(owners_pin: Path) -> tuple[list[str], list[int]]:
    directory = source_directory()
    if not os.environ.get(_USE_HEADERS):
        os.environ["BCC_KERNEL_SOURCE"] = str(directory / "headers")
    import bcc
    from bcc.libbcc import lib

    program: Any = bcc.BPF(text=source_text(directory), cflags=compiler_flags(directory, owners_pin))
    names, descriptors = [], []
    for name, attach_type in ATTACH_TYPES.items():
        kind = PROG_TYPE_CGROUP_SKB if name == "sidecar_egress" else PROG_TYPE_CGROUP_SOCK_ADDR
        names.append(name)
        descriptors.append(program.load_func(name, kind, None, attach_type).fd)
    for name in MAPS:
        descriptor = lib.bpf_table_fd(program.module, name.encode())
        if descriptor < 0:
            raise SteeringError(f"no map {name}")
        names.append(name)
        descriptors.append(descriptor)
    return names, descriptors


def _die_with(parent: int) -> None:
    """A compiler whose supervisor was killed must make nothing any more (prctl(2), PR_SET_PDEATHSIG); it may have been killed before."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        sys.exit("the process that wanted the hooks is gone")


def main() -> int:
    _die_with(int(sys.argv[3]))
    names, descriptors = _compile(Path(sys.argv[2]))
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        sock.sendmsg(
            [json.dumps(names).encode()],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
