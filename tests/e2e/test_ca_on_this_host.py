"""`sidecar ca install` on this very host, with its own tools and clients, in a mount namespace whose changes nobody else sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import system_tree

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not system_tree.available(), reason="needs root and Debian's ca-certificates"),
]

SIDECAR = str(Path(sys.executable).parent / "sidecar")
# Where an install writes; what was there lies below, what is written above in memory, and goes with the namespace.
SCRIPT = """
set -e
mount --make-rprivate /
mount -t tmpfs above "$1"
for place in etc usr/local/share var/lib; do
  mkdir -p "$1/$place/up" "$1/$place/work"
  mount -t overlay over -o "lowerdir=/$place,upperdir=$1/$place/up,workdir=$1/$place/work" "/$place"
done
look() {
  find /etc /usr/local/share ! -type d -printf '%p %m %u %g %s %l\\n' | sort
  find /etc -type f -print0 | sort -z | xargs -0 sha256sum
}
look > "$1/before"
"$2" ca install
"$2" doctor | grep 'client trust'
"$2" ca uninstall
look > "$1/after"
cmp "$1/before" "$1/after"
echo put back
"$2" doctor | grep 'client trust'
"""


def test_the_clients_of_this_host_trust_us_and_everything_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "above").mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", SCRIPT, "sh", str(tmp_path / "above"), SIDECAR],
        env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    installed, _, afterwards = done.stdout.partition("put back\n")
    assert "system store, by update-ca-certificates" in installed
    for runtime in ("curl", "OpenSSL", "Python ssl", "git"):
        assert f"{runtime}: trusts the local authority\n" in installed
        assert f"{runtime}: trusts the local authority with the variables" in afterwards
    if "Java: " in installed and "Java: could not" not in installed:
        assert "Java: trusts the local authority\n" in installed
        assert "Java: does not trust" in afterwards
