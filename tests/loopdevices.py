"""Files as block devices of this host."""

import contextlib
import subprocess

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
