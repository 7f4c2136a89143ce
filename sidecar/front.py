"""The process of `sidecar exec` that the caller's shell sees: it runs the command and keeps terminal and
signals.

Owns: the fork of the command (cgroup first, then identity, then exec), what happens to each signal, stopping
and continuing together with the command, and the exit status. Holds no policy and no kernel state; it starts
before them and ends after them. See `launch` for the other half.

Why a process of its own: the terminal sends Ctrl-C and Ctrl-Z to the whole process group. The command has to
get them as if it were not wrapped, and the inspector must never be stopped by them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

SETUP_FAILED: Final = 125
CANNOT_RUN: Final = 126
NOT_FOUND: Final = 127
"""As env(1), timeout(1) and docker run."""
NOT_RUN_HINTS: Final = {
    errno.ENOENT: "is it installed, and in PATH? a script's first line (#!) may name what is not",
    errno.EACCES: "is it a program that this user may run? chmod +x makes a script one",
    errno.ENOEXEC: "a script begins with #! and what runs it",
}

MAX_FRAME_BYTES: Final = 16 * 1024 * 1024
"""The kernel's own bound for arguments and environment is a quarter of the stack limit: 2 MiB as a rule."""
TEARDOWN_TIMEOUT_S: Final = 30.0

SI_KERNEL: Final = 0x80  # siginfo: sent by the kernel, that is by the terminal, to the whole process group
_SIGINFO: Final = struct.Struct("=IiiI112x")  # signalfd_siginfo: signo, errno, code, pid, … (128 bytes)
_FORWARDED: Final = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGTSTP,
    signal.SIGCONT,
)
_WATCHED: Final = (*_FORWARDED, signal.SIGCHLD)
_ENDING: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


class Launch(msgspec.Struct, tag=True):
    """Run this. `cgroup` is the directory to be in before exec; `environ` is the whole environment."""

    argv: list[bytes]
    cgroup: str
    uid: int
    gid: int
    groups: list[int]
    environ: dict[bytes, bytes]


class Started(msgspec.Struct, tag=True):
    """`pid` 0: it could not be run; `status` is 125, 126 or 127 and the person has been told why."""

    pid: int
    status: int = 0


class Ended(msgspec.Struct, tag=True):
    """The command's status as a shell would say it: 128+n for a signal."""

    status: int


Message = Launch | Started | Ended
_decoder = msgspec.msgpack.Decoder(Message)


def frame(message: Message) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "big") + body


def take(buffer: bytearray) -> Message | None:
    """The next whole message at the start of `buffer`, removed from it; None while it is incomplete."""
    if len(buffer) < 4:
        return None
    size = int.from_bytes(buffer[:4], "big")
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {size} bytes")
    if len(buffer) < 4 + size:
        return None
    message: Message = _decoder.decode(bytes(buffer[4 : 4 + size]))
    del buffer[: 4 + size]
    return message


def say(text: str) -> None:
    """One line on stderr, also where stderr is gone."""
    try:
        os.write(2, f"sidecar: {text}\n".encode("utf-8", "replace"))
    except OSError:
        return


