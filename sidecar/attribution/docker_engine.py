"""What container engines say about a container: name, image with digest, labels. The only module that speaks to them.

Podman answers the same protocol. Engines are watched from a thread each: what runs now, then every start, so that a container that
lived for a moment is still known by its cgroup's id when its connection is looked at. An engine that is not there, restarts or hangs
delays nobody: a look-up waits `WAIT_S` at most, and what could not be learnt stays empty, which policy takes for unknown.

Source: Docker Engine API v1.41, containers, images, events.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from pathlib import Path
from typing import Any, Final

import docker
import docker.errors
import requests

from sidecar.attribution import procfs
from sidecar.attribution.cgroup import mount_point, unified_path
from sidecar.attribution.redaction import redact_text
from sidecar.model.workload import Container

log = logging.getLogger(__name__)

WAIT_S: Final = 0.5
"""What a flow waits for an engine at most."""
ANSWER_S: Final = 5
"""What an engine may take for one answer; whoever asked has gone on long before."""
RETRY_S: Final = 2.0
"""Between attempts to reach an engine."""
MISS_S: Final = 5.0
"""How long an engine's "no such container" is believed."""
BRIDGE_NAME: Final = "com.docker.network.bridge.name"
MAX_KNOWN: Final = 8192
MAX_LABELS: Final = 256
MAX_TEXT_CHARS: Final = 256

_INTERFACE: Final = re.compile(r"[^\s/:]{1,15}")

_Broken = (docker.errors.DockerException, requests.exceptions.RequestException, OSError, ValueError)


