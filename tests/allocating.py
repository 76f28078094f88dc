"""What the live tests of allocation share: every disk of every scenario, and the verdict."""

import contextlib
import inspect
import json
from collections import Counter

import pytest
from chaincases import FIXTURES, images_of
from chains import convert, subjects

import qmpblock
from qmpblock.allocation.plan import below
from qmpblock.ranges import Ranges
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import load_scenarios, parse_scenario
from qmpblock.testing.stamps import StressSpec, check_acknowledged

STAGED = ("qcow2", "qed")


def disks(wanted=lambda scenario, chain: True):
    """Return pytest's parameters (scenario, disk) of every disk whose chain is wanted."""
    params = []
    for scenario in load_scenarios(FIXTURES):
        marks = []
        if scenario.requires is not None:
            needs = scenario.requires
            marks.append(pytest.mark.needs_qemu(needs.text, reason=needs.reason))
        for disk in scenario.disks:
            if wanted(scenario, images_of(scenario, disk.name)):
                name = f"{scenario.name}-{disk.name}"
                params.append(pytest.param(scenario, disk.name, id=name, marks=marks))
    return params


def has_subclusters(image):
    return dict(image.options).get("extended_l2") == "on"


def is_raw_inside(image):
    """Whether the format stores the data as it is, in one file."""
    return image.format in ("raw", "luks") or dict(image.options).get("data_file_raw") == "on"


async def started(scenario, name, start_qemu, vm_dir, qemu_binary):
    """Run a scenario whose guest writes to a quiet area of every disk; return VM and subjects."""
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    every = await subjects(built, vm_dir)
    vm = await start_qemu(built, guest=True)
    for one in every.values():
        await one.attach(vm)
    return vm, every


async def ended(vm, every):
    """End the guest and the VM; every image must hold what it should."""
    for one in every.values():
        await one.writer.stop()
    await vm.quit()
    for one in every.values():
        await one.verify()


def area_of(subject, cluster):
    """Return the clusters that the guest writes to all the time."""
    area = subject.area
    whole = Ranges([(area.offset, area.offset + area.length)])
    return whole.align_out(cluster)


def check_thin(before, after, cluster, size, ignored, first=0, count=None):
    """Compare the maps around a thin allocation of [first, first + count), `ignored` apart."""
    span = Ranges([(first, size if count is None else first + count)])
    came = (below(before) & span).align_out(cluster, size)
    assert below(after) & span - ignored == Ranges(), "something is below still"
    assert below(after) - ignored == below(before) - span - ignored, "more was done than asked"
    # Blank stays blank, but for the rest of a cluster of which a part came up.
    assert after.holes() - came - ignored == before.holes() - came - ignored
    # Zeros stay zeros, wherever a cluster of the active layer has nothing else.
    data = (before.data() & came).align_out(cluster, size)
    zeros = (came - data - ignored).align_in(cluster, size)
    assert zeros - after.where(depth=0, present=True, zero=True, data=False) == Ranges()
    # Data comes up; where a request finds nothing but zeros in it, QEMU stores them as zeros.
    assert (before.data() & span) - ignored - after.where(depth=0, present=True) == Ranges()


async def without_space(subject, tools):
    """Return the ranges of a closed active image that have no host space."""
    active = subject.layers[0]
    if is_raw_inside(active.spec):
        # As many blocks as the disk has; a LUKS header may have holes besides.
        file = active.data_file or active.path
        missing = active.spec.size - file.stat().st_blocks * 512
        return Ranges([(0, missing)]) if missing > 0 else Ranges()
    description = active.describe()
    description["backing"] = None
    secrets = [
        word
        for name, data in active.secrets().items()
        for word in ("--object", f"secret,id={name},data={data.replace(',', ',,')}")
    ]
    printed = await tools.run(
        tools.img, "map", *secrets, "--output=json", "json:" + json.dumps(description)
    )
    return Ranges(
        (record["start"], record["start"] + record["length"])
        for record in json.loads(printed)
        if "offset" not in record and not (record["data"] and record["present"])
    )


# -- one disk, blank where its guest writes

BLANK = """
about: A chain that holds nothing from 4 MiB on.
attach: {discard: unmap}
images:
  - {size: 64M, content: [write 0 1M 0xaa]}
  - {format: FORMAT, size: 64M, content: [write 1M 64K 0xbb, zero 2M 1M]}
"""


def blank(fmt="qcow2"):
    """Return a scenario of one chain, blank from 4 MiB on."""
    return parse_scenario(BLANK.replace("FORMAT", fmt), f"blank-{fmt}")


@contextlib.contextmanager
def at_command(monitor, number, act, moment="before"):
    """Call `act` (which may be async) before or after the Nth command; yields the trace.

    :param number: counted from 1, or a command's name for its first.
    """
    trace, real, done = [], monitor._execute, []

    async def execute(name, arguments):
        trace.append(name)
        mine = not done and number in (len(trace), name)
        if mine:
            done.append(name)
        if mine and moment == "before":
            await maybe(act())
        try:
            return await real(name, arguments)
        finally:
            if mine and moment == "after":
                await maybe(act())

    monitor._execute = execute
    try:
        yield trace
    finally:
        monitor._execute = real


async def maybe(value):
    return await value if inspect.isawaitable(value) else value


async def content(image, tools):
    """Return what the guest of a closed image would read."""
    raw = image.path.with_name("content.raw")
    await convert(tools, image, image.describe(), raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


# -- rounds of allocation of the very ranges that the guest writes to

_MIB = 1 << 20
_AREA = 8 * _MIB  # both where the area begins, and how long it is


async def allocations_under_stress(vm, tools, chance, count):
    """Allocate what the guest writes to, thin or full by chance, `count` times; return how often.

    The verifier reads back every block after each round, and the host does at the end.
    """
    done = Counter()
    # QED discards nothing, and what a round before left would be taken for torn writes.
    fmt = vm.disks[0].active.spec.format
    clear = vm.guest.discard if fmt == "qcow2" else vm.guest.write_zeroes
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        for number in range(count):
            how = chance.choice(["thin", "full"])
            overlay = vm.directory / f"round{number}.qcow2"
            await clear(0, _AREA, _AREA)
            if how == "thin":
                # Half of it lies below then, so that the rest is zeros and blank.
                await vm.guest.fill(0, _AREA, _AREA // 2, 0)
                await disk.snapshot(overlay)
            spec = StressSpec(
                offset=_AREA,
                blocks=_AREA // 4096,
                block_size=4096,
                queue_depth=chance.choice([1, 8, 32]),
                seed=chance.getrandbits(32),
                flush_every=chance.choice([0, 20, 200]),
                read_percent=20,
            )
            await vm.guest.stress(spec)
            offset = _AREA + chance.randrange(_AREA // 2)
            result = await disk.allocate(offset, _AREA // 2, full=how == "full")
            end = await vm.guest.stop_stress()
            assert (end.bad, end.errors) == (0, 0), (spec, end)
            assert await vm.guest.check() > 0
            first = Ranges([(result.rounded_offset, result.rounded_offset + _AREA // 2)])
            assert not below(await disk.map()) & first
            if how == "thin":
                async with disk.commit(base="@1") as job:
                    job.complete()
                assert await vm.guest.check() > 0
                overlay.unlink()
            done[how] += 1
    await vm.quit()
    active = vm.disks[0].active
    data = (await content(active, tools))[_AREA : 2 * _AREA]
    verdict = check_acknowledged(data, spec, end.acked, end.issued)
    assert verdict.ok, (spec, verdict)
    await active.check(tools)
    return done
