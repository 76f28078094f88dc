"""Which QEMU a test is for: what it is, what it allows, where that is said. Nothing heavy."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from shutil import which

__all__ = ["VARIABLE", "default_qemu", "described", "version_of"]

VARIABLE = "QMPBLOCK_QEMU"
"""The environment variable that names the QEMU under test."""


def default_qemu() -> str:
    """Return the QEMU under test, where no test says another: a path.

    :raise FileNotFoundError: there is none.
    """
    wanted = os.environ.get(VARIABLE) or "qemu-system-x86_64"
    binary = which(wanted)
    if binary is None:
        raise FileNotFoundError(f"no program {wanted}; install QEMU, or set {VARIABLE}")
    return binary


@functools.cache
def version_of(binary: str) -> tuple[int, int, int]:
    """Return the version of a QEMU; it is asked once.

    :raise OSError: it cannot be started; subprocess.SubprocessError: it failed.
    :raise ValueError: it told none.
    """
    done = subprocess.run(
        [binary, "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", done.stdout)
    if match is None:
        raise ValueError(f"{binary} tells no version: {done.stdout[:200]!r}")
    return int(match[1]), int(match[2]), int(match[3])


def described(binary: str) -> str:
    """Return a line that names a QEMU and its version."""
    return f"{'.'.join(map(str, version_of(binary)))} ({binary})"
