"""Paths of another system's tree (a chroot, an image), followed as that system would: its absolute links stay in it."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Final

from sidecar.errors import TrustError

MAX_LINKS: Final = 40
"""MAXSYMLINKS of Linux."""


def inside(root: Path, path: str) -> Path:
    """The place of `path` (absolute, as seen inside) below `root`, with every link on the way followed and none at `root` left.

    What is not there yet stands as it is named. Raises TrustError for a loop.
    """
    done: list[str] = []
    pending = list(reversed(PurePosixPath(path).parts[1:]))
    links = 0
    while pending:
        part = pending.pop()
        if part == "..":
            del done[-1:]
            continue
        place = root.joinpath(*done, part)
        if not place.is_symlink():
            done.append(part)
            continue
        links += 1
        if links > MAX_LINKS:
            raise TrustError(f"{path} below {root}: too many links")
        target = PurePosixPath(os.readlink(place))
        parts = target.parts
        if target.is_absolute():
            done.clear()
            parts = parts[1:]
        pending.extend(reversed(parts))
    return root.joinpath(*done)
