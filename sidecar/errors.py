"""Every error that Sidecar raises on purpose, in one shallow tree.

    SidecarError
    ├── ConfigurationError    a document (configuration or policy) is wrong         exit 2
    ├── PrerequisiteError     the host lacks something that was asked for            exit 3
    ├── SteeringError         the kernel refused, or is not in the state we wrote    exit 3
    ├── ProtocolError         the peer broke its own protocol; ends that flow
    ├── LimitExceeded         a named limit was passed; ends that flow
    ├── IdentityError         a token was not accepted; carries a closed reason
    ├── AuditError            a record could not be stored, or a chain does not hold
    ├── TrustError            the local authority or a trust store is not as it has to be   exit 3
    └── ControlError          the control socket refused or could not be reached
        └── NotAllowedError   it knows who asks, and that takes somebody else        exit 3

A message says what failed and on what; `hint` says what to do. Payloads, tokens and
credentials never enter a message.
"""

from __future__ import annotations


class SidecarError(Exception):
    """Base of all errors raised on purpose. `hint` is one sentence for the person who reads it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigurationError(SidecarError):
    """A document is wrong. `file`, `line` (from 1) and `path` (dotted) locate it."""

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        line: int | None = None,
        path: str | None = None,
        hint: str | None = None,
    ) -> None:
        place = f"{file}:{line}: " if file and line else f"{file}: " if file else ""
        super().__init__(f"{place}{message}", hint=hint)
        self.file = file
        self.line = line
        self.path = path


class PrerequisiteError(SidecarError):
    """The host lacks something; `hint` carries the command that mends it."""

    exit_code = 3


class SteeringError(SidecarError):
    """The kernel refused a hook or a rule, or does not hold what we wrote."""

    exit_code = 3


class ProtocolError(SidecarError):
    """The peer broke its protocol. Ends the flow with that protocol's own error; never the worker."""


class LimitExceeded(SidecarError):
    """A named, bounded limit was passed. `limit` is its name, `value` its bound."""

    def __init__(self, message: str, *, limit: str, value: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.limit = limit
        self.value = value


class IdentityError(SidecarError):
    """A token was not accepted. `reason` is one word of a closed vocabulary (see identity.verify)."""

    def __init__(self, message: str, *, reason: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class AuditError(SidecarError):
    """A record could not be stored, or a chain, signature or receipt does not hold."""


class TrustError(SidecarError):
    """The local authority's files, or a trust store, are not as they have to be, or a name cannot have a certificate."""

    exit_code = 3


class ControlError(SidecarError):
    """The control socket refused the request or no agent answered."""


class NotAllowedError(ControlError):
    """The agent answered, and whoever asks may not have that: root or another person may. Says nothing of what was asked for."""

    exit_code = 3
