"""Finding and removing what instances have left in the kernel: hooks, tables, cgroups, entries of the shared map.

The order fails closed: what is left of a job is ended, or what its instance owned is first given up, so that an agent at the root
covers it again; then its hooks go, the guard last.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from sidecar.kernel import cgroups, maps, nft
from sidecar.kernel.run_state import (
    OWNERS_PIN,
    RUN_DIRECTORY,
    alive,
    clear,
    forget,
    run_directories,
    states,
    unmount_if_unused,
)

CONTROL_SOCKET = "control.sock"


def _recorded(state: dict[str, object]) -> list[tuple[str, Path, int]]:
    rows = state.get("attached")
    return (
        [(str(hook), Path(cgroup), int(number)) for hook, cgroup, number in rows]
        if isinstance(rows, list)
        else []
    )


def _remaining(state: dict[str, object]) -> list[tuple[str, Path, int]]:
    """Attachments of a recorded instance that still stand."""
    return [
        (hook, cgroup, number)
        for hook, cgroup, number in _recorded(state)
        if hook in maps.ATTACH_TYPES and number in maps.attached_ids(cgroup, maps.ATTACH_TYPES[hook])
    ]


def traces(instance: str | None = None) -> list[str]:
    """What is left in the kernel of this or of any instance: hooks, tables, cgroups."""
    found = []
    for name, state in states().items():
        if instance in (None, name):
            found += [
                f"hook {hook} at {cgroup} (program {number})" for hook, cgroup, number in _remaining(state)
            ]
    if instance is None:
        found += [f"hook {hook} at {cgroup} (program {number})" for hook, cgroup, number in _stray_hooks()]
    found += [
        f"table inet {name}" for name in nft.tables() if instance in (None, name.removeprefix(nft.PREFIX))
    ]
    found += [
        f"cgroup {cgroups.instance_directory(name)}"
        for name in cgroups.instances()
        if instance in (None, name)
    ]
    return found


def _stray_hooks() -> list[tuple[str, Path, int]]:
    """Hooks of ours that no state file names (somebody emptied /run): found by the programs' names in the whole hierarchy."""
    found = []
    for directory, _, _ in os.walk(cgroups.cgroup2_mount()):
        for hook, attach_type in maps.ATTACH_TYPES.items():
            for program_id in maps.attached_ids(Path(directory), attach_type):
                if _is_ours(program_id, hook):
                    found.append((hook, Path(directory), program_id))
    # Read last: an instance that starts meanwhile writes its state before it attaches.
    known = {number for state in states().values() for _, _, number in _recorded(state)}
    return [row for row in found if row[2] not in known]


def _is_ours(program_id: int, hook: str) -> bool:
    program = maps.program_fd(program_id)
    if program is None:
        return False
    try:
        return maps.program_info(program)[1] == hook[:15]
    finally:
        os.close(program)


def _detach(rows: list[tuple[str, Path, int]]) -> list[str]:
    removed = []
    for hook, cgroup, program_id in sorted(rows, key=lambda row: row[0] == "sidecar_egress"):
        program = maps.program_fd(program_id)
        if program is None:
            continue
        try:
            if maps.detach(program, cgroup, maps.ATTACH_TYPES[hook]):
                removed.append(f"hook {hook} at {cgroup}")
        finally:
            os.close(program)
    return removed


def _give_up(state: dict[str, object]) -> None:
    owners = maps.pinned(OWNERS_PIN)
    if owners is None:
        return
    try:
        rows = state.get("owned")
        for identifier in rows if isinstance(rows, list) else []:
            maps.delete(owners, ctypes.c_uint64(identifier))
    finally:
        os.close(owners)


def _root_is_steered(*, but: str) -> bool:
    """Whether a live instance covers every process of the host."""
    root = cgroups.cgroup2_mount()
    return any(
        cgroup == root and not hook.startswith("sidecar_bind")
        for instance, state in states().items()
        if instance != but and alive(state)
        for hook, cgroup, _ in _remaining(state)
    )


def _remove(instance: str, state: dict[str, object]) -> list[str]:
    cgroups.end_inspector(instance)  # a hung one would attach its hooks again when it wakes
    covered = _root_is_steered(but=instance)
    if not covered:
        cgroups.end_job(instance)
    _give_up(state)
    removed = _detach(_remaining(state))
    if nft.delete(nft.table_name(instance)):
        removed.append(f"table inet {nft.table_name(instance)}")
    removed += cgroups.remove(instance, job_covered=covered)
    _clear_run_directory(instance)
    return removed


def _clear_run_directory(instance: str) -> None:
    (RUN_DIRECTORY / instance / CONTROL_SOCKET).unlink(missing_ok=True)
    forget(instance)


def remove_dead(*, except_for: str, covered: tuple[Path, ...]) -> list[str]:
    """Remove what instances whose supervisor is gone have left; called after our own hooks stand.

    Only where nobody loses his steering by that: the dead one's scope lies within `covered` (the caller's own), or no process is
    left in it. Else its hooks go on refusing, until `sidecar down`: a job must not get past because another one begins.
    Instances of another network namespace keep their table there: only their hooks can be removed from here.
    """
    removed = []
    for instance, state in states().items():
        if instance == except_for or alive(state):
            continue
        scopes = {cgroup for hook, cgroup, _ in _remaining(state) if not hook.startswith("sidecar_bind")}
        if all(
            any(scope.is_relative_to(ours) for ours in covered) or not cgroups.populated(scope)
            for scope in scopes
        ):
            removed += _remove(instance, state)
    return removed


def has_ended(instance: str) -> bool:
    """Whether nobody runs or starts this instance: what it has left may go."""
    state = states().get(instance)
    if state is None:  # its state is the first that it writes; somebody may have emptied /run
        return not cgroups.processes(cgroups.instance_directory(instance) / "inspector")
    return not alive(state)


def known_instances() -> list[str]:
    """All that have left anything under their name, live or dead."""
    return sorted({*run_directories(), *cgroups.instances()})


def remove_all(instance: str | None = None, *, ended_only: bool = False) -> list[str]:
    """`sidecar down`: remove every trace of `instance`, or of all, or of all that have ended. Idempotent; also after SIGKILL. Names
    what it removed.

    Live supervisors are asked to stop first by the caller; one that does not answer is killed here.
    """

    def wanted(name: str) -> bool:
        return name == instance if instance is not None else not ended_only or has_ended(name)

    removed = []
    for name, state in states().items():
        if wanted(name):
            removed += _remove(name, state)
    if instance is None:
        removed += _detach(_stray_hooks())
    for name in nft.tables():
        if wanted(name.removeprefix(nft.PREFIX)) and nft.delete(name):
            removed.append(f"table inet {name}")
    for name in cgroups.instances():
        if wanted(name):
            removed += cgroups.remove(name)
    for name in run_directories():  # of those that crashed before they wrote who they are
        if wanted(name) and name not in states():
            (RUN_DIRECTORY / name / CONTROL_SOCKET).unlink(missing_ok=True)
            clear(name)
    unmount_if_unused()
    return removed
