"""What `sidecar exec` does around the command, without steering: split, launch in a cgroup, say what was
left.

Run as `python -m tests.support.exec_driver CGROUP [NAME=VALUE…] -- CMD…`. `SIDECAR_TEST_DIE=inspector` kills
the inspector once the command runs; `SIDECAR_TEST_GRACE=0.3` is how many seconds what is left has to end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from sidecar import launch


def main() -> int:
    cut = sys.argv.index("--")
    cgroup, *extra = sys.argv[1:cut]
    launch.LEFTOVER_GRACE_S = float(os.environ.get("SIDECAR_TEST_GRACE", launch.LEFTOVER_GRACE_S))  # type: ignore[misc]
    status = launch.split()
    if status is not None:
        return status

    async def inspect() -> int:
        user = launch.invoking_user()
        job = asyncio.create_task(
            launch.launch(
                sys.argv[cut + 1 :],
                job_cgroup=Path(cgroup),
                user=user,
                extra_env=dict(pair.split("=", 1) for pair in extra),
            )
        )
        if os.environ.get("SIDECAR_TEST_DIE") == "inspector":
            await asyncio.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return await job

    return asyncio.run(inspect())


if __name__ == "__main__":
    sys.exit(main())
