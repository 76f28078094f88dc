"""Real NBD servers for tests: qemu-nbd of every version at hand, and nbdkit.

A test that needs a program which is not here is skipped, and says which.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

_CACHE = Path(os.environ.get("QMPBLOCK_CACHE", "~/.cache/qmpblock")).expanduser()


def need(program: str) -> str:
    """Return the path of a program, or skip the test."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def qemu_nbd(version: str) -> str:
    """Return the path of qemu-nbd: `system`, or a major version in the cache; else skip."""
    if version == "system":
        return need("qemu-nbd")
    found = sorted(_CACHE.glob(f"qemu/{version}.*/bin/qemu-nbd"))
    if not found:
        pytest.skip(f"no QEMU {version} in {_CACHE}: run tools/fetch_qemu.py {version}")
    return str(found[-1])


def listens(path: str | Path) -> bool:
    """Whether a process listens at a path; the socket's file is there a little before that.

    By what the kernel says: some servers have room for one client.
    """
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)  # its flags are the fourth; 0x10000: it accepts
        if int(fields[3], 16) & 0x10000 and fields[7:] == [str(path)]:
            return True
    return False


@contextmanager
def running(command: Sequence[str], path: Path) -> Iterator[str]:
    """Run a server that listens on `path`; yield its address."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 120
        while not listens(path):
            if process.poll() is not None or time.monotonic() > deadline:
                said = process.stdout.read() if process.poll() is not None else b"(no socket)"
                raise AssertionError(f"{' '.join(command)}: {said.decode(errors='replace')}")
            time.sleep(0.01)
        yield f"unix:{path}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@contextmanager
def serving_image(
    version: str, image: Path, path: Path, *options: str, form: str = "qcow2"
) -> Iterator[str]:
    """Serve an image by qemu-nbd for any number of clients."""
    command = [qemu_nbd(version), "-t", "-e", "9", "-f", form, "-k", str(path), *options]
    with running([*command, str(image)], path) as address:
        yield address


@contextmanager
def serving_nbdkit(path: Path, *arguments: str) -> Iterator[str]:
    """Serve by nbdkit."""
    with running([need("nbdkit"), "-f", "-U", str(path), *arguments], path) as address:
        yield address


def make_qcow2(path: Path, size: str, *writes: str, backing: Path | None = None) -> Path:
    """Make a qcow2 image, and write to it by commands of qemu-io."""
    more = ["-b", str(backing), "-F", "qcow2"] if backing else []
    create = [need("qemu-img"), "create", "-q", "-f", "qcow2", *more, str(path), size]
    subprocess.run(create, check=True)
    if writes:
        commands = [word for write in writes for word in ("-c", write)]
        subprocess.run(
            [need("qemu-io"), "-f", "qcow2", *commands, str(path)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return path
