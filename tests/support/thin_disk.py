"""A file system on a real block device that has less room than it says: what is written succeeds, and goes to the device or fails only
when it is synced, as on a disk that breaks."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SMALL, LARGE = "2m", "32m"


class ThinDisk:
    """A file system of 16 MiB on a device that has 2."""

    def __init__(self, directory: Path) -> None:
        self._store, self.place = directory / "store", directory / "disk"
        self._store.mkdir()
        self.place.mkdir()
        image = self._store / "image"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", self._store], check=True)
        with image.open("wb") as file:
            file.truncate(16 << 20)
        subprocess.run(["mkfs.ext2", "-q", "-b", "4096", "-m", "0", image], check=True)
        made = subprocess.run(["losetup", "-f", "--show", image], check=True, capture_output=True, text=True)
        self._device = made.stdout.strip()
        # A loop device takes a request for done of which its file took a part: with requests of a page there is none.
        queue = Path("/sys/block", Path(self._device).name, "queue", "max_sectors_kb")
        queue.write_text("4")
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", self._device, self.place], check=True)

    def fill(self) -> None:
        """Nothing more goes to the device, whatever its file system says; until `widen`."""
        with (self._store / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 4096) == 4096:
                pass

    def widen(self) -> None:
        subprocess.run(["mount", "-o", f"remount,size={LARGE}", self._store], check=True)

    def forget(self) -> None:
        """What is not on the device is gone, as after a power cut."""
        subprocess.run(["umount", self.place], check=True)
        self.mount()

    def close(self) -> None:
        subprocess.run(["umount", "-l", self.place], check=False)
        subprocess.run(["losetup", "-d", self._device], check=False)
        subprocess.run(["umount", "-l", self._store], check=True)


@contextlib.contextmanager
def thin_disk(directory: Path) -> Iterator[ThinDisk]:
    if not Path("/dev/loop-control").exists():
        pytest.skip("this kernel has no loop devices")
    made = ThinDisk(directory)
    try:
        yield made
    finally:
        made.close()
