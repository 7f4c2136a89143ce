"""`scripts/bench`: direct, steered and pgbouncer in one run, as ratios; and a worker's memory with 200 open flows.

Method: every cell runs `pgbench -S` for a fixed time with direct runs around it (d s d p d …), so that a ratio is formed against
its neighbours in time; the table shows min/median/max of the rounds. The steered runs have one deny rule, one mask rule and
recording on. Everything is on loopback, in data directories of its own, and is removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
SIDECAR = CHECKOUT / ".venv" / "bin" / "sidecar"
MODES = ("simple", "extended", "prepared")

POLICY = """\
version: 1
default: allow
rules:
  - name: no-drops
    when: {protocol: postgres, statement: [DROP, TRUNCATE]}
    deny: schema changes go through the migration job
  - name: pii
    when: {protocol: postgres}
    mask:
      columns: {"*.filler": redact, "*.ssn": redact}
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def as_postgres(*command: str) -> list[str]:
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--", *command]


class Servers:
    """A throw-away PostgreSQL (fsync off) and a pgbouncer in session mode before it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bin = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
        self.port = free_port()
        self.bouncer_port = free_port()
        self.bouncer: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        directory = self.directory
        shutil.chown(directory, "postgres", "postgres")
        data = directory / "data"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": directory}
        subprocess.run(
            as_postgres(
                str(self.bin / "initdb"), "-D", str(data), "-A", "trust", "-U", "postgres", "--no-sync"
            ),
            check=True,
            **quiet,
        )
        options = (
            f"-c port={self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={directory} "
            "-c fsync=off -c max_connections=300 -c ssl=off"
        )
        subprocess.run(
            as_postgres(
                str(self.bin / "pg_ctl"),
                "-D",
                str(data),
                "-w",
                "-o",
                options,
                "-l",
                str(directory / "log"),
                "start",
            ),
            check=True,
            **quiet,
        )
        self.run("pgbench", "-i", "-q", "-s", "5", *self.target(self.port))
        (directory / "users.txt").write_text('"postgres" ""\n')
        (directory / "pgbouncer.ini").write_text(
            f"[databases]\npostgres = host=127.0.0.1 port={self.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {self.bouncer_port}\nauth_type = any\npool_mode = session\nmax_client_conn = 300\n"
            f"default_pool_size = 100\nunix_socket_dir =\nlogfile = {directory}/bouncer.log\n"
        )
        (directory / "pgbouncer.ini").write_text(
            (directory / "pgbouncer.ini")
            .read_text()
            .replace(f"port={self.port}", f"port={self.port} user=postgres")
        )
        self.bouncer = subprocess.Popen(
            as_postgres(shutil.which("pgbouncer") or "/usr/sbin/pgbouncer", str(directory / "pgbouncer.ini")),
            **quiet,
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", self.bouncer_port)) == 0:
                    return
            time.sleep(0.05)
        raise SystemExit("pgbouncer did not start: " + (directory / "bouncer.log").read_text())

    def stop(self) -> None:
        if self.bouncer is not None:
            self.bouncer.terminate()
            self.bouncer.wait(10)
        data = self.directory / "data"
        if (data / "postmaster.pid").exists():
            subprocess.run(
                as_postgres(str(self.bin / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop"),
                check=False,
                stdout=subprocess.DEVNULL,
                cwd=self.directory,
            )

    def target(self, port: int) -> list[str]:
        return ["-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "postgres"]

    def run(self, *command: str, steered: Path | None = None) -> str:
        prefix = [str(SIDECAR), "exec", "-c", str(steered), "--"] if steered else []
        tool = str(self.bin / command[0]) if (self.bin / command[0]).exists() else command[0]
        environment = {**os.environ, "PGSSLMODE": "disable"}
        done = subprocess.run(
            [*prefix, tool, *command[1:]],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
        return done.stdout

    def tps(self, mode: str, clients: int, seconds: float, port: int, steered: Path | None = None) -> float:
        output = self.run(
            "pgbench", "-n", "-S", "-M", mode, "-c", str(clients), "-j", "1" if clients == 1 else "2",
            "-T", str(int(seconds)), *self.target(port), steered=steered,
        )  # fmt: skip
        found = re.search(r"tps = ([0-9.]+) \(without initial", output)
        if not found:
            raise SystemExit(f"pgbench printed no tps:\n{output}")
        return float(found.group(1))


def configuration(directory: Path, port: int) -> Path:
    (directory / "policy.yaml").write_text(POLICY)
    (directory / "audit").mkdir(exist_ok=True)
    path = directory / "sidecar.yaml"
    path.write_text(
        f"steering:\n  ports: {{{port}: postgres}}\npolicy: policy.yaml\naudit:\n  directory: {directory}/audit\n  max_bytes: 8GiB\n"
    )
    return path


MEMORY_CLIENT = """\
import json, subprocess, sys, psycopg
port, sidecar = int(sys.argv[1]), sys.argv[2]
flows = [psycopg.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres", autocommit=True) for _ in range(200)]
for flow in flows:
    for _ in range(5):
        flow.execute("SELECT abalance FROM pgbench_accounts WHERE aid = %s", (1,)).fetchall()
print(len(flows), flush=True)
sys.stdin.read()
"""


def _descends(pid: str, ancestor: int) -> bool:
    while int(pid) > 1:
        if int(pid) == ancestor:
            return True
        pid = (Path("/proc") / pid / "stat").read_text().rsplit(")", 1)[1].split()[1]
    return False


def worker_memory(servers: Servers, config: Path) -> tuple[int, int]:
    """(flows, largest resident set of a worker in bytes) with 200 flows open that have run statements."""
    child = subprocess.Popen(
        [str(SIDECAR), "exec", "-c", str(config), "--", str(CHECKOUT / ".venv/bin/python"), "-c",
         MEMORY_CLIENT, str(servers.port), str(SIDECAR)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PGSSLMODE": "disable"},
    )  # fmt: skip
    try:
        assert child.stdout is not None
        flows = int(child.stdout.readline() or 0)
        time.sleep(1.0)
        largest = 0
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if b"sidecar.proxy.worker" in (directory / "cmdline").read_bytes() and _descends(
                    directory.name, child.pid
                ):
                    status = (directory / "status").read_text()
                    largest = max(largest, int(status.split("VmRSS:")[1].split()[0]) * 1024)
            except (OSError, IndexError):
                continue
        return flows, largest
    finally:
        assert child.stdin is not None
        child.stdin.close()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGTERM)
            child.wait(20)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("what", nargs="?", default="postgres", choices=["postgres"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="sidecar-bench-"))
    servers = Servers(directory)
    rows: list[dict[str, object]] = []
    try:
        servers.start()
        config = configuration(directory, servers.port)
        for mode in MODES:
            for clients in (1, 8):
                ratios: dict[str, list[float]] = {"steered": [], "pgbouncer": []}
                best = 0.0
                before = servers.tps(mode, clients, arguments.seconds, servers.port)
                for _ in range(arguments.rounds):
                    for kind in ("steered", "pgbouncer"):
                        if kind == "steered":
                            value = servers.tps(
                                mode, clients, arguments.seconds, servers.port, steered=config
                            )
                        else:
                            value = servers.tps(mode, clients, arguments.seconds, servers.bouncer_port)
                        after = servers.tps(mode, clients, arguments.seconds, servers.port)
                        ratios[kind].append(value / ((before + after) / 2))
                        best = max(best, before, after)
                        before = after
                rows.append(
                    {
                        "mode": mode,
                        "clients": clients,
                        "direct_tps": round(best),
                        **{k: [min(v), statistics.median(v), max(v)] for k, v in ratios.items()},
                    }
                )
                if not arguments.json:
                    if len(rows) == 1:
                        print(
                            f"{'pgbench -S':<22}{'direct tps':>12}{'steered / direct':>22}{'pgbouncer / direct':>22}"
                        )
                    label = f"{mode}, {clients} client{'s' if clients > 1 else ''}"
                    cells = [
                        "/".join(f"{x:.2f}" for x in rows[-1][kind]) for kind in ("steered", "pgbouncer")
                    ]  # type: ignore[attr-defined]
                    print(
                        f"{label:<22}{best:>12.0f}{cells[0]:>22}{cells[1]:>22}",
                        flush=True,
                    )
        medians = [row["steered"][1] for row in rows]  # type: ignore[index]
        summary: dict[str, object] = {"rows": rows, "steered_median": statistics.median(medians)}
        if not arguments.no_memory:
            flows, largest = worker_memory(servers, config)
            summary["memory"] = {"flows": flows, "worker_rss_mb": round(largest / 1e6, 1)}
        if arguments.json:
            print(json.dumps(summary))
        else:
            print(f"median of the steered medians: {summary['steered_median']:.2f} of direct (bar: 0.50)")
            if "memory" in summary:
                print(f"largest worker with {flows} open flows: {largest / 1e6:.1f} MB resident (bar: 80)")
        return 0
    finally:
        servers.stop()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
