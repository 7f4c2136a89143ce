"""Containers of a real Docker engine are described, also those that lived for a moment; an engine that is away or hangs delays nobody."""

from __future__ import annotations

import gc
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sidecar.attribution import docker_engine
from sidecar.attribution.docker_engine import ContainerEngine, ContainerEngines
from sidecar.attribution.resolver import Resolver
from sidecar.model.workload import Container
from tests.support.docker_host import IMAGE, DockerHost
from tests.support.job_process import seen

pytestmark = [
    pytest.mark.servers,
    pytest.mark.root,
    pytest.mark.skipif(not shutil.which("dockerd"), reason="no dockerd"),
]

SHORT_LIVED = 50


@pytest.fixture(scope="module")
def host() -> Iterator[DockerHost]:
    with DockerHost() as running:
        yield running


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Docker's library leaves closing the sockets of cut-off answers to the collector of garbage: now, and not in somebody else's test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def engine(host: DockerHost) -> Iterator[ContainerEngine]:
    watching = ContainerEngine(host.address)
    watching.start()
    wait_for(lambda: watching.error == "")
    yield watching
    watching.stop()


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.02)


@pytest.fixture
def sleeper(host: DockerHost) -> Iterator[str]:
    identifier = host.docker(
        "run", "-d", "--name", "reports", "--label", "team=data", "--label", "dsn=postgres://u:hunter2@db/x",
        "--label", "com.docker.compose.project=shop", IMAGE, "sleep", "60",
    )  # fmt: skip
    yield identifier
    host.docker("rm", "-f", identifier)


def test_what_an_engine_says(host: DockerHost, sleeper: str) -> None:
    """Asked without having been watched: the agent started after the container."""
    found = ContainerEngine(host.address).container(sleeper, 5.0)
    assert found is not None
    assert (found.id, found.name, found.image) == (sleeper, "reports", IMAGE)
    assert found.image_id == host.docker("inspect", "--format", "{{.Image}}", sleeper)
    labels = dict(found.labels)
    assert (labels["team"], labels["com.docker.compose.project"]) == ("data", "shop")
    assert "hunter2" not in repr(found)


def test_an_unknown_container_is_asked_for_once(host: DockerHost) -> None:
    asking = ContainerEngine(host.address)
    assert asking.container("0" * 64, 5.0) is None
    host.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert asking.container("0" * 64) is None
        assert time.monotonic() - began < 0.1
    finally:
        host.signal(signal.SIGCONT)


def test_a_process_in_a_container(host: DockerHost, engine: ContainerEngine, sleeper: str) -> None:
    engines = ContainerEngines((host.address,))
    pid = host.pid_of(sleeper)
    cgroup_id = host.cgroup_of(sleeper).stat().st_ino
    workload = Resolver(engines).resolve(seen(pid, cgroup_id=cgroup_id)).workload
    assert workload.kind == "container"
    assert workload.container is not None
    assert (workload.container.name, workload.container.image) == ("reports", IMAGE)


def test_short_lived_containers(host: DockerHost, engine: ContainerEngine) -> None:
    """Each is known by its cgroup's id after it has gone: what the kernel noted at the connect."""

    def live(number: int) -> tuple[str, int, str]:
        identifier = host.docker(
            "run", "-d", "--name", f"job-{number}", "--label", f"n={number}", IMAGE, "sleep", "2"
        )
        try:
            return identifier, host.cgroup_of(identifier).stat().st_ino, f"job-{number}"
        except FileNotFoundError:
            return identifier, 0, f"job-{number}"

    with ThreadPoolExecutor(4) as pool:
        lived = list(pool.map(live, range(SHORT_LIVED)))
    host.docker("wait", *(identifier for identifier, _, _ in lived))
    attributed = 0
    resolver = Resolver(_Only(engine))
    for identifier, cgroup_id, name in lived:
        found = engine.container(identifier, 0.0)
        assert found is not None
        assert (found.name, dict(found.labels)["n"]) == (name, name.removeprefix("job-"))
        if cgroup_id:
            gone = resolver.resolve(seen(2**22 + 1, cgroup_id=cgroup_id)).workload
            assert gone.container is not None
            assert gone.container.id == identifier
            attributed += 1
    assert attributed > SHORT_LIVED // 2, "too slow to look at them while they lived: nothing was shown"
    host.docker("rm", *(identifier for identifier, _, _ in lived))


class _Only:
    """One watched engine as the resolver wants all of them."""

    def __init__(self, engine: ContainerEngine) -> None:
        self._engine = engine

    def describe(self, container: Container) -> Container:
        return self._engine.container(container.id) or container

    def at_cgroup(self, cgroup_id: int) -> Container | None:
        return self._engine.at_cgroup(cgroup_id)


def test_removed_before_it_could_be_inspected(host: DockerHost, engine: ContainerEngine) -> None:
    identifier = host.docker("create", "--rm", "--name", "flash", "--label", "k=v", IMAGE, "true")
    host.docker("start", identifier)
    wait_for(lambda: engine.container(identifier, 0.0))
    found = engine.container(identifier, 0.0)
    assert found is not None
    assert (found.name, found.image, dict(found.labels)["k"]) == ("flash", IMAGE, "v")


def test_a_hanging_engine_delays_nobody(
    host: DockerHost, sleeper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_engine, "WAIT_S", 0.2)
    engines = ContainerEngines((host.address,))
    host.signal(signal.SIGSTOP)
    try:
        for _ in range(3):
            began = time.monotonic()
            assert engines.describe(Container(sleeper)) == Container(sleeper)
            assert time.monotonic() - began < 0.4
    finally:
        host.signal(signal.SIGCONT)
    wait_for(lambda: engines.describe(Container(sleeper)).name == "reports")


def test_an_engine_that_restarts(
    host: DockerHost, engine: ContainerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_engine, "RETRY_S", 0.1)
    host.stop()
    wait_for(lambda: engine.error != "")
    assert engine.container("1" * 64) is None
    host.start()
    identifier = host.docker("run", "-d", "--rm", "--name", "after", IMAGE, "sleep", "0.1")
    wait_for(lambda: engine.container(identifier, 0.0))


def test_a_host_without_an_engine(tmp_path: Path) -> None:
    engines = ContainerEngines((f"unix://{tmp_path}/docker.sock",))
    engines.start()
    began = time.monotonic()
    assert engines.describe(Container("a" * 64)) == Container("a" * 64)
    assert engines.at_cgroup(1) is None
    assert time.monotonic() - began < 0.1
    assert engines.problems() == ()
    engines.stop()


def test_what_answers_and_is_no_engine(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    listener = subprocess.Popen(
        ["python3", "-c", "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1])\ns.listen()\n"
         "while True:\n c, _ = s.accept()\n c.sendall(b'SSH-2.0-x\\r\\n')\n c.close()", str(path)]
    )  # fmt: skip
    try:
        wait_for(path.exists)
        engines = ContainerEngines((f"unix://{path}",))
        assert engines.describe(Container("a" * 64)) == Container("a" * 64)
        wait_for(lambda: any(str(path) in problem for problem in engines.problems()))
    finally:
        listener.kill()
        listener.wait()
