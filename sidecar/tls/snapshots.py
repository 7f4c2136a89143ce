"""What files were before a change and after it, so that the change can be undone byte for byte, and what others did since is seen.

Paths are relative to a root, so that the tree of an image can be moved. Contents are kept by their SHA-256 in a directory of root's.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from sidecar.errors import TrustError

MAX_FILES: Final = 20_000
MAX_BYTES: Final = 256 * 1024 * 1024
"""Of all kept contents. Debian's store has 0.5 MB in 450 entries, Fedora's some 3 MB."""


class Entry(msgspec.Struct, frozen=True):
    """One file, link or directory. `content`: a file's SHA-256, a link's target. `mtime_ns` is put back, and not compared."""

    kind: str
    mode: int
    uid: int
    gid: int
    content: str
    mtime_ns: int

    def same(self, other: Entry | None) -> bool:
        return other is not None and msgspec.structs.replace(other, mtime_ns=self.mtime_ns) == self


Snapshot = dict[str, Entry | None]
"""By path relative to the root. None: there is nothing."""


def entry(path: Path) -> Entry | None:
    """What is at `path`, links not followed. Raises OSError."""
    try:
        facts = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISLNK(facts.st_mode):
        kind, content = "link", os.readlink(path)
    elif stat.S_ISDIR(facts.st_mode):
        kind, content = "directory", ""
    elif stat.S_ISREG(facts.st_mode):
        kind, content = "file", hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        kind, content = "other", ""
    return Entry(kind, stat.S_IMODE(facts.st_mode), facts.st_uid, facts.st_gid, content, facts.st_mtime_ns)


def take(root: Path, places: Iterable[Path]) -> Snapshot:
    """Of `places` with all that is in them, and of directories above them that are not there. Raises TrustError, OSError."""
    found: Snapshot = {}
    for place in places:
        for above in place.parents:
            if above == root or above.exists():
                break
            found[_name(root, above)] = None
        found[_name(root, place)] = entry(place)
        if not place.is_dir() or place.is_symlink():
            continue
        for directory, directories, files in os.walk(place):
            for name in (*directories, *files):
                found[_name(root, Path(directory, name))] = entry(Path(directory, name))
                if len(found) > MAX_FILES:
                    raise TrustError(f"{place} holds more than {MAX_FILES} files")
    return found


def take_again(root: Path, before: Snapshot, places: Iterable[Path]) -> Snapshot:
    """As `take`, with whatever `before` has besides: directories that were made since. Raises TrustError, OSError."""
    found = take(root, places)
    return found | {name: entry(root / name) for name in before if name not in found}


def keep(root: Path, snapshot: Snapshot, directory: Path) -> None:
    """The contents of its files, in `directory`. Raises TrustError, OSError."""
    size = 0
    for name, found in snapshot.items():
        if found is None or found.kind != "file":
            continue
        data = (root / name).read_bytes()
        size += len(data)
        if size > MAX_BYTES:
            raise TrustError(f"more than {MAX_BYTES} bytes would have to be kept")
        digest = hashlib.sha256(data).hexdigest()
        if digest != found.content:
            raise TrustError(f"{root / name} changes while it is looked at", hint="try again")
        write(directory / digest, data, 0o600)


def changed(before: Snapshot, after: Snapshot) -> list[str]:
    """Paths that differ. Directories differ by more than their contents only: modes, owners, being there."""
    names = sorted({*before, *after})
    return [name for name in names if not _same(before.get(name), after.get(name))]


def unchanged_since(root: Path, after: Mapping[str, Entry | None]) -> set[str]:
    return {name for name, found in after.items() if _same(found, entry(root / name))}


def put_back(root: Path, before: Mapping[str, Entry | None], directory: Path) -> None:
    """Make every path what it was. A directory of ours that others have put something into stays. Raises OSError."""
    for name in sorted(before, reverse=True):  # what is below a directory goes before it
        if before[name] is None:
            _remove(root / name)
    for name in sorted(before):
        was = before[name]
        if was is not None and not was.same(entry(root / name)):
            _restore(root / name, was, directory)


def write(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all, and on disk. Raises OSError."""
    temporary = path.with_name(f".{path.name}.sidecar-new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _restore(path: Path, was: Entry, directory: Path) -> None:
    if was.kind == "directory":
        path.mkdir(exist_ok=True)
    elif was.kind == "link":
        path.unlink(missing_ok=True)
        path.symlink_to(was.content)
        os.chown(path, was.uid, was.gid, follow_symlinks=False)
        os.utime(path, ns=(was.mtime_ns, was.mtime_ns), follow_symlinks=False)
        return
    elif was.kind == "file":
        write(path, (directory / was.content).read_bytes(), was.mode)
    else:
        return
    os.chown(path, was.uid, was.gid)
    path.chmod(was.mode)
    os.utime(path, ns=(was.mtime_ns, was.mtime_ns))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        if not any(path.iterdir()):
            path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _same(one: Entry | None, other: Entry | None) -> bool:
    return one is other if one is None else one.same(other)


def _name(root: Path, path: Path) -> str:
    return str(path.relative_to(root))
