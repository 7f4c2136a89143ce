"""What the sessions of one worker know together of a database's definitions: that they changed, and who is changing them now.

A session judges by its own snapshot of the catalog (postgres_catalog). It is made void by
    a definition that passes through any session of the worker: from when it is sent until its transaction has ended, the others take
    what it names for doubtful; then they read the catalog anew;
    a definition that did not pass here (another worker, another host, a function): found by the catalog's fingerprint, which one of
    the sessions asks for before a statement, at most once in CHECK_NS for all of them.
What is left: a statement may be judged by definitions that were replaced elsewhere up to CHECK_NS ago, or, inside a transaction, since
it began, because nothing of ours can be asked there.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

from sidecar.model.flow import Address
from sidecar.model.verdict import CatalogChanges

CHECK_NS: Final = 1_000_000_000
LOG_MAX: Final = 256
"""Changes that are remembered for sessions that have not looked since; to one that missed some, everything is doubtful."""
NEVER_NS: Final = 2**63 - 1
DATABASES_MAX: Final = 1024
"""Databases without a session are forgotten beyond."""
_NOTHING: Final = CatalogChanges()


class Gate(Protocol):
    """A session's lane: it takes nothing from this time on."""

    until_ns: int


class Definitions:
    """Of one database."""

    def __init__(self) -> None:
        self.version = 0
        """Counts changes, begun or ended."""
        self.fingerprint = ""
        """Of the catalog, as it was seen last by any session."""
        self.checked_ns = 0
        self.gates: dict[int, Gate | None] = {}
        """By session."""
        self._log: deque[tuple[int, CatalogChanges]] = deque(maxlen=LOG_MAX)
        self._open: dict[int, list[CatalogChanges]] = {}

    def leave(self, session: int) -> None:
        self.end(session)
        self.gates.pop(session, None)

    def begin(self, session: int, changes: CatalogChanges) -> None:
        """A definition is sent."""
        self._open.setdefault(session, []).append(changes)
        self._changed(changes)

    def end(self, session: int) -> None:
        """The transaction with its definitions is over, whatever became of it."""
        if self._open.pop(session, None) is not None:
            self._changed(_NOTHING)

    def seen(self, fingerprint: str, asked_ns: int) -> None:
        """What the server answered to a question that was sent at `asked_ns`."""
        self.checked_ns = max(self.checked_ns, asked_ns)
        if fingerprint != self.fingerprint:
            if self.fingerprint:
                self._changed(_NOTHING)
            self.fingerprint = fingerprint

    def since(self, version: int) -> list[CatalogChanges]:
        """What began after `version`."""
        if self._log and version + 1 < self._log[0][0]:
            return [CatalogChanges(anything=True)]
        return [changes for at, changes in self._log if at > version]

    def open_elsewhere(self, session: int) -> list[CatalogChanges]:
        """What other sessions are changing: a snapshot of now shows it not yet, or not for certain."""
        return [item for key, changes in self._open.items() if key != session for item in changes]

    def _changed(self, changes: CatalogChanges) -> None:
        self.version += 1
        self._log.append((self.version, changes))
        for gate in self.gates.values():
            if gate is not None:
                gate.until_ns = 0


class Databases:
    """Of one worker."""

    def __init__(self) -> None:
        self._known: dict[tuple[Address, str], Definitions] = {}

    def of(self, address: Address, database: str) -> Definitions:
        found = self._known.get((address, database))
        if found is None:
            if len(self._known) >= DATABASES_MAX:
                self._known = {key: item for key, item in self._known.items() if item.gates}
            found = self._known[address, database] = Definitions()
        return found
