"""Long tests as rounds: tests/soak runs many of them, tests/live a few of each."""

import asyncio
import os
import random
import sys
from dataclasses import dataclass

import qmpblock
from qmpblock.export import LOCK
from qmpblock.testing.stamps import StressSpec, check_acknowledged

# Maps without end, in a process of its own that is there to be killed.
MAPPING = """
import asyncio, sys
import qmpblock
async def main():
    async with qmpblock.connect(sys.argv[1]) as vm:
        [disk] = await vm.disks()
        await disk.map()
        print("mapping", flush=True)
        while True:
            await disk.map()
asyncio.run(main())
"""


def rounds(default):
    """Return how many rounds to do, and the seed of their random choices."""
    seed = int(os.environ.get("QMPBLOCK_SEED") or random.SystemRandom().getrandbits(32))
    count = int(os.environ.get("QMPBLOCK_ROUNDS") or default)
    print(f"rounds: {count}, seed: {seed}")
    return count, random.Random(seed)


@dataclass
class Outcome:
    """What a run did, to be printed: `maps` by this process, `kills` of another."""

    maps: int = 0
    kills: int = 0
    writes: int = 0


async def maps_under_stress(vm, invariant, tools, chance, count, kills):
    """Map a disk `count` times while the guest stresses it; kill a controller `kills` times.

    The guest checks a part of its reads all the time and every block at the end; then the
    image of the closed VM is checked by the host.
    """
    outcome = Outcome()
    spec = StressSpec(
        offset=16 << 20,  # where the scenarios hold zeros, across the end of a short layer
        blocks=2048,
        block_size=4096,
        queue_depth=16,
        seed=chance.getrandbits(32),
        flush_every=200,
        read_percent=25,
    )
    await vm.guest.stress(spec)
    turns = ["map"] * count + ["kill"] * kills
    chance.shuffle(turns)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        for turn in turns:
            if turn == "map":
                found = await disk.map()
                assert found.length == disk.size
                outcome.maps += 1
            else:
                await killed_in_the_middle(vm, chance)
                outcome.kills += 1
        progress = await vm.guest.progress()
        assert progress.running, progress
    objects = {item["name"] for item in await vm.execute("qom-list", path="/objects")}
    assert LOCK not in objects
    assert await vm.execute("query-block-exports") == []
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert await vm.guest.check() > 0
    outcome.writes = done.acked
    await invariant.verify(vm)
    invariant.forget(vm)
    await vm.quit()
    raw = vm.directory / "content.raw"
    active = vm.disks[0].active
    await tools.run(
        tools.img, "convert", "-f", active.spec.format, "-O", "raw", str(active.path), str(raw)
    )
    data = raw.read_bytes()[spec.offset : spec.offset + spec.length]
    verdict = check_acknowledged(data, spec, done.acked, done.issued, background=0)
    assert verdict.ok, verdict
    await active.check(tools)
    return outcome


async def killed_in_the_middle(vm, chance):
    """Let another controller map, by the second monitor, and kill it -9 at some moment."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MAPPING, vm.second_monitor_path, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert (await process.stdout.readline()).strip() == b"mapping"
        await asyncio.sleep(chance.random() * 0.1)
    finally:
        process.kill()
        await process.wait()
    assert vm.running, vm.evidence()
    await vm.execute("query-status")
    # Whoever comes next undoes it; by the same monitor, so that no descriptor is left either.
    async with qmpblock.connect(vm.second_monitor_path) as controller:
        await (await controller.disks())[0].map()
