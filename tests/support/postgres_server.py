"""A throw-away PostgreSQL of the distribution, on a free port, in its own data directory, as the user postgres."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path


class PostgresServer:
    """Context manager. `prefix` runs it elsewhere (nsenter into a namespace)."""

    def __init__(self, *, address: str = "127.0.0.1", port: int = 5432, prefix: tuple[str, ...] = ()) -> None:
        self.bin = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
        self.address, self.port, self._prefix = address, port, prefix
        self.directory = Path(tempfile.mkdtemp(prefix="sidecar-pg-"))

    def _as_postgres(self, *command: str) -> None:
        subprocess.run(
            [*self._prefix, "setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--", *command],
            check=True, cwd=self.directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=90,
        )  # fmt: skip

    def __enter__(self) -> PostgresServer:
        try:
            shutil.chown(self.directory, "postgres", "postgres")
            data = str(self.directory / "data")
            self._as_postgres(
                str(self.bin / "initdb"), "-D", data, "-A", "trust", "-U", "postgres", "--no-sync"
            )
            with (self.directory / "data" / "pg_hba.conf").open("a") as file:
                file.write("host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n")
            options = f"-c port={self.port} -c listen_addresses='{self.address}' -c unix_socket_directories={self.directory} -c fsync=off"
            self._as_postgres(
                str(self.bin / "pg_ctl"),
                "-D",
                data,
                "-w",
                "-o",
                options,
                "-l",
                str(self.directory / "log"),
                "start",
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def sql(self, text: str) -> str:
        """Run directly, past everything: through the unix socket."""
        return subprocess.run(
            ["psql", "-h", str(self.directory), "-p", str(self.port), "-U", "postgres", "-XqAt", "-v", "ON_ERROR_STOP=1", "-c", text],
            check=True, capture_output=True, text=True, timeout=30,
        ).stdout.strip()  # fmt: skip

    def __exit__(self, *_: object) -> None:
        data = self.directory / "data"
        if (data / "postmaster.pid").exists():
            subprocess.run(
                ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--", str(self.bin / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop"],
                check=False, cwd=self.directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60,
            )  # fmt: skip
        shutil.rmtree(self.directory, ignore_errors=True)
