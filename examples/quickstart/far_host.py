"""A far host on this machine: a network namespace behind a veth pair, with PostgreSQL and the shop's API.

Nothing of the machine is changed but for the veth's near end; names are known only where `hosts_file` is
mounted over /etc/hosts in a private mount namespace (see `seen_from_here`). `remove` undoes everything, also
what half came up.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FAR = HERE.parent / "far-host"
DATABASE_NAME = "db.shop.internal"
API_NAME = "api.shop.internal"
DATABASE_PORT = 5432
API_PORT = 8080
USER = "reports"
START_TIMEOUT_S = 120.0  # a guest without hardware virtualisation needs its time
NAMESPACE_PREFIX = "sidecar-far-"


class FarHostError(Exception):
    """The far host could not be set up; the message is for the person at the terminal."""


def run(*argv: str, **options: object) -> str:
    """Run to the end; its standard output. Raises FarHostError with what it said."""
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **options
    )  # type: ignore[call-overload]
    if done.returncode != 0:
        raise FarHostError(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")
    return str(done.stdout)


class FarHost:
    """`state` is a directory of our own; `jwks_file` lets the API check who posts to it."""

    def __init__(self, state: Path, jwks_file: Path) -> None:
        self.tag = secrets.token_hex(3)
        self.namespace = NAMESPACE_PREFIX + self.tag
        self.near, self.far = f"scq{self.tag}n", f"scq{self.tag}f"
        self.state = state / "far-host"
        self.jwks_file = jwks_file
        self.password = secrets.token_urlsafe(12)
        self.hosts_file = state / "hosts"
        self.address = ""
        self.server_log = self.state / "postgresql.log"
        self._database: subprocess.Popen[bytes] | None = None
        self._api: subprocess.Popen[bytes] | None = None

    # -- up

    def start(self) -> None:
        self._connect_network()
        self._make_database()
        self._database = self._spawn(
            [*self._as_postgres(), "--", str(_postgres_bin() / "postgres"), "-D", str(self.state / "data")],
            self.server_log,
        )
        self._wait_for(DATABASE_PORT, self._database, self.server_log)
        self._superuser("-d", "postgres", "-c", f"CREATE ROLE {USER} LOGIN PASSWORD '{self.password}'")
        self._superuser("-d", "postgres", "-c", "CREATE DATABASE shop")
        self.reset()
        names = f"{self.address} {DATABASE_NAME} {API_NAME}\n"
        self.hosts_file.write_text(Path("/etc/hosts").read_text() + names)

    def reset(self) -> None:
        """The shop as it was before the report: tables loaded again, the API started again."""
        self._superuser("-d", "shop", "-f", str(FAR / "schema.sql"))
        self._stop(self._api, signal.SIGTERM)
        log = self.state / "api.log"
        self._api = self._spawn(
            [
                "setpriv",
                "--pdeathsig=TERM",
                "--",
                sys.executable,
                str(FAR / "api.py"),
                self.address,
                str(API_PORT),
                str(self.jwks_file),
            ],
            log,
        )
        self._wait_for(API_PORT, self._api, log)

    def application_name(self) -> str:
        """As what the server knew whoever last changed data."""
        lines = self.server_log.read_text(errors="replace").splitlines()
        changes = [line for line in lines if " | LOG:  " in line and "DELETE FROM customers" in line]
        return changes[-1].partition(" | ")[0] if changes else ""

    def _connect_network(self) -> None:
        (self.state.parent / "namespace").write_text(self.namespace)
        run("ip", "netns", "add", self.namespace)
        subnet = _free_subnet()
        self.address = f"{subnet}.2"
        run("ip", "link", "add", self.near, "type", "veth", "peer", "name", self.far, "netns", self.namespace)
        run("ip", "address", "add", f"{subnet}.1/24", "dev", self.near)
        run("ip", "link", "set", self.near, "up")
        inside = ("ip", "-n", self.namespace)
        run(*inside, "address", "add", f"{self.address}/24", "dev", self.far)
        run(*inside, "link", "set", self.far, "up")
        run(*inside, "link", "set", "lo", "up")

    def _make_database(self) -> None:
        self.state.mkdir()
        os.chown(self.state, pwd.getpwnam("postgres").pw_uid, -1)
        initdb = str(_postgres_bin() / "initdb")
        settings = [
            "--no-sync",
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
        ]
        run(*self._as_postgres(), "--", initdb, "-D", str(self.state / "data"), *settings, cwd="/")
        with (self.state / "data" / "postgresql.conf").open("a") as conf:
            conf.write(
                f"listen_addresses = '{self.address}'\nport = {DATABASE_PORT}\n"
                f"unix_socket_directories = '{self.state}'\nfsync = off\nshared_buffers = 32MB\n"
                "log_line_prefix = '%a | '\nlog_statement = 'mod'\n"
            )
        with (self.state / "data" / "pg_hba.conf").open("a") as hba:
            hba.write("host all all 10.77.0.0/16 scram-sha-256\n")

    def _as_postgres(self) -> list[str]:
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--pdeathsig=INT"]

    def _superuser(self, *arguments: str) -> None:
        tool = str(_postgres_bin() / "psql")
        run(tool, "-X", "-q", "-h", str(self.state), "-U", "postgres", "-v", "ON_ERROR_STOP=1", *arguments)

    def _spawn(self, argv: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,  # Ctrl-C is for us to act on
            )

    def _wait_for(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                socket.create_connection((self.address, port), timeout=1.0).close()
                return
            except OSError:
                time.sleep(0.05)
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise FarHostError(f"nothing listens on {self.address}:{port}: {tail}")

    # -- for the report

    def environment(self) -> dict[str, str]:
        """What the job's environment holds since ever."""
        return {
            "PGHOST": DATABASE_NAME,
            "PGDATABASE": "shop",
            "PGUSER": USER,
            "PGPASSWORD": self.password,
            "SHOP_API": f"http://{API_NAME}:{API_PORT}",
            "PYTHON": sys.executable,
        }

    def seen_from_here(self, argv: list[str]) -> list[str]:
        """The command, run where the far host's names resolve."""
        script = 'mount --bind "$0" /etc/hosts && exec "$@"'
        return [
            "unshare",
            "--mount",
            "--propagation",
            "slave",
            "sh",
            "-c",
            script,
            str(self.hosts_file),
            *argv,
        ]

    # -- down

    def remove(self) -> None:
        self._stop(self._api, signal.SIGTERM)
        self._stop(self._database, signal.SIGINT)
        remove_namespace(self.namespace)
        shutil.rmtree(self.state, ignore_errors=True)

    def _stop(self, process: subprocess.Popen[bytes] | None, number: signal.Signals) -> None:
        if process is None or process.poll() is not None:
            return
        process.send_signal(number)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def remove_namespace(name: str) -> None:
    """Also ends the veth pair, whose far end lives there."""
    if Path("/run/netns", name).exists():
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _postgres_bin() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]))
    if not found:
        raise FarHostError("PostgreSQL is not installed: scripts/setup --quickstart")
    return found[-1].parent


def _free_subnet() -> str:
    """A 10.77.n that no interface of this machine uses."""
    used = run("ip", "-4", "-o", "address", "show")
    free = [f"10.77.{n}" for n in range(1, 255) if f" 10.77.{n}." not in used]
    if not free:
        raise FarHostError("all of 10.77.0.0/16 is in use")
    return secrets.choice(free)