class ContainerEngine:
    """One engine behind a unix socket. Thread-safe. `start` once; `stop` ends the watching."""

    def __init__(
        self,
        address: str,
        on_networks: Callable[[], None] = lambda: None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`address`: `unix:///run/docker.sock`. `on_networks` is called, in a thread of ours, when `bridges` may have changed."""
        self.address = address
        self.bridges: frozenset[str] = frozenset()
        """Interfaces of the host that its bridge networks come in by."""
        self.listed = threading.Event()
        """Set once `bridges` and what runs are known."""
        self._on_networks = on_networks
        self.error = "not reached yet"
        """Why it cannot be asked; empty while it can."""
        self._socket = Path(address.removeprefix("unix://"))
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[str, Container] = {}
        self._by_cgroup: dict[int, str] = {}
        self._misses: dict[str, float] = {}
        self._images: dict[str, str] = {}
        self._stopped = threading.Event()
        self._watched: docker.types.CancellableStream[Any] | None = None
        self._pool = ThreadPoolExecutor(4, "engine")
        self._asking: dict[str, Any] = {}

    @property
    def is_there(self) -> bool:
        """Whether its socket exists: a host without this engine is no problem."""
        return self._socket.exists()

    def start(self) -> None:
        threading.Thread(target=self._watch, name="engine-events", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        watched = self._watched
        if watched is not None:
            watched.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def container(self, identifier: str, wait_s: float = WAIT_S) -> Container | None:
        """By its 64 hex digits. None where it is not this engine's, or the engine does not answer in `wait_s`."""
        known = self._known.get(identifier)
        if known is not None:
            return known
        if self._misses.get(identifier, -1e12) > self._clock() or not self.is_there or self._stopped.is_set():
            return None
        with self._lock:
            asked = self._asking.get(identifier)
            if asked is None:
                if len(self._asking) >= MAX_KNOWN:
                    return None
                asked = self._asking[identifier] = self._pool.submit(self._ask, identifier)
        try:
            found: Container | None = asked.result(wait_s)
        except (LateError, RuntimeError):
            return None
        return found

    def at_cgroup(self, cgroup_id: int) -> Container | None:
        """Whose cgroup it was, also after it has gone."""
        identifier = self._by_cgroup.get(cgroup_id)
        return self._known.get(identifier) if identifier else None

    # -- asking

    def _client(self) -> docker.APIClient:
        return docker.APIClient(base_url=self.address, timeout=ANSWER_S, version="auto")

    def _ask(self, identifier: str) -> Container | None:
        try:
            client = self._client()
            try:
                return self._inspect(client, identifier)
            finally:
                client.close()
        except docker.errors.NotFound:
            self._keep(self._misses, identifier, self._clock() + MISS_S)
            return None
        except _Broken as error:
            self._failed(error)
            self._keep(self._misses, identifier, self._clock() + RETRY_S)
            return None
        finally:
            with self._lock:
                self._asking.pop(identifier, None)

    def _inspect(self, client: docker.APIClient, identifier: str) -> Container:
        """Remembers it, with its cgroup where it runs."""
        answer = client.inspect_container(identifier)
        config, state = _mapping(answer.get("Config")), _mapping(answer.get("State"))
        image_id = _text(answer.get("Image"))
        container = Container(
            id=_text(answer.get("Id")) or identifier,
            name=_text(answer.get("Name")).removeprefix("/"),
            image=_text(config.get("Image")),
            labels=_labels(config.get("Labels")),
            image_id=image_id,
            image_digest=self._digest(client, image_id),
        )
        self._remember(container, state.get("Pid"))
        return container

    def _digest(self, client: docker.APIClient, image_id: str) -> str:
        """The digest under which the image was pulled; empty for one that was built here."""
        if not image_id:
            return ""
        known = self._images.get(image_id)
        if known is None:
            try:
                image = client.inspect_image(image_id)  # type: ignore[no-untyped-call]
                listed = image.get("RepoDigests") or [""]
                known = _text(listed[0])
            except docker.errors.NotFound:  # removed while its container runs
                known = ""
            self._keep(self._images, image_id, known)
        return known

    def _remember(self, container: Container, pid: object) -> None:
        self._keep(self._known, container.id, container)
        self._misses.pop(container.id, None)
        cgroup_id = _cgroup_id(pid, container.id) if isinstance(pid, int) and pid > 0 else 0
        if cgroup_id:
            self._keep(self._by_cgroup, cgroup_id, container.id)

    def _keep(self, kept: dict[Any, Any], key: object, value: object) -> None:
        with self._lock:
            kept.pop(key, None)
            while len(kept) >= MAX_KNOWN:
                del kept[next(iter(kept))]
            kept[key] = value

    # -- watching

    def _watch(self) -> None:
        while not self._stopped.is_set():
            if self.is_there:
                try:
                    self._watch_once()
                except _Broken as error:
                    self._failed(error)
            else:
                self.error = f"{self._socket} does not exist"
            self._stopped.wait(RETRY_S)

    def _watch_once(self) -> None:
        client = self._client()
        try:
            since = int(time.time()) - 1
            self._list_networks(client)
            self.listed.set()
            for listed in client.containers():
                self._seen(client, _text(listed.get("Id")))
            self.error = ""
            self._watched = client.events(
                since=since,
                decode=True,
                filters={"type": ["container", "network"], "event": ["start", "rename", "create", "destroy"]},
            )
            for event in self._watched:
                actor = _mapping(event.get("Actor"))
                if event.get("Type") == "network":
                    self._list_networks(client)
                    continue
                if event.get("Action") == "start":
                    self._first_word(_text(actor.get("ID")), _mapping(actor.get("Attributes")))
                self._seen(client, _text(actor.get("ID")))
        finally:
            watched, self._watched = self._watched, None
            if watched is not None:
                with contextlib.suppress(*_Broken):
                    watched.close()
            client.close()

    def _list_networks(self, client: docker.APIClient) -> None:
        found = set()
        for network in client.networks(filters={"driver": ["bridge"]}):
            options = _mapping(network.get("Options"))
            name = _text(options.get(BRIDGE_NAME)) or "br-" + _text(network.get("Id"))[:12]
            if _INTERFACE.fullmatch(name):
                found.add(name)
        if found != self.bridges:
            self.bridges = frozenset(found)
            self._on_networks()

    def _first_word(self, identifier: str, attributes: Mapping[str, object]) -> None:
        """What the event itself says: the container may be gone before it can be inspected."""
        if not identifier or identifier in self._known:
            return
        labels = {name: value for name, value in attributes.items() if name not in ("image", "name")}
        self._remember(
            Container(
                identifier, _text(attributes.get("name")), _text(attributes.get("image")), _labels(labels)
            ),
            None,
        )

    def _seen(self, client: docker.APIClient, identifier: str) -> None:
        try:
            self._inspect(client, identifier)
        except docker.errors.NotFound:
            return  # it has gone again, and what the event said stays

    def _failed(self, error: Exception) -> None:
        said = f"{type(error).__name__}: {error}"[:MAX_TEXT_CHARS]
        if said != self.error and not self._stopped.is_set():
            log.warning("the container engine at %s cannot be asked: %s", self.address, said)
        self.error = said


class ContainerEngines:
    """All engines of the host."""

    def __init__(self, addresses: tuple[str, ...], on_networks: Callable[[], None] = lambda: None) -> None:
        """`on_networks` is called, in a thread of ours, when `bridges` may have changed."""
        self._engines = tuple(ContainerEngine(address, on_networks) for address in addresses)

    @property
    def bridges(self) -> frozenset[str]:
        """Interfaces of the host that containers' packets come in by."""
        return frozenset().union(*(engine.bridges for engine in self._engines))

    def wait(self, seconds: float) -> None:
        """Until every engine that is there has said what its networks are."""
        deadline = time.monotonic() + seconds
        for engine in self._engines:
            if engine.is_there:
                engine.listed.wait(max(0.0, deadline - time.monotonic()))

    def start(self) -> None:
        for engine in self._engines:
            engine.start()

    def stop(self) -> None:
        for engine in self._engines:
            engine.stop()

    def describe(self, container: Container) -> Container:
        """With name, image and labels, where an engine knows it; else as it is."""
        deadline = time.monotonic() + WAIT_S
        for engine in self._engines:
            found = engine.container(container.id, max(0.0, deadline - time.monotonic()))
            if found is not None:
                return found
        return container

    def at_cgroup(self, cgroup_id: int) -> Container | None:
        return next((found for engine in self._engines if (found := engine.at_cgroup(cgroup_id))), None)

    def problems(self) -> tuple[str, ...]:
        """Of engines that are there and cannot be asked. For `status`."""
        return tuple(
            f"{engine.address}: {engine.error}"
            for engine in self._engines
            if engine.is_there and engine.error
        )


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    if not isinstance(value, str):
        return ""
    return "".join(char if char.isprintable() else "?" for char in value[:MAX_TEXT_CHARS])


def _labels(value: object) -> tuple[tuple[str, str], ...]:
    """The first `MAX_LABELS` by name, without what looks like a secret."""
    labels = sorted((_text(name), _text(text)) for name, text in _mapping(value).items())
    return tuple((name, redact_text(text)) for name, text in labels[:MAX_LABELS])


def _cgroup_id(pid: int, identifier: str) -> int:
    """The id of the cgroup that the container's first process is in, where its path names the container; 0 where it has gone."""
    path, mount = unified_path(procfs.cgroup_text(pid)), mount_point()
    if identifier not in path or mount is None:
        return 0
    try:
        return os.stat(f"{mount}{path}").st_ino
    except OSError:
        return 0
