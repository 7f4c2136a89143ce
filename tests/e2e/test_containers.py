"""`sidecar run` beside a real Docker engine: what containers send over their bridges is steered, attributed to container and job, judged
and recorded; what goes another way is recorded as not inspected."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.audit.verify import verify
from tests.support.docker_host import IMAGE, DockerHost
from tests.support.far_host import FarHost
from tests.support.http_far import CUSTOMERS, HttpFar
from tests.support.steered_job import SIDECAR
from tests.support.tokens import SUBJECT, Issuer, new_key

pytestmark = [
    pytest.mark.root,
    pytest.mark.servers,
    pytest.mark.skipif(not shutil.which("dockerd"), reason="no dockerd"),
]

ISSUED = Issuer(keys=[new_key("key-1", "ES256")])
POLICY = """\
version: 1
default: allow
rules:
  - name: not-from-here
    when: {protocol: http, workload: {container: {labels: {trust: none}}}}
    deny: this container may not
  - name: api-pii
    when: {protocol: http, path: "/customers*"}
    mask: {json: {"$.customers[*].ssn": redact}}
"""
MASKED = json.dumps(CUSTOMERS).replace("123-45-6789", "[redacted]")


class Host:
    """One namespace that plays the host, with a Docker engine and an agent; a far host beside it."""

    def __init__(self, hosts: FarHost, docker: DockerHost, far: HttpFar, directory: Path) -> None:
        self.hosts, self.docker, self.far = hosts, docker, far
        self.audit = directory / "audit"
        (directory / "policy.yaml").write_text(POLICY)
        self.config = directory / "sidecar.yaml"
        self.config.write_text(
            f"steering: {{scope: {{cgroups: [/{docker.netns}]}}, ports: {{80: auto, 8080: http}}}}\n"
            f"policy: policy.yaml\naudit: {{directory: {self.audit}}}\n"
            f"attribution: {{engines: ['{docker.address}']}}\n" + ISSUED.configuration(ISSUED.jwks(directory))
        )
        self.log = directory / "log"
        self.agent: subprocess.Popen[str] | None = None

    def start(self) -> None:
        log = self.log.open("w")
        self.agent = self.hosts.popen(
            self.hosts.near, [SIDECAR, "run", "-c", str(self.config)], stdout=log, stderr=log
        )
        log.close()
        self.wait(lambda: "look at it with" in self.log.read_text(), 30)

    def stop(self) -> None:
        if self.agent is not None:
            self.agent.terminate()
            assert self.agent.wait(30) == 0, self.log.read_text()
            self.agent = None

    def wait(self, condition: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def wget(self, *options: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
        url = url or f"http://{self.hosts.far_address}/customers.json"
        return subprocess.run(
            ["docker", "-H", self.docker.address, "run", "--rm", *options, IMAGE, "wget", "-q", "-O", "-", url],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def records(self, kind: str) -> list[dict[str, Any]]:
        done = subprocess.run(
            [SIDECAR, "audit", "export", "--directory", str(self.audit)],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        return [row for line in done.stdout.splitlines() if (row := json.loads(line))["kind"] == kind]

    def opened(self, name: str) -> dict[str, Any]:
        (found,) = [
            row
            for row in self.records("open")
            if (row["workload"].get("container") or {}).get("name") == name
        ]
        return found


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with FarHost() as hosts, DockerHost(hosts.near) as docker, HttpFar(hosts) as far:
        running = Host(hosts, docker, far, tmp_path_factory.mktemp("agent"))
        try:
            running.start()
            yield running
        finally:
            running.stop()


def test_a_container_is_steered_and_named(host: Host) -> None:
    done = host.wget(
        "--name", "nightly", "--label", "com.docker.compose.project=reports", "-e", f"SIDECAR_ID_TOKEN={ISSUED.token()}",
        "-e", "GITHUB_ACTIONS=true", "-e", "GITHUB_REPOSITORY=acme/reports", "-e", "GITHUB_JOB=nightly", "-e", "GITHUB_ACTION=run2",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, MASKED), done.stderr + host.log.read_text()
    opened = host.opened("nightly")
    container = opened["workload"]["container"]
    assert container["image"] == IMAGE
    assert container["image_id"].startswith("sha256:")
    assert ["com.docker.compose.project", "reports"] in container["labels"]
    assert opened["principal"]["subject"] == SUBJECT
    assert opened["workload"]["ci"]["job"] == "nightly"
    assert opened["origin"]["comm"] == "wget"
    assert opened["target"]["address"] == host.hosts.far_address
    shown = subprocess.run(
        [SIDECAR, "audit", "show", opened["flow"], "--directory", str(host.audit)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for words in (IMAGE, "nightly", SUBJECT, "acme/reports", "job nightly", "step run2"):
        assert words in shown


def test_a_rule_on_labels(host: Host) -> None:
    before = len(host.far.nginx_log())
    done = host.wget("--label", "trust=none")
    assert "403" in done.stderr
    assert len(host.far.nginx_log()) == before


def test_a_network_that_was_made_while_the_agent_ran(host: Host) -> None:
    host.docker.docker("network", "create", "later")
    try:
        done = host.wget("--network", "later", "--name", "on-later")
        assert (done.returncode, done.stdout) == (0, MASKED), done.stderr
        assert host.opened("on-later")
    finally:
        host.docker.docker("network", "rm", "later")


def test_the_hosts_network(host: Host) -> None:
    done = host.wget("--network", "host", "--name", "on-host")
    assert (done.returncode, done.stdout) == (0, MASKED), done.stderr
    assert host.opened("on-host")["origin"]["comm"] == "wget"


def test_ipv6(host: Host) -> None:
    host.docker.docker("network", "create", "--ipv6", "--subnet", "fd77:1::/64", "six")
    try:
        url = f"http://[{host.hosts.far_address6}]:8080/customers"
        done = host.wget("--network", "six", "--name", "on-six", url=url)
        opened = host.opened("on-six")
        assert opened["target"]["address"] == host.hosts.far_address6
        assert opened["workload"]["container"]["name"] == "on-six"
        del done  # the ASGI program listens on IPv4 only: who was meant is what counts
    finally:
        host.docker.docker("network", "rm", "six")


@pytest.fixture
def neighbour(host: Host) -> Iterator[str]:
    """The address of a web server in a container of the default bridge."""
    server = host.docker.docker(
        "run", "-d", IMAGE, "sh", "-c", "echo hello > /tmp/x; exec httpd -f -p 80 -h /tmp"
    )
    try:
        yield host.docker.docker("inspect", "--format", "{{.NetworkSettings.IPAddress}}", server)
    finally:
        host.docker.docker("rm", "-f", server)


def set_bridge_netfilter(host: Host, value: int) -> None:
    done = host.hosts.run(host.hosts.near, ["sysctl", "-w", f"net.bridge.bridge-nf-call-iptables={value}"])
    assert done.returncode == 0, done.stderr


def test_a_neighbour_on_the_same_bridge(host: Host, neighbour: str) -> None:
    """With br_netfilter, as Docker sets it up, bridged packets come by as well."""
    set_bridge_netfilter(host, 1)
    done = host.wget("--name", "beside", url=f"http://{neighbour}/x")
    assert done.stdout == "hello\n", done.stderr
    assert host.opened("beside")["target"]["address"] == neighbour


def test_what_goes_another_way_is_recorded_as_not_inspected(host: Host, neighbour: str) -> None:
    """Without it they pass below the rules, and that nobody looked is said."""
    set_bridge_netfilter(host, 0)
    try:
        assert host.wget(url=f"http://{neighbour}/x").stdout == "hello\n"

        def told() -> bool:
            return any(
                row["reason"] == "foreign_netns"
                and "another way" in row["detail"]
                and neighbour in json.dumps(row)
                for row in host.records("gap")
            )

        host.wait(told, 15)
    finally:
        set_bridge_netfilter(host, 1)


def test_many_at_once(host: Host) -> None:
    """Every one of them is attributed to its own container."""
    names = [f"many-{number}" for number in range(12)]
    running = [
        subprocess.Popen(
            ["docker", "-H", host.docker.address, "run", "--rm", "--name", name, IMAGE, "sh", "-c",
             f"for i in 1 2 3 4 5; do wget -q -O - http://{host.hosts.far_address}/customers.json?n={name}-$i || exit 1; done"],
            stdout=subprocess.DEVNULL,
        )
        for name in names
    ]  # fmt: skip
    assert [process.wait(60) for process in running] == [0] * len(names)
    opened = {
        row["flow"]: (row["workload"].get("container") or {}).get("name") for row in host.records("open")
    }
    asked = [
        (opened[row["flow"]], row["operation"]["path"])
        for row in host.records("request")
        if "?n=many" in row["operation"]["path"]
    ]
    assert len(asked) == 5 * len(names)
    assert [pair for pair in asked if f"?n={pair[0]}-" not in pair[1]] == []


def test_nobody_gets_past_the_redirect_to_the_listener(host: Host) -> None:
    """The listener stands on all addresses for the bridges' sake; who was not redirected is reset."""
    port = json.loads(subprocess.run(
        ["nsenter", f"--net=/run/netns/{host.hosts.near}", "nft", "-j", "list", "ruleset"],
        capture_output=True, text=True, check=True,
    ).stdout)  # fmt: skip
    number = next(
        expression["redirect"]["port"]
        for row in port["nftables"]
        if "rule" in row and row["rule"]["table"].startswith("sidecar_")
        for expression in row["rule"]["expr"]
        if "redirect" in expression
    )
    code = f"import socket; socket.create_connection(('{host.hosts.near_address}', {number}), 5)"
    done = host.hosts.run(host.hosts.far, ["python3", "-c", code])
    assert "ConnectionRefusedError" in done.stderr


def test_closed_when_the_agent_is_killed_and_nothing_is_left_by_down(host: Host) -> None:
    assert host.agent is not None
    found = subprocess.run(
        ["pgrep", "-P", str(host.agent.pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    host.agent.kill()
    host.agent.wait()
    host.agent = None
    del found
    time.sleep(4)  # the heartbeat's time-out
    before = len(host.far.nginx_log())
    assert host.wget().returncode != 0
    assert len(host.far.nginx_log()) == before
    done = host.hosts.run(host.hosts.near, [SIDECAR, "down", "--dead"])
    assert done.returncode == 0, done.stderr
    assert host.wget().stdout == json.dumps(CUSTOMERS)
    assert verify(host.audit).ok
