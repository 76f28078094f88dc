"""Files as block devices of this host, or as file systems of it."""

import contextlib
import shutil
import subprocess
import time

import pytest


@contextlib.contextmanager
def loop(image):
    """Have a file as a block device; yields its path."""
    made = subprocess.run(
        ["losetup", "-f", "--show", str(image)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop devices here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@contextlib.contextmanager
def xfs(directory, size=1 << 30):
    """Have a file system on which files can share blocks."""
    if shutil.which("mkfs.xfs") is None:
        pytest.skip("no mkfs.xfs here (Debian: xfsprogs)")
    image, place = directory / "xfs.img", directory / "xfs"
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    place.mkdir()
    made = subprocess.run(
        ["mount", "-o", "loop", image, place], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no XFS can be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        _unmount(place)


def _unmount(place):
    """Take it away, once whoever had a file there has ended: who was killed takes time."""
    deadline = time.monotonic() + 120
    while subprocess.run(["umount", place], check=False).returncode:
        assert time.monotonic() < deadline, f"{place} is in use"
        time.sleep(0.2)
