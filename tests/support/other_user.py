"""Code that runs in a process of another user, group, session or cgroup, and answers with JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_ASK = """
import json, sys
from pathlib import Path
import msgspec
from sidecar.control.client import ControlClient
from sidecar.errors import ControlError
path, method, args = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
try:
    with ControlClient(Path(path)) as client:
        result = getattr(client, method)(*args)
except ControlError as error:
    answer = {"error": error.message, "hint": error.hint}
else:
    answer = {"result": msgspec.to_builtins(result)}
print(json.dumps(answer))
"""


def asking(path: Path, method: str, *args: object) -> list[str]:
    """A command line that asks the socket and prints `{"result": …}` or `{"error": …, "hint": …}`."""
    return [sys.executable, "-c", _ASK, str(path), method, json.dumps(args)]


def ask(
    path: Path,
    method: str,
    *args: object,
    uid: int = 0,
    groups: tuple[int, ...] = (),
    session: bool = False,
    cgroup: Path | None = None,
) -> dict[str, Any]:
    def become() -> None:
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text("0")
        if uid:
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)

    done = subprocess.run(
        asking(path, method, *args),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=become,
        start_new_session=session,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
