"""The trust stores of a system: which there are, what installing changes, and the tools that do it.

| layout | where ours goes | tool |
|---|---|---|
| Debian, Ubuntu, Alpine | /usr/local/share/ca-certificates | update-ca-certificates(8) |
| RHEL, Fedora, Amazon Linux | /etc/pki/ca-trust/source/anchors | update-ca-trust(8) |
| an image without either tool | the end of the bundle itself | |
| Java | the keystore `cacerts` of each runtime | keytool |
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.errors import TrustError
from sidecar.tls import bundles, snapshots
from sidecar.tls.inside import inside

NAME: Final = "sidecar-local-authority"
TOOL_TIMEOUT_S: Final = 120.0
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KEYSTORE_PASSWORD: Final = "changeit"
"""What every JDK ships its `cacerts` with: it keeps nobody out."""
MAX_KEYSTORES: Final = 64

_ANCHORS: Final = (
    ("update-ca-certificates", (), f"/usr/local/share/ca-certificates/{NAME}.crt", "/etc/ssl/certs"),
    ("update-ca-trust", ("extract",), f"/etc/pki/ca-trust/source/anchors/{NAME}.pem", "/etc/pki/ca-trust/extracted"),
)  # fmt: skip
_KEYSTORES: Final = (
    "etc/ssl/certs/java/cacerts",
    "etc/pki/java/cacerts",
    "usr/lib/jvm/*/lib/security/cacerts",
    "usr/lib/jvm/*/jre/lib/security/cacerts",
    "opt/java/*/lib/security/cacerts",
    "opt/*/lib/security/cacerts",
)


@dataclass(frozen=True, slots=True)
class SystemStore:
    """`tool`: the command that takes `anchor` into what is `generated`; None: the certificate is appended to `generated`, a file."""

    root: Path
    anchor: Path
    generated: Path
    tool: tuple[str, ...] | None

    @property
    def name(self) -> str:
        return f"system store, by {self.tool[0].rpartition('/')[2]}" if self.tool else "system bundle"

    def places(self) -> tuple[Path, ...]:
        return self.anchor, self.generated

    def add(self, certificate_pem: bytes) -> None:
        """Raises TrustError, OSError."""
        self.anchor.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        snapshots.write(self.anchor, certificate_pem, 0o644)
        if self.tool is None:
            data = bundles.read_bounded(self.generated)
            if not bundles.holds(data, certificate_pem):
                end = b"" if data.endswith(b"\n") else b"\n"
                _replace(self.generated, data + end + certificate_pem)
        else:
            self.refresh()
        bundle = bundles.system_bundle(self.root)
        if bundle is None or not bundles.holds(bundles.read_bounded(bundle), certificate_pem):
            raise TrustError(
                f"{self.name}: {bundle or 'the bundle'} does not hold the authority afterwards",
                hint="is it made otherwise here? On old releases: update-ca-trust enable",
            )

    def remove(self) -> None:
        """The anchor, and the links to it, which update-ca-certificates leaves without `--fresh`. Raises TrustError, OSError."""
        links: list[Path] = []
        if self.generated.is_dir():
            for path in self.generated.iterdir():
                if (
                    path.is_symlink()
                    and inside(self.root, "/" + str(path.relative_to(self.root))) == self.anchor
                ):
                    links.append(path)
        self.anchor.unlink()
        for path in links:
            path.unlink()
        self.refresh()

    def refresh(self) -> None:
        """Run the tool. In another root it runs there, by chroot(1): with the rights of root. Raises TrustError."""
        if self.tool is None:
            return
        argv = self.tool if self.root == Path("/") else ("chroot", str(self.root), *self.tool)
        null = self.root / "dev/null"
        had_null = null.exists()
        run(argv, f"{self.name} at {self.root}")
        if not had_null and null.is_file():  # a script's own `> /dev/null`, in a tree without devices
            null.unlink()


@dataclass(frozen=True, slots=True)
class Keystore:
    path: Path
    keytool: str

    @property
    def name(self) -> str:
        return f"Java keystore {self.path}"

    def holds(self, fingerprint: str) -> bool:
        """`fingerprint` as `certificates.fingerprint` gives it. Raises TrustError."""
        return fingerprint in self._run("-list")

    def add(self, certificate: Path) -> None:
        """Raises TrustError, OSError."""
        self._change("-importcert", "-noprompt", "-trustcacerts", "-alias", NAME, "-file", str(certificate))

    def remove(self, fingerprint: str) -> None:
        """Under whatever alias it stands; nothing where it does not. Raises TrustError, OSError."""
        alias = ""
        for line in self._run("-list").splitlines():
            if fingerprint in line:
                self._change("-delete", "-alias", alias)
                return
            alias = line.partition(",")[0]

    def _change(self, *arguments: str) -> None:
        """On a copy, which takes the place of the keystore once keytool is done."""
        copy = self.path.with_name(f".{self.path.name}.sidecar-new")
        shutil.copyfile(self.path, copy)
        try:
            self._run(*arguments, file=copy)
            _replace(self.path, copy.read_bytes())
        finally:
            copy.unlink(missing_ok=True)

    def _run(self, *arguments: str, file: Path | None = None) -> str:
        command, *rest = arguments
        argv = (
            self.keytool,
            command,
            "-keystore",
            str(file or self.path),
            "-storepass:env",
            "STOREPASS",
            *rest,
        )
        return run(argv, self.name, STOREPASS=KEYSTORE_PASSWORD)


def run(argv: tuple[str, ...], what: str, **variables: str) -> str:
    """Standard output. Raises TrustError with the end of what the tool said."""
    try:
        done = subprocess.run(
            argv,
            env={"PATH": PATH, "LC_ALL": "C", **variables},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TOOL_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TrustError(f"{what}: {argv[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["it says nothing"]
        raise TrustError(f"{what}: {argv[0]} failed ({done.returncode}): {said[0][:300]}")
    return done.stdout


def system_store(root: Path) -> SystemStore | None:
    """None where the system has neither a tool nor a bundle: nothing there would trust anybody by it. Raises TrustError."""
    for name, arguments, anchor, generated in _ANCHORS:
        for directory in ("usr/sbin", "usr/bin", "sbin", "bin"):
            if inside(root, f"/{directory}/{name}").is_file():
                tool = (f"/{directory}/{name}", *arguments)
                return SystemStore(root, _file(root, anchor), inside(root, generated), tool)
    bundle = bundles.system_bundle(root)
    if bundle is None:
        return None
    row = _ANCHORS[1] if bundle.is_relative_to(root / "etc/pki") else _ANCHORS[0]
    return SystemStore(root, _file(root, row[2]), bundle, None)


def keystores(root: Path, environ: Mapping[str, str]) -> tuple[list[Keystore], list[str]]:
    """Those of Java runtimes, each once, and why others were passed over. JAVA_HOME of `environ` counts where `root` is this system."""
    candidates = [path for pattern in _KEYSTORES for path in sorted(root.glob(pattern))]
    home = environ.get("JAVA_HOME")
    if root == Path("/") and home and home.startswith("/"):
        candidates += [Path(home, tail) for tail in ("lib/security/cacerts", "jre/lib/security/cacerts")]
    found: dict[Path, Keystore] = {}
    passed: list[str] = []
    for candidate in candidates[: MAX_KEYSTORES * 4]:
        path = inside(root, "/" + str(candidate.relative_to(root)))
        if path in found or not path.is_file():
            continue
        keytool = _keytool(root, candidate)
        if path.stat().st_uid != os.geteuid() or path.parent.stat().st_uid != os.geteuid():
            passed.append(
                f"Java keystore {path}: it is user {path.stat().st_uid}'s, who adds it with keytool"
            )
        elif keytool is None:
            passed.append(f"Java keystore {path}: there is no keytool")
        elif len(found) < MAX_KEYSTORES:
            found[path] = Keystore(path, keytool)
    return list(found.values()), list(dict.fromkeys(passed))


def _keytool(root: Path, keystore: Path) -> str | None:
    """That of the keystore's own runtime, where it is one of this system; else any of this system's."""
    own = keystore.parents[2] / "bin" / "keytool"
    if root == Path("/") and own.is_file() and own.stat().st_uid in (0, os.geteuid()):
        return str(own)
    return shutil.which("keytool", path=PATH)


def _file(root: Path, path: str) -> Path:
    """The directory's links followed; a link in the place of the file itself is not."""
    directory, _, name = path.rpartition("/")
    return inside(root, directory) / name


def _replace(path: Path, data: bytes) -> None:
    """With mode and owner of what is there."""
    facts = path.stat()
    snapshots.write(path, data, facts.st_mode & 0o7777)
    os.chown(path, facts.st_uid, facts.st_gid)
