"""The inspector's half of `sidecar exec`: it asks the front to run the command, and ends what the command
leaves behind.

Two processes share the work. The *front* (`sidecar.front`) is the process that the caller's shell started; it
keeps the terminal, the process group, the descriptors and the signals, and is the parent of the command. The
*inspector* is forked off before anything else happens, into a session of its own. They speak over a socket
pair:

    inspector → front   Launch     argv, cgroup, identity, environment
    front → inspector   Started    the command's pid, or why it could not be run
    front → inspector   Ended      the command's exit status
    (either side gone)  end of file

Where the front dies, the command is ended: it may not go on unsteered. Where the inspector dies, the
command's connections are refused by the kernel. Once both have ended the front removes what the inspector
has left behind, whatever the reason.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from sidecar.errors import PrerequisiteError, SidecarError
from sidecar.front import SETUP_FAILED, Ended, Front, Launch, Message, Started, frame, say, take
from sidecar.invoking_user import InvokingUser, invoking_user
from sidecar.kernel import cgroups
from sidecar.kernel.run_state import RUN_DIRECTORY

__all__ = ["InvokingUser", "end_leftovers", "invoking_user", "launch", "split"]

LEFTOVER_GRACE_S: Final = 2.0
FRONT_LOST: Final = 128 + signal.SIGKILL
_POLL_S: Final = 0.05

_channel: socket.socket | None = None
"""The way to our front, once `split` has been called in this process."""


def split(instance: str | None = None) -> int | None:
    """Fork. In the inspector: returns None; go on, call `launch`, then exit. In the front: returns the exit
    status, once everything has ended and nothing of `instance` is left. To be called early, while there is
    one thread.
    """
    global _channel
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        ours.close()
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(2, 1)  # standard output belongs to the command
        _channel = theirs
        return None
    theirs.close()
    return Front(ours, pid, lambda job_cgroup: _undo(instance, job_cgroup)).run()


async def launch(
    argv: Sequence[str],
    *,
    job_cgroup: Path,
    user: InvokingUser,
    extra_env: Mapping[str, str],
    replaced_env: Mapping[str, str] | None = None,
) -> int:
    """Run the command in `job_cgroup` as `user` and wait for it; returns its exit status (125, 126, 127 as
    env(1)).

    `extra_env` is for variables that the person has not set, `replaced_env` for those that count before theirs.
    Cancelling ends the command. On return nothing is left in the cgroup.
    """
    channel, front_pid = (_channel, None) if _channel else _start_front()
    channel.setblocking(False)
    loop = asyncio.get_running_loop()
    environ = {**extra_env, **user.environ, **(replaced_env or {})}
    request = Launch(
        argv=[os.fsencode(part) for part in argv],
        cgroup=str(job_cgroup),
        uid=user.uid,
        gid=user.gid,
        groups=list(user.groups),
        environ={os.fsencode(key): os.fsencode(value) for key, value in environ.items()},
    )
    buffer = bytearray()
    started = False
    try:
        await loop.sock_sendall(channel, frame(request))
        while (message := await _receive(channel, buffer)) is not None:
            if isinstance(message, Started):
                if not message.pid:
                    return message.status
                started = True
            if isinstance(message, Ended):
                return message.status
        if started:
            say("the process that ran the command is gone")
        return FRONT_LOST
    except ConnectionError:
        return FRONT_LOST
    finally:
        if front_pid is not None:
            channel.close()
            await asyncio.to_thread(os.waitpid, front_pid, 0)
        await _end_leftovers(job_cgroup)


async def _receive(channel: socket.socket, buffer: bytearray) -> Message | None:
    loop = asyncio.get_running_loop()
    while (message := take(buffer)) is None:
        data = await loop.sock_recv(channel, 65_536)
        if not data:
            return None
        buffer += data
    return message


def _start_front() -> tuple[socket.socket, int]:
    """A front as our child, for callers that did not `split` (tests, and agents that embed us)."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        status = SETUP_FAILED
        try:
            status = Front(theirs, None).run()
        finally:
            os._exit(status)
    theirs.close()
    return ours, pid


def processes(cgroup: Path) -> list[int]:
    """All processes in a cgroup and below it."""
    found: list[int] = []
    for directory, _, _ in os.walk(cgroup):
        found += cgroups.processes(Path(directory))
    return sorted(set(found))


def end_leftovers(cgroup: Path) -> None:
    """End every process of the cgroup: SIGTERM, a grace, SIGKILL. Blocks for at most a few seconds."""
    for pause_s in _ending(cgroup):
        time.sleep(pause_s)


async def _end_leftovers(cgroup: Path) -> None:
    for pause_s in _ending(cgroup):
        await asyncio.sleep(pause_s)


def _ending(cgroup: Path) -> Iterator[float]:
    """The steps of ending, each a pause in seconds. What `docker run` does when the main process ends, with a
    grace: once `exec` has returned there is nobody to inspect what a process left behind would send."""
    left = processes(cgroup)
    if not left:
        return
    say(
        f"ending {len(left)} {'process' if len(left) == 1 else 'processes'} that the command left behind: "
        f"{_names(left)}"
    )
    deadline = time.monotonic() + LEFTOVER_GRACE_S
    for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process acts on nothing else
        _signal_all(left, number)
    while time.monotonic() < deadline:
        yield _POLL_S
        if not processes(cgroup):
            return
    deadline = time.monotonic() + LEFTOVER_GRACE_S
    while (left := processes(cgroup)) and time.monotonic() < deadline:
        _kill_cgroup(cgroup, left)
        yield _POLL_S
    if left:
        say(f"could not end {_names(left)}: they stay in {cgroup}, where their connections are refused")


def _kill_cgroup(cgroup: Path, left: list[int]) -> None:
    try:
        (cgroup / "cgroup.kill").write_text("1")  # Linux 5.14: also those that fork meanwhile
    except OSError:
        _signal_all(left, signal.SIGKILL)


def _signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _names(pids: list[int]) -> str:
    shown = []
    for pid in pids[:5]:
        try:
            shown.append(f"{Path(f'/proc/{pid}/comm').read_text().strip()} ({pid})")
        except OSError:
            shown.append(str(pid))
    return ", ".join(shown) + (f" and {len(pids) - 5} more" if len(pids) > 5 else "")


def _undo(instance: str | None, job_cgroup: Path | None) -> None:
    """The inspector has ended: what it has not undone, because it was killed or because a step of its ending
    failed, is undone here, by a process that is in none of its cgroups."""
    if job_cgroup is not None:
        end_leftovers(job_cgroup)
    if instance is None or not _is_left(instance):
        return
    try:
        from sidecar.kernel.steering import remove_all

        remove_all(instance)
    except (SidecarError, OSError) as error:
        say(f"kernel state of instance {instance} is left: {error}\nhint: sidecar down --instance {instance}")


def _is_left(instance: str) -> bool:
    """The state file is the first that an instance makes and the last that goes: without it, and without a
    cgroup, there is nothing. (Looking into the kernel itself would cost each `exec` the import of pyroute2.)"""
    try:
        return (RUN_DIRECTORY / instance).is_dir() or cgroups.instance_directory(instance).is_dir()
    except PrerequisiteError:
        return False  # no cgroup2 here: it did not start
