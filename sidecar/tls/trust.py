"""Installing the local authority in the trust stores of a system, and taking it out again, byte for byte.

A state file, written before anything is changed, says what each file was: a crash or a tool that fails leaves nothing that cannot be
undone. What others have changed since is never overwritten: there, only ours is taken out. docs/tls.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509

from sidecar.errors import PrerequisiteError, TrustError
from sidecar.tls import bundles, certificates, environment, snapshots, stores
from sidecar.tls.inside import inside
from sidecar.tls.snapshots import Entry

STATE_DIRECTORY: Final = "/var/lib/sidecar/trust"
STATE_FILE: Final = "state.json"
KEPT: Final = "before"
OUR_DIRECTORY: Final = "/etc/sidecar"
CERTIFICATE_FILE: Final = "ca.pem"
BUNDLE_FILE: Final = "ca-bundle.pem"
ENVIRONMENT_FILE: Final = "ca.env"


class State(msgspec.Struct, frozen=True):
    """`before`: of what an install changes, or may change while `after` is None: it was interrupted."""

    version: int
    fingerprint: str
    certificate: str
    before: dict[str, Entry | None]
    after: dict[str, Entry | None] | None


@dataclass(slots=True)
class Report:
    """What was done, in words; `failed` is what was not, with the reason."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def install(
    certificate_pem: bytes, root: Path = Path("/"), environ: Mapping[str, str] | None = None
) -> Report:
    """Make the system at `root` trust the authority. Idempotent; another authority of ours is taken out first.

    Raises TrustError, PrerequisiteError: nothing is changed then. `failed` names keystores that could not be changed.
    """
    root = _checked(root)
    report = Report()
    with _locked(root) as directory:
        state = _load(directory)
        fingerprint = certificates.fingerprint(x509.load_pem_x509_certificate(certificate_pem))
        if state is not None and _stands(root, state, fingerprint):
            report.done.append("installed already: nothing to do")
            return report
        if state is not None:
            _take_out(root, directory, state, report)
        _put_in(root, directory, certificate_pem, fingerprint, environ or os.environ, report)
    return report


def uninstall(root: Path = Path("/")) -> Report:
    """Undo `install`. Idempotent. Raises TrustError, PrerequisiteError."""
    root = _checked(root)
    report = Report()
    if not inside(root, STATE_DIRECTORY).is_dir():
        report.done.append("not installed: nothing to do")
        return report
    with _locked(root) as directory:
        state = _load(directory)
        if state is None:
            report.done.append("not installed: nothing to do")
        else:
            _take_out(root, directory, state, report)
    return report


def _checked(root: Path) -> Path:
    if os.geteuid() != 0:
        raise PrerequisiteError("trust stores are root's", hint="run it as root")
    if not root.is_dir():
        raise TrustError(
            f"{root} is no directory", hint="--root names the tree of a system, such as an unpacked image"
        )
    return root.resolve()


def _stands(root: Path, state: State, fingerprint: str) -> bool:
    if state.after is None or state.fingerprint != fingerprint:
        return False
    return snapshots.unchanged_since(root, state.after) == set(state.after)


def _put_in(
    root: Path,
    directory: Path,
    certificate_pem: bytes,
    fingerprint: str,
    environ: Mapping[str, str],
    report: Report,
) -> None:
    system = stores.system_store(root)
    java, passed = stores.keystores(root, environ)
    own = inside(root, OUR_DIRECTORY)
    files = [own / name for name in (CERTIFICATE_FILE, BUNDLE_FILE, ENVIRONMENT_FILE)]
    places = [*files, *(system.places() if system else ()), *(store.path for store in java)]
    try:
        before = snapshots.take(root, places)
        (directory / KEPT).mkdir(mode=0o700, exist_ok=True)
        snapshots.keep(root, before, directory / KEPT)
        state = State(1, fingerprint, certificate_pem.decode(), before, None)
        _save(directory, state)
    except OSError as error:
        raise _failed(error) from error
    try:
        if system is not None:
            system.add(certificate_pem)
            report.done.append(system.name)
        else:
            report.failed.append(
                "the system has no roots that are trusted (install ca-certificates): no bundle is made"
            )
        _write_own(root, own, certificate_pem)
        report.done.append(f"files for runtimes with stores of their own: {own}/{ENVIRONMENT_FILE}")
        report.failed += passed
        for store in java:
            try:
                if not store.holds(fingerprint):  # the tool's own hook may have added it
                    store.add(own / CERTIFICATE_FILE)
                report.done.append(store.name)
            except TrustError as error:
                report.failed.append(str(error))
        after = snapshots.take_again(root, before, places)
    except (TrustError, OSError) as error:
        now = snapshots.take_again(root, before, places)
        names = snapshots.changed(before, now)
        snapshots.put_back(root, {name: before.get(name) for name in names}, directory / KEPT)
        _forget(directory)
        raise error if isinstance(error, TrustError) else _failed(error) from error
    names = snapshots.changed(before, after)
    kept = {name: before.get(name) for name in names}
    _save(
        directory,
        msgspec.structs.replace(state, before=kept, after={name: after.get(name) for name in names}),
    )
    wanted = {was.content for was in kept.values() if was is not None and was.kind == "file"}
    for path in (directory / KEPT).iterdir():
        if path.name not in wanted:
            path.unlink()


