"""The policy document in force: loaded at start, reloaded on change and on SIGHUP; a broken file keeps the old one and says so."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.errors import ConfigurationError
from sidecar.policy import Policy, builtin_policy, load_policy
from sidecar.proxy.link import PolicyText

log = logging.getLogger(__name__)

MAX_POLICY_BYTES: Final = 1024 * 1024
BUILTIN_NAME: Final = "(built-in: allow everything, record everything)"


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What `status` shows. `error` is set while the file on disk is broken and an older revision is in force."""

    file: str
    revision: str
    loaded_ns: int
    error: str | None


class PolicySource:
    """Owns the file. `load` and `poll` read it; both are quick (one stat, one read)."""

    def __init__(self, path: Path | None, *, hash_key: bytes | None, upstream: bool) -> None:
        self._path = path
        self._hash_key = hash_key
        self._upstream = upstream
        self._text: str | None = None
        self._seen: tuple[int, int, int] | None = None
        self._error: str | None = None
        self._loaded_ns = 0
        self.policy: Policy = builtin_policy()

    def load(self) -> None:
        """First load. Raises ConfigurationError with file and line where the document is wrong or cannot be read."""
        self._loaded_ns = time.time_ns()
        if self._path is None:
            return
        text = self._read()
        self.policy = self._compile(text)
        self._text = text

    def poll(self, *, force: bool = False) -> bool:
        """True where a new revision came into force. A broken file changes nothing but `state().error`."""
        if self._path is None:
            return False
        try:
            seen = self._stat()
            if seen == self._seen and not force:
                return False
            text = self._read()
            if text == self._text:
                self._error = None
                return False
            policy = self._compile(text)
        except ConfigurationError as error:
            message = str(error)
            if message != self._error:
                log.error(
                    "policy not reloaded, revision %s stays in force: %s", self.policy.revision, message
                )
            self._error = message
            return False
        self._error = None
        self._text = text
        self.policy = policy
        self._loaded_ns = time.time_ns()
        log.info("policy %s: revision %s in force", self._path, policy.revision)
        return True

    def message(self) -> PolicyText:
        """What workers compile."""
        return PolicyText(
            text=self._text,
            file=str(self._path) if self._path else BUILTIN_NAME,
            revision=self.policy.revision,
            hash_key=self._hash_key,
            upstream=self._upstream,
        )

    def state(self) -> PolicyState:
        return PolicyState(
            file=str(self._path) if self._path else BUILTIN_NAME,
            revision=self.policy.revision,
            loaded_ns=self._loaded_ns,
            error=self._error,
        )

    def _compile(self, text: str) -> Policy:
        return load_policy(
            text, str(self._path), hash_key=self._hash_key, upstream=self._upstream, now_ns=time.time_ns
        )

    def _stat(self) -> tuple[int, int, int]:
        assert self._path is not None
        try:
            facts = os.stat(self._path)
        except OSError as error:
            raise ConfigurationError(
                f"the policy cannot be read: {error.strerror}",
                file=str(self._path),
                hint="`policy:` is relative to the configuration file",
            ) from error
        return facts.st_mtime_ns, facts.st_ino, facts.st_size

    def _read(self) -> str:
        assert self._path is not None
        self._seen = self._stat()
        if self._seen[2] > MAX_POLICY_BYTES:
            raise ConfigurationError(
                f"the policy is larger than {MAX_POLICY_BYTES} bytes", file=str(self._path)
            )
        try:
            return self._path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(
                f"the policy cannot be read: {error.strerror}",
                file=str(self._path),
                hint="`policy:` is relative to the configuration file",
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                "the policy is no UTF-8 text",
                file=str(self._path),
                line=error.object.count(b"\n", 0, error.start) + 1,
                hint="save it as UTF-8",
            ) from error
