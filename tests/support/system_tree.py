"""Trees that look like a small system, with a shell and the real tools in them, for `--root`.

Debian's update-ca-certificates and openssl are the real ones. RHEL's and Alpine's tools are not to be had on Debian: short scripts do
what their manuals say (update-ca-trust(8): anchors go to the head of the extracted bundle).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

BUSYBOX = Path("/bin/busybox")
TOOL = Path("/usr/sbin/update-ca-certificates")
APPLETS = [
    "sh",
    "sed",
    "find",
    "mktemp",
    "ln",
    "readlink",
    "sort",
    "wc",
    "chmod",
    "mv",
    "rm",
    "cat",
    "basename",
    "grep",
    "test",
    "run-parts",
    "cp",
    "echo",
    "xargs",
]
ROOTS = Path("/usr/share/ca-certificates/mozilla")

EXTRACT = """#!/bin/sh
[ "$1" = extract ] || exit 64
cat /etc/pki/ca-trust/source/anchors/*.pem /usr/share/pki/ca-trust-source/roots.pem > /etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem.new 2>/dev/null
chmod 444 /etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem.new
mv -f /etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem.new /etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem
"""
ALPINE = """#!/bin/sh
cat /usr/share/ca-certificates/mozilla/*.crt > /etc/ssl/certs/bundle.new
for anchor in /usr/local/share/ca-certificates/*.crt; do
  [ -e "$anchor" ] || continue
  ln -sf "$anchor" "/etc/ssl/certs/ca-cert-$(basename "$anchor" .crt).pem"
  cat "$anchor" >> /etc/ssl/certs/bundle.new
done
mv -f /etc/ssl/certs/bundle.new /etc/ssl/certs/ca-certificates.crt
"""


def available() -> bool:
    return os.geteuid() == 0 and BUSYBOX.is_file() and TOOL.is_file() and ROOTS.is_dir()


def make(root: Path, layout: str) -> Path:
    """`debian`, `rhel`, `alpine`, or `bundle`: a file of roots and nothing else."""
    for directory in ("bin", "usr/bin", "usr/sbin", "tmp", "etc/ssl/certs", "dev"):
        (root / directory).mkdir(parents=True)
    roots = sorted(ROOTS.glob("*.crt"))[:6]
    match layout:
        case "bundle":
            bundle = root / "etc/ssl/certs/ca-certificates.crt"
            bundle.write_bytes(b"".join(path.read_bytes() for path in roots).rstrip(b"\n"))
            (root / "etc/ssl/cert.pem").symlink_to("/etc/ssl/certs/ca-certificates.crt")
            return root
        case "debian":
            _shell(root)
            _copy_program(root, "/usr/bin/openssl")
            _roots(root, roots)
            (root / "etc/ca-certificates.conf").write_text(
                "".join(f"mozilla/{path.name}\n" for path in roots)
            )
            shutil.copy(TOOL, root / "usr/sbin/update-ca-certificates")
            (root / "usr/lib/ssl").mkdir(parents=True, exist_ok=True)
            _run(root, "/usr/sbin/update-ca-certificates")
        case "alpine":
            _shell(root)
            _roots(root, roots)
            _script(root / "usr/sbin/update-ca-certificates", ALPINE)
            (root / "etc/ssl/cert.pem").symlink_to("certs/ca-certificates.crt")
            _run(root, "/usr/sbin/update-ca-certificates")
        case "rhel":
            _shell(root)
            for directory in (
                "etc/pki/ca-trust/source/anchors",
                "etc/pki/ca-trust/extracted/pem",
                "etc/pki/tls/certs",
                "usr/share/pki/ca-trust-source",
            ):
                (root / directory).mkdir(parents=True)
            (root / "usr/share/pki/ca-trust-source/roots.pem").write_bytes(
                b"".join(path.read_bytes() for path in roots)
            )
            (root / "etc/pki/tls/certs/ca-bundle.crt").symlink_to(
                "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"
            )
            _script(root / "usr/bin/update-ca-trust", EXTRACT)
            _run(root, "/usr/bin/update-ca-trust", "extract")
    (root / "dev/null").unlink(missing_ok=True)
    return root


def fingerprint(root: Path) -> dict[str, tuple[object, ...]]:
    """Every file, link and directory of the tree with mode, owner and content."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(directory, name)
            facts = path.lstat()
            content = (
                os.readlink(path)
                if path.is_symlink()
                else hashlib.sha256(path.read_bytes()).hexdigest()
                if path.is_file()
                else ""
            )
            found[str(path.relative_to(root))] = (oct(facts.st_mode), facts.st_uid, facts.st_gid, content)
    return found


def _shell(root: Path) -> None:
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("/bin/busybox")


def _roots(root: Path, roots: list[Path]) -> None:
    for directory in (
        "usr/share/ca-certificates/mozilla",
        "usr/local/share/ca-certificates",
        "etc/ca-certificates/update.d",
    ):
        (root / directory).mkdir(parents=True)
    for path in roots:
        shutil.copy(path, root / "usr/share/ca-certificates/mozilla" / path.name)


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _copy_program(root: Path, program: str) -> None:
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for name in (program, *re.findall(r"(/\S+) \(0x", said)):
        (root / name[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, root / name[1:])


def _run(root: Path, *command: str) -> None:
    subprocess.run(
        ["chroot", str(root), *command],
        check=True,
        capture_output=True,
        env={"PATH": "/usr/sbin:/usr/bin:/bin"},
    )