def _write_own(root: Path, own: Path, certificate_pem: bytes) -> None:
    own.mkdir(mode=0o755, parents=True, exist_ok=True)
    snapshots.write(own / CERTIFICATE_FILE, certificate_pem, 0o644)
    bundle = bundles.system_bundle(root)
    named: Path | None = None
    if bundle is not None:
        # A link: what the distribution adds to its roots, or takes from them, counts here too.
        named = Path(OUR_DIRECTORY, BUNDLE_FILE)
        link = own / BUNDLE_FILE
        link.unlink(missing_ok=True)
        link.symlink_to("/" + str(bundle.relative_to(root)))
    found = environment.variables(Path(OUR_DIRECTORY, CERTIFICATE_FILE), named)
    text = "".join(f"{name}={value}\n" for name, value in sorted(found.items()))
    head = "# Written by `sidecar ca install`: for systemd (EnvironmentFile=), docker (--env-file) and shells (set -a; . FILE)\n"
    snapshots.write(own / ENVIRONMENT_FILE, (head + text).encode(), 0o644)


def _take_out(root: Path, directory: Path, state: State, report: Report) -> None:
    """Paths that are as `install` left them become what they were before; in others, which somebody changed since, ours is removed."""
    certificate_pem = state.certificate.encode()
    system = stores.system_store(root)
    clean = snapshots.unchanged_since(root, state.after) if state.after is not None else set()
    changed = (
        set(snapshots.changed(state.before, snapshots.take(root, [root / name for name in state.before])))
        - clean
    )
    try:
        if system is not None and _holds(system.anchor, certificate_pem):
            system.remove()
        for name in sorted(changed):
            _remove_ours(root, root / name, state, directory, report)
        snapshots.put_back(root, {name: state.before[name] for name in clean}, directory / KEPT)
        empty = {name: None for name in changed if state.before.get(name) is None and (root / name).is_dir()}
        snapshots.put_back(root, empty, directory / KEPT)
        _forget(directory)
    except OSError as error:
        raise _failed(error) from error
    report.done.append(f"taken out; {len(clean)} files are what they were")


def _remove_ours(root: Path, path: Path, state: State, directory: Path, report: Report) -> None:
    certificate_pem = state.certificate.encode()
    was = state.before.get(str(path.relative_to(root)))
    if path.name == "cacerts":
        found = next((store for store in stores.keystores(root, {})[0] if store.path == path), None)
        if found is not None:
            found.remove(state.fingerprint)
        report.done.append(f"{path}: changed since; only the authority is removed from it")
    elif path.is_symlink() or not path.is_file():
        if was is None and path.is_symlink() and path.name == BUNDLE_FILE:
            path.unlink()
    elif was is None and path.name == ENVIRONMENT_FILE and path.parent == inside(root, OUR_DIRECTORY):
        path.unlink()
        report.done.append(f"{path}: removed, with what somebody wrote into it")
    elif _holds(path, certificate_pem):
        rest = bundles.without(bundles.read_bounded(path), certificate_pem)
        if was is None and not bundles.certificates_in(rest):
            path.unlink()
        else:
            facts = path.stat()
            snapshots.write(path, rest, facts.st_mode & 0o7777)
            os.chown(path, facts.st_uid, facts.st_gid)
            report.done.append(f"{path}: changed since; only the authority is removed from it")


def _holds(path: Path, certificate_pem: bytes) -> bool:
    return path.is_file() and bundles.holds(bundles.read_bounded(path), certificate_pem)


def _failed(error: OSError) -> TrustError:
    return TrustError(f"{error.filename or 'a file'}: {error.strerror}")


# -- state


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[Path]:
    """The state's directory, for one process at a time."""
    directory = inside(root, STATE_DIRECTORY)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _failed(error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield directory
    finally:
        with contextlib.suppress(OSError):  # there is a state in it; or something of Sidecar's beside it
            directory.rmdir()
            directory.parent.rmdir()
        os.close(descriptor)


def _load(directory: Path) -> State | None:
    path = directory / STATE_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise TrustError(
            f"{path} cannot be read: {error}", hint="it says what to put back; do not remove it"
        ) from error


def _save(directory: Path, state: State) -> None:
    snapshots.write(directory / STATE_FILE, msgspec.json.encode(state), 0o600)


def _forget(directory: Path) -> None:
    (directory / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(directory / KEPT, ignore_errors=True)