class Front:
    """Runs until the command and the inspector have ended. `inspector_pid` is our child; None where it is our
    parent. `clean_up` is called then, with the command's cgroup where it came to that."""

    def __init__(
        self,
        channel: socket.socket,
        inspector_pid: int | None,
        clean_up: Callable[[Path | None], None] | None = None,
    ) -> None:
        self._channel = channel
        self._inspector_pid = inspector_pid
        self._inspector_status: int | None = None
        self._inspector_gone = False
        self._clean_up = clean_up
        self._buffer = bytearray()
        self._cgroup: Path | None = None
        self._child: int | None = None
        self._child_status: int | None = None
        self._child_stopped = False
        self._failed_status: int | None = None
        self._interrupted: int | None = None
        self._keyboard_interrupt = False
        self._deadline = float("inf")
        self._mask: set[int] = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        self._signals = _signalfd(_WATCHED)
        self._mirrors_stops = _has_job_control()

    def run(self) -> int:
        """Returns the exit status; dies of SIGINT itself where the command did and the keyboard sent it to
        both, so that a calling script stops as it would have without us."""
        while not self._finished():
            watched: list[int | socket.socket] = [self._signals]
            if not self._inspector_gone:
                watched.append(self._channel)
            timeout = max(0.0, self._deadline - time.monotonic()) if self._deadline != float("inf") else None
            ready, _, _ = select.select(watched, [], [], timeout)
            if self._signals in ready:
                self._take_signal()
            if self._channel in ready:
                self._take_bytes()
            if not ready and time.monotonic() >= self._deadline:
                say("the inspector does not end: left alone. hint: sidecar down")
                break
        if self._inspector_gone and self._clean_up:
            self._clean_up(self._cgroup)
        return self._status()

    def _finished(self) -> bool:
        if self._child is not None and self._child_status is None:
            return False
        return self._inspector_gone and (self._inspector_pid is None or self._inspector_status is not None)

    def _inspector_crashed(self) -> bool:
        return self._inspector_pid is not None and (self._inspector_status or 0) < 0

    def _status(self) -> int:
        if self._child_status is not None:
            if self._child_status == -signal.SIGINT and self._keyboard_interrupt:
                _die_of(signal.SIGINT)
            return _shell_status(self._child_status)
        if self._failed_status is not None:
            return self._failed_status
        if self._interrupted is not None:
            return 128 + self._interrupted
        if self._inspector_status is None or self._inspector_status < 0:
            return SETUP_FAILED
        return self._inspector_status

    # signals

    def _take_signal(self) -> None:
        number, _, code, _ = _SIGINFO.unpack(os.read(self._signals, _SIGINFO.size))
        if number == signal.SIGCHLD:
            self._reap()
        elif self._child is None:
            if number in _ENDING and self._interrupted is None:
                self._interrupted = number
                self._channel.shutdown(socket.SHUT_WR)
                self._limit_teardown()
        elif self._child_status is None:
            self._pass_on(number, from_terminal=code == SI_KERNEL)

    def _pass_on(self, number: int, *, from_terminal: bool) -> None:
        """What the terminal sends, the command has got as well: it is in our process group. The rest was for
        us alone."""
        assert self._child is not None
        if number == signal.SIGCONT:
            self._continue_child()
        elif not from_terminal:
            os.kill(self._child, number)
        elif number == signal.SIGINT:
            self._keyboard_interrupt = True

    def _continue_child(self) -> None:
        assert self._child is not None
        if not self._child_stopped:
            return
        self._child_stopped = False
        try:
            group = os.getpgid(self._child)
            if group != os.getpgrp() and os.tcgetpgrp(0) == os.getpgrp():
                os.tcsetpgrp(0, group)  # an interactive shell has a group of its own
        except OSError:
            pass  # no terminal: nothing to hand over
        os.kill(self._child, signal.SIGCONT)

    def _reap(self) -> None:
        if self._child is not None and self._child_status is None:
            pid, status = os.waitpid(self._child, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(status):
                self._child_stopped = True
                if self._mirrors_stops:
                    os.kill(os.getpid(), signal.SIGSTOP)  # so that the shell takes its terminal back
            elif pid:
                self._child_status = os.waitstatus_to_exitcode(status)
                self._send(Ended(_shell_status(self._child_status)))
                self._limit_teardown()
        if self._inspector_pid is not None and self._inspector_status is None:
            pid, status = os.waitpid(self._inspector_pid, os.WNOHANG)
            if pid:
                self._inspector_status = os.waitstatus_to_exitcode(status)
                self._inspector_gone = True  # even where a process of its own holds the socket
                if self._inspector_crashed() and self._child is not None and self._child_status is None:
                    say("the inspector died; connections of the command are refused from now on")

    def _limit_teardown(self) -> None:
        self._deadline = time.monotonic() + TEARDOWN_TIMEOUT_S

    # messages

    def _take_bytes(self) -> None:
        try:
            data = self._channel.recv(65_536)
        except ConnectionError:
            data = b""
        if not data:
            self._inspector_gone = True
            return
        self._buffer += data
        while (message := take(self._buffer)) is not None:
            if isinstance(message, Launch) and self._child is None and self._interrupted is None:
                self._start(message)

    def _send(self, message: Message) -> None:
        try:
            self._channel.sendall(frame(message))
        except OSError:
            self._inspector_gone = True

    def _start(self, launch: Launch) -> None:
        self._cgroup = Path(launch.cgroup)
        pid, stage, number = _spawn(launch, self._mask)
        if not stage:
            self._child = pid
            os.dup2(2, 1)  # a reader of our output sees its end when the command's copy is closed
            self._send(Started(pid))
            return
        name = os.fsdecode(launch.argv[0])
        reason = os.strerror(number)
        if stage == "exec":
            self._failed_status = NOT_FOUND if number == errno.ENOENT else CANNOT_RUN
            say(f"{name}: {reason}\nhint: {NOT_RUN_HINTS.get(number, 'try it without Sidecar')}")
        else:
            self._failed_status = SETUP_FAILED
            say(f"{name} was not started: {stage}: {reason}")
        self._send(Started(0, self._failed_status))
        self._limit_teardown()


def _spawn(launch: Launch, mask: set[int]) -> tuple[int, str, int]:
    """Fork and exec. Returns (pid, "", 0), or (0, what failed, errno)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become(launch, mask, writer)
    os.close(writer)
    with open(reader, "rb") as report:
        failure = report.read()
    if not failure:
        return pid, "", 0
    os.waitpid(pid, 0)
    stage, _, number = failure.decode().partition(":")
    return 0, stage, int(number)


def _become(launch: Launch, mask: set[int], report: int) -> None:
    """In the child: never returns. Until exec nothing of the command has run, and by then it is in its
    cgroup."""
    stage = "joining the cgroup"
    try:
        with open(Path(launch.cgroup) / "cgroup.procs", "wb", buffering=0) as members:
            members.write(b"0")
        stage = "becoming the invoking user"
        if launch.uid != os.getuid() or launch.gid != os.getgid():
            os.setgroups(launch.groups)
            os.setresgid(launch.gid, launch.gid, launch.gid)
            os.setresuid(launch.uid, launch.uid, launch.uid)
        for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored_by_python, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        stage = "exec"
        _execute(launch.argv, launch.environ)
    except OSError as error:
        os.write(report, f"{stage}:{error.errno or 0}".encode())
    finally:
        os._exit(SETUP_FAILED)


def _execute(argv: list[bytes], environ: dict[bytes, bytes]) -> None:
    """execvp with the caller's PATH. A file without a magic number is a shell script, as for execvp(3)."""
    name = argv[0]
    if b"/" in name:
        candidates = [name]
    else:
        path = environ.get(b"PATH", os.fsencode(os.defpath))
        candidates = [os.path.join(directory or b".", name) for directory in path.split(b":")]
    failure = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for candidate in candidates:
        try:
            os.execve(candidate, argv, environ)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno == errno.ENOEXEC:
                os.execve("/bin/sh", [b"sh", candidate, *argv[1:]], environ)
            failure = error
    raise failure


def _shell_status(exitcode: int) -> int:
    return 128 - exitcode if exitcode < 0 else exitcode


def _has_job_control() -> bool:
    """Whether a shell above us will continue us: we have a terminal and do not lead its session."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return os.getsid(0) != os.getpid()


def _die_of(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)
    sys.stderr.flush()
    os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


def _signalfd(signals: tuple[signal.Signals, ...]) -> int:
    """signalfd(2), which Python lacks: unlike a handler it tells who sent the signal."""
    bits = 0
    for watched in signals:
        bits |= 1 << (watched - 1)
    mask = ctypes.create_string_buffer(bits.to_bytes(128, sys.byteorder), 128)
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.signalfd(-1, mask, os.O_CLOEXEC)
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return descriptor
