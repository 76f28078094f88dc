"""Many VMs of one host: what `vms`, `metrics`, and the maps of all take, each in one process.

And beside them `map` of each in turn, a command of its own.

python -m bench.fleet [--vms N ...] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qmpblock.host.processes import die_with_parent
from qmpblock.testing.images import Tools, find_qemu

QMPBLOCK = [sys.executable, "-m", "qmpblock"]
#: What `map --totals` says, of all VMs, by one process.
MAPS = """
import asyncio, json, sys
import qmpblock

async def totals(address, few):
    async with few, qmpblock.connect(address) as vm:
        disk = await vm.disk("vd0")
        return (await disk.map()).totals().as_json(size=disk.size)

async def all_of(addresses):
    few = asyncio.Semaphore(64)
    return await asyncio.gather(*(totals(address, few) for address in addresses))

json.dump(asyncio.run(all_of(sys.argv[1:])), sys.stdout)
"""
_MACHINE = ("-M", "pc", "-m", "16", "-S", "-accel", "tcg", "-nodefaults", "-display", "none")


def fleet(folder: Path, tools: Tools, vms: int, rounds: int) -> None:
    """Measure each command over so many VMs, each of one disk of two layers."""
    with _running(folder, tools, vms) as addresses:
        ways = {
            "vms": ["vms", "--json"],
            "metrics --no-map": ["metrics", "--no-map", "--json", *addresses],
            "metrics": ["metrics", "--json", *addresses],
        }
        print(f"\n{vms} VMs, {rounds} rounds in turn:")
        measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        _run([*QMPBLOCK, *ways["metrics"]], vms)  # until all of them have come up
        measured |= {"maps of all": [], "map of each": []}
        for _ in range(rounds):
            for name, words in ways.items():
                measured[name].append(_run([*QMPBLOCK, *words], vms))
            measured["maps of all"].append(_map_all(addresses))
            measured["map of each"].append(_map_each(addresses))
        for name, times in measured.items():
            wall, cpu, memory = (statistics.median(column) for column in zip(*times, strict=True))
            print(
                f"  {name:<20} {wall:>6.2f} s   processor {cpu:>6.2f} s   "
                f"{1000 * wall / vms:>5.1f} ms a VM   {memory:>4.0f} MiB"
            )


@contextmanager
def _running(folder: Path, tools: Tools, vms: int) -> Iterator[list[str]]:
    """Run them; return their addresses."""
    _make(folder, tools, vms)
    processes = []
    try:
        for number in range(vms):
            disk = {"driver": "qcow2", "node-name": "d0"}
            disk["file"] = {"driver": "file", "filename": str(folder / f"{number}.qcow2")}
            command = [
                *(find_qemu(), *_MACHINE, "-name", f"vm{number}", "-blockdev", json.dumps(disk)),
                *("-device", "virtio-blk-pci,drive=d0,id=vd0"),
                *("-qmp", f"unix:{folder}/{number}.qmp,server=on,wait=off"),
            ]
            processes.append(subprocess.Popen(command, preexec_fn=die_with_parent()))
        addresses = [str(folder / f"{number}.qmp") for number in range(vms)]
        while not all(Path(one).exists() for one in addresses):
            time.sleep(0.1)
        yield addresses
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _make(folder: Path, tools: Tools, vms: int) -> None:
    base, first = folder / "base.qcow2", folder / "0.qcow2"
    for words in (
        [tools.img, "create", "-q", "-f", "qcow2", base, "1G"],
        [tools.io, "-f", "qcow2", "-c", "write -q 0 64M", base],
        [tools.img, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", first],
        [tools.io, "-f", "qcow2", "-c", "write -q 32M 64M", first],
    ):
        subprocess.run([str(word) for word in words], check=True)
    for number in range(1, vms):
        subprocess.run(["cp", "--sparse=always", first, folder / f"{number}.qcow2"], check=True)


def _map_all(addresses: list[str]) -> tuple[float, float, float]:
    """Map all in one process, by the library; return as `_run` does."""
    said, *used = _used([sys.executable, "-c", MAPS, *addresses])
    assert [len(one["totals"]) for one in said] == [2] * len(addresses), said
    wall, cpu, memory = used
    return wall, cpu, memory


def _map_each(addresses: list[str]) -> tuple[float, float, float]:
    """Map one after the other, by a command of its own; return as `_run` does, of all of them."""
    every = []
    for address in addresses:
        words = ("map", address, "vd0", "--totals", "--json")
        said, *used = _used([*QMPBLOCK, *words])
        assert len(said["totals"]) == 2, said  # each is of two layers
        every.append(used)
    wall, cpu, memory = zip(*every, strict=True)
    return sum(wall), sum(cpu), max(memory)


def _run(command: list[str], vms: int) -> tuple[float, float, float]:
    """Return seconds, those of the processor, and MiB; see that it told of all of them."""
    said, *used = _used(command)
    seen = said["vms"] if isinstance(said, dict) else said
    known = [one for one in seen if one.get("up") or one.get("status")]
    assert len(known) >= vms, len(known)
    wall, cpu, memory = used
    return wall, cpu, memory


def _used(command: list[str]) -> tuple[Any, float, float, float]:
    """Run one; return its document, seconds, those of the processor, and MiB."""
    with tempfile.TemporaryFile() as out:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=out)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - began
        out.seek(0)
        said = json.load(out)
    assert process.returncode == 0, process.returncode
    return said, wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m bench.fleet", description=__doc__)
    parser.add_argument("--vms", type=int, nargs="*", default=[1, 50, 200])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    tools = Tools.of()
    print(f"QEMU: {subprocess.check_output([tools.img, '--version'], text=True).splitlines()[0]}")
    for vms in given.vms:
        with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
            fleet(Path(folder), tools, vms, given.rounds)


if __name__ == "__main__":
    main()
