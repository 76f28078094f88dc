"""Comparing two closed images, against qemu-img compare and cmp."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from qmpblock.testing.images import Tools

MIB = 1 << 20
QMPBLOCK = [sys.executable, "-m", "qmpblock"]


def verify(folder: Path, tools: Tools, rounds: int, data: int = 1024) -> None:
    """Compare `data` MiB of data in an image of twice that, each way in turn."""
    raw, other, qcow2 = folder / "one.raw", folder / "other.raw", folder / "copy.qcow2"
    _make(raw, data)
    subprocess.run(["cp", "--sparse=always", raw, other], check=True)
    subprocess.run([tools.img, "convert", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)
    ways = {
        "qemu-img compare": [tools.img, "compare", "-f", "raw", "-F", "qcow2", raw, qcow2],
        "cmp (raw and raw)": ["cmp", raw, other],
        "qmpblock verify": [*QMPBLOCK, "verify", raw, qcow2],
        "qmpblock verify --all": [*QMPBLOCK, "verify", raw, qcow2, "--all"],
    }
    print(f"\nTwo images of {2 * data} MiB with {data} MiB of data, {rounds} rounds in turn:")
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, command in ways.items():
            measured[name].append(_run([str(word) for word in command]))
    base = measured["qemu-img compare"]
    for name, times in measured.items():
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        ratios = [(w / bw, c / bc) for (w, c), (bw, bc) in zip(times, base, strict=True)]
        by_wall, by_cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
        print(
            f"  {name:<24} {wall:>6.2f} s   ratio {by_wall:>5.2f}   "
            f"processor {cpu:>5.2f} s   ratio {by_cpu:>5.2f}"
        )


def _make(path: Path, data: int) -> None:
    """Write MiB of data and of holes in turn."""
    block = os.urandom(MIB)
    with path.open("wb") as file:
        file.truncate(2 * data * MIB)
        for number in range(data):
            file.seek(2 * number * MIB)
            file.write(number.to_bytes(8, "big") + block[8:])


def _run(command: list[str]) -> tuple[float, float]:
    """Return seconds, and those of the processor, of all processes together."""
    began, before = time.monotonic(), os.times()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system
    return time.monotonic() - began, used - before.children_user - before.children_system
