"""A real terminal (pty) for tests: start a program on it, type, wait for what it prints."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator, Mapping, Sequence


class Terminal:
    def __init__(self, pid: int, master: int) -> None:
        self.pid = pid
        self.master = master
        self.seen = ""
        self._status: int | None = None

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def expect(self, text: str, timeout_s: float = 15.0) -> str:
        """Read until `text` was printed; returns and forgets everything up to it."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.master], [], [], max(0.0, left))
            if not ready:
                raise AssertionError(f"{text!r} did not appear; seen: {self.seen!r}")
            try:
                data = os.read(self.master, 65_536)
            except OSError:  # EIO: the last process closed the terminal
                data = b""
            if not data:
                raise AssertionError(f"{text!r} did not appear before the end; seen: {self.seen!r}")
            self.seen += data.decode("utf-8", "replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def wait(self, timeout_s: float = 15.0) -> int:
        """The exit code as os.waitstatus_to_exitcode says it; drains the terminal meanwhile."""
        deadline = time.monotonic() + timeout_s
        while self._status is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"it does not end; seen: {self.seen!r}")
            ready, _, _ = select.select([self.master], [], [], 0.05)
            if ready:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.master, 65_536).decode("utf-8", "replace")
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def close(self) -> None:
        os.close(self.master)
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@contextlib.contextmanager
def terminal(
    argv: Sequence[str], *, cwd: str | None = None, environ: Mapping[str, str] | None = None
) -> Iterator[Terminal]:
    pid, master = pty.fork()
    if pid == 0:
        if cwd:
            os.chdir(cwd)
        os.execvpe(argv[0], list(argv), dict(os.environ if environ is None else environ))
    opened = Terminal(pid, master)
    try:
        opened.resize(24, 80)
        yield opened
    finally:
        opened.close()
