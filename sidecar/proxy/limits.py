"""Bounds of a worker and of the supervisor's patience, each with its reason. Documented in docs/operations.md."""

from __future__ import annotations

from typing import Final

MAX_FLOWS_PER_WORKER: Final = 8192
"""Two descriptors a flow; beyond it a new client is reset (and recorded), never let through."""

LISTEN_BACKLOG: Final = 1024

RESOLVE_TIMEOUT_S: Final = 10.0
"""How long the worker waits for the supervisor to say who a client is."""

CONNECT_TIMEOUT_S: Final = 75.0
"""Upstream connect; longer than most clients wait, so that theirs decides."""

FIRST_BYTES_S: Final = 0.5
"""How long a client of an `auto` port may stay silent before the server is reached, because it may have to speak first."""

TLS_HANDSHAKE_TIMEOUT_S: Final = 20.0

WRITE_HIGH_WATER: Final = 256 * 1024
"""Bytes queued towards one side before the other side is no longer read."""

LINGER_S: Final = 2.0
"""After an error answer: how long unread client bytes are read off, so that a reset does not destroy the answer (as nginx)."""

FLUSH_S: Final = 30.0
"""How long a closed flow may take to flush what is queued; then it is cut."""

SPOOL_RETRY_S: Final = 0.25
SPOOL_SAY_S: Final = 0.5
"""How often a worker says that the spool takes none of its records."""
"""How often a blocked flow tries to append its record again."""

BEAT_INTERVAL_S: Final = 0.5
HEARTBEAT_TIMEOUT_S: Final = 3.0
"""So long after the last word of any worker the hooks refuse new connections. Six beats: a host that is merely busy misses a few."""

WORKER_SILENCE_S: Final = 6.0
"""A worker that has not beaten for so long is hung: killed and restarted. What waits in its backlog is its successor's. Later than the
heartbeat's end, because a statement of many megabytes keeps a worker busy, and killing it would break the flows of others."""

OVERSLEPT_S: Final = 1.0
"""A supervisor that wakes so much too late was hung itself (stopped, or the host was asleep), and must not take its workers for it."""

WORKER_START_S: Final = 30.0
RESTART_BACKOFF_S: Final = (0.1, 0.5, 1.0, 2.0, 5.0)

DRAIN_S: Final = 5.0
"""Graceful drain on stop, then flows are ended with their protocol's own error."""

HANGUP_POLL_S: Final = 0.5
"""How often a client that is not read (held, blocked) is looked at for hang-up."""

MAX_LINK_MESSAGE_BYTES: Final = 4 * 1024 * 1024
MAX_LINK_QUEUE: Final = 65_536
