"""What of copies has host space, and how their images are made: as was asked for."""

import asyncio
import contextlib
import json
import os
import subprocess
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from chains import cli
from disturbed import nothing_of_ours
from loopdevices import loop, xfs
from nbdservers import serving

import qmpblock
from qmpblock.copying import reservation
from qmpblock.copying.backups import Backups
from qmpblock.copying.copy import copy
from qmpblock.copying.hostspace import space_of, verify_space
from qmpblock.copying.targetfile import TargetFile
from qmpblock.errors import Error, RequestError, UnsupportedError
from qmpblock.extents import AllocationMap
from qmpblock.host.fallocate import punch_hole
from qmpblock.host.space import shared_ranges
from qmpblock.testing import Tools, build, parse_scenario
from qmpblock.testing.faults import fill_up, small_file_system
from qmpblock.testing.stamps import StressSpec, check_point_in_time

pytestmark = pytest.mark.live

MIB = 1 << 20
SIZE = 64 * MIB
SPEC = StressSpec(
    offset=48 * MIB, blocks=1024, block_size=4096, queue_depth=4, seed=9, flush_every=20, rate=150
)

#: Data, zeros that are stored as data, and (raw, frozen) zeros that are reserved.
DISKS = {
    "qcow2": "images: [{size: 64M, content: [write 1M 2M 0xaa, write 8M 1M 0x00]}]",
    "chain": "images: [{size: 64M, content: [write 1M 2M 0xaa, write 16M 1M 0xbb]},"
    " {content: [write 8M 1M 0x00, write 16M 64K 0xcc]}]",
    "raw": "images: [{format: raw, size: 64M, content: [write 1M 2M 0xaa, write 8M 1M 0x00]}]",
    "discarding": "images: [{format: raw, size: 64M, content: [write 1M 2M 0xaa,"
    " write 8M 1M 0x00]}]\nattach: {discard: unmap, detect_zeroes: unmap}",
}
POINTS = ("start", "end", "pivot")
RESERVED = (32 * MIB, 33 * MIB)  # of the raw ones


async def running(kind, start_qemu, vm_dir, qemu_binary):
    scenario = parse_scenario(f"about: A disk.\n{DISKS[kind]}\n", kind)
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    if "raw" in DISKS[kind]:
        [file] = [path for path in (vm_dir / "images").iterdir() if path.stat().st_size == SIZE]
        offset, length = str(RESERVED[0]), str(RESERVED[1] - RESERVED[0])
        subprocess.run(["fallocate", "-n", "-o", offset, "-l", length, file], check=True)
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    return vm


async def copied(vm, target, at="start", **options):
    """Copy the disk while its guest writes; return the job's result and the writer's bounds."""
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        layers = await disk.layers()
        model = AllocationMap.stack([one.map for one in layers])
        verify = options.pop("verify", at == "start")
        copying = copy(controller, {disk: target}, at=at, verify=verify, **options)
        async with AsyncExitStack() as stack:
            if at == "start":
                async with vm.guest.bounds(0) as bounds:
                    job = await stack.enter_async_context(copying)
            else:
                job = await stack.enter_async_context(copying)
            await asyncio.sleep(0.2)
            if at != "start":
                async with vm.guest.bounds(0) as bounds:
                    await job.complete()
    return job.result, bounds[0], model


def content(path, fmt):
    raw = path.with_name("content.raw")
    subprocess.run(["qemu-img", "convert", "-U", "-f", fmt, "-O", "raw", path, raw], check=True)
    data = raw.read_bytes()
    raw.unlink()
    return data


def check_bytes(data, bounds=None):
    assert data[MIB : 3 * MIB] == b"\xaa" * (2 * MIB)
    assert data[4 * MIB : 16 * MIB] == bytes(12 * MIB)
    assert data[32 * MIB : 48 * MIB] == bytes(16 * MIB)
    if bounds is not None:
        found = check_point_in_time(data[SPEC.offset : SPEC.offset + 4 * MIB], SPEC, bounds)
        assert found.ok, found


async def unharmed(vm):
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    await nothing_of_ours(vm)
    assert await vm.guest.check() > 0


async def own_map(path, fmt):
    image = await qmpblock.closed_image(path, format=fmt)
    return (await image.layers(reserved=True))[0].map


@pytest.mark.parametrize("at", POINTS)
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
@pytest.mark.parametrize("kind", DISKS)
async def test_full(kind, fmt, at, start_qemu, vm_dir, qemu_binary, invariant):
    """Every byte has host space, zeros included, with which settings the disk has ever."""
    vm = await running(kind, start_qemu, vm_dir, qemu_binary)
    invariant.forget(vm)
    target = vm_dir / f"copy.{fmt}"
    if (fmt, at) == ("qcow2", "pivot") and vm.version < (10, 0, 0):
        with pytest.raises(UnsupportedError, match="gives back what it writes zeros to"):
            await copied(vm, target, at, format=fmt, allocation="full")
        assert not list(vm_dir.glob("copy*"))
        await unharmed(vm)
        return
    result, bounds, _ = await copied(vm, target, at, format=fmt, allocation="full")
    assert result.disks[0].allocation == "full"
    assert result.warnings == ()
    if at == "pivot":
        await settings_are_the_guests(vm, kind)
    await unharmed(vm)
    await vm.quit()
    found = await verify_space(await qmpblock.closed_image(target, format=fmt), "full")
    assert found.as_asked, found
    assert target.stat().st_blocks * 512 >= SIZE
    check_bytes(content(target, fmt), bounds if at != "pivot" else None)


async def settings_are_the_guests(vm, kind):
    [disk] = [one for one in await vm.execute("query-block") if one.get("inserted")]
    wanted = "unmap" if kind == "discarding" else "off"
    assert disk["inserted"]["detect_zeroes"] == wanted


@pytest.mark.parametrize("at", POINTS)
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
@pytest.mark.parametrize("kind", DISKS)
async def test_like(kind, fmt, at, start_qemu, vm_dir, qemu_binary, invariant):
    """Zeros that the disk stores, or has reserved, are in the copy, and others are not."""
    vm = await running(kind, start_qemu, vm_dir, qemu_binary)
    invariant.forget(vm)
    target = vm_dir / f"copy.{fmt}"
    if (fmt, at) == ("qcow2", "pivot") and "raw" in DISKS[kind]:  # with zeros that are reserved
        # And more, where the guest has just written: what is not written back is reserved yet.
        with pytest.raises(UnsupportedError, match=r"host space for \d{7} bytes of zeros"):
            await copied(vm, target, at, format=fmt, allocation="like")
        assert not list(vm_dir.glob("copy*"))
        await unharmed(vm)
        return
    result, bounds, model = await copied(vm, target, at, format=fmt, allocation="like")
    assert result.disks[0].allocation == "like"
    assert result.warnings == ()
    if at == "pivot":
        await settings_are_the_guests(vm, kind)
    await unharmed(vm)
    await vm.quit()
    asked = space_of(model).align_out(64 << 10)
    assert 9 * MIB - 1 in asked
    assert (RESERVED[0] in asked) is ("raw" in DISKS[kind])
    held = space_of(await own_map(target, fmt)).align_out(64 << 10)
    where = SPEC.offset, SPEC.offset + SPEC.blocks * SPEC.block_size  # the guest's
    quiet = asked.clip(0, where[0]).union(asked.clip(where[1], SIZE - where[1]))
    seen = held.clip(0, where[0]).union(held.clip(where[1], SIZE - where[1]))
    assert asked.difference(held).total == 0, (asked, held)
    assert list(seen) in (list(quiet), list(quiet.union(type(quiet)([(0, 64 << 10)]))))
    check_bytes(content(target, fmt), bounds if at != "pivot" else None)


@pytest.mark.parametrize("at", POINTS)
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
@pytest.mark.parametrize("kind", DISKS)
async def test_thin(kind, fmt, at, start_qemu, vm_dir, qemu_binary, invariant):
    """Zeros take nothing, stored ones, too; but where the guest goes over they are as they were."""
    vm = await running(kind, start_qemu, vm_dir, qemu_binary)
    invariant.forget(vm)
    target = vm_dir / f"copy.{fmt}"
    _, bounds, _ = await copied(vm, target, at, format=fmt)
    if at == "pivot":
        await settings_are_the_guests(vm, kind)
    await unharmed(vm)
    await vm.quit()
    held = space_of(await own_map(target, fmt))
    assert RESERVED[0] not in held
    assert 24 * MIB not in held
    if at != "pivot":
        assert 8 * MIB + 1 not in held
    check_bytes(content(target, fmt), bounds if at != "pivot" else None)


@pytest.mark.parametrize("allocation", ["full", "like"])
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
async def test_a_copy_that_goes_on_from_a_thin_one(
    fmt, allocation, start_qemu, vm_dir, qemu_binary
):
    """It is allocated as it is asked for, whatever was there."""
    vm = await running("raw", start_qemu, vm_dir, qemu_binary)
    target = vm_dir / f"copy.{fmt}"
    await copied(vm, target, format=fmt)
    target.rename(f"{target}.partial")
    result, bounds, _ = await copied(vm, target, format=fmt, allocation=allocation, resume=True)
    assert (result.verified, result.warnings) == (True, ())
    assert result.disks[0].missing < SIZE // 2
    if allocation == "full":
        assert target.stat().st_blocks * 512 >= SIZE
    check_bytes(content(target, fmt), bounds)
    await unharmed(vm)


@contextlib.contextmanager
def sparse_loop(image):
    """Have an empty sparse file as a block device."""
    with image.open("wb") as file:
        file.truncate(SIZE)
    with loop(image) as device:
        yield device


@pytest.mark.parametrize("at", ["start", "end"])
async def test_full_on_a_device(at, start_qemu, vm_dir, qemu_binary):
    """What is thin below a device gets all of it; a thin copy of the end leaves that thin."""
    vm = await running("chain", start_qemu, vm_dir, qemu_binary)
    for allocation in ("thin", "full"):
        image = vm_dir / f"backing-{allocation}"
        with sparse_loop(image) as device:
            options = {"allocation": allocation, "force": True, "verify": False}
            await copied(vm, device, at, **options)
            taken = image.stat().st_blocks * 512
            if (allocation, at) != ("thin", "start"):
                assert (taken >= SIZE) is (allocation == "full")
        check_bytes(image.read_bytes())
    await unharmed(vm)


@pytest.mark.parametrize("at", ["start", "end"])
async def test_full_at_a_server(at, start_qemu, vm_dir, qemu_binary):
    """It is told to make no holes, of any zeros; where QEMU does not, that is refused."""
    vm = await running("chain", start_qemu, vm_dir, qemu_binary)
    for allocation in ("thin", "full"):
        if (allocation, at) == ("full", "end") and vm.version >= (8, 0, 0):
            with pytest.raises(UnsupportedError, match="writes no zeros") as caught:
                await copied(vm, "nbd://h/t", at, allocation=allocation, verify=False)
            assert caught.value.standing == "nothing was touched"
            continue
        image, socket = vm_dir / f"served-{allocation}", vm_dir / f"socket-{allocation}"
        with image.open("wb") as file:
            file.truncate(SIZE)
        async with serving(image, "--discard=unmap", path=socket):
            uri = f"nbd+unix:///t?socket={socket}"
            await copied(vm, uri, at, allocation=allocation, verify=False)
        taken = image.stat().st_blocks * 512
        assert (taken >= SIZE) is (allocation == "full"), taken
        check_bytes(image.read_bytes())
    await unharmed(vm)


@pytest.mark.parametrize(
    ("fmt", "allocation"), [("qcow2", "full"), ("raw", "full"), ("raw", "like")]
)
async def test_without_the_room(fmt, allocation, start_qemu, vm_dir, qemu_binary):
    """It is refused before anything is touched, where a thin copy has room enough."""
    vm = await running("raw", start_qemu, vm_dir, qemu_binary)
    wanted = 40 * MIB if allocation == "full" else 2 * MIB
    async with small_file_system(vm_dir / "small", 40 * MIB) as small:
        if allocation == "like":
            fill_up(small, leave=wanted)
        with pytest.raises(UnsupportedError, match="be reserved for") as caught:
            await copied(vm, small / "copy", format=fmt, at="end", allocation=allocation)
        assert caught.value.standing == "nothing was touched"
        assert not [one for one in small.iterdir() if one.name.startswith("copy")]
        if allocation == "full":
            await copied(vm, small / "copy", format=fmt, at="end")
    await unharmed(vm)


async def test_a_copy_that_lost_its_space_is_not_kept(start_qemu, vm_dir, qemu_binary, monkeypatch):
    """The proof finds what is missing of what was asked for."""
    vm = await running("qcow2", start_qemu, vm_dir, qemu_binary)
    settle = TargetFile.settle

    async def loses(self, vm):
        await settle(self, vm)
        with open(self.path, "r+b") as file:
            punch_hole(file.fileno(), 32 * MIB, 4 * MIB)

    monkeypatch.setattr(TargetFile, "settle", loses)
    with pytest.raises(Error, match=r"4M of it have no host space.*is not kept"):
        await copied(vm, vm_dir / "copy.raw", format="raw", allocation="full")
    assert not list(vm_dir.glob("copy*"))
    await unharmed(vm)


@pytest.mark.parametrize("at", POINTS)
@pytest.mark.parametrize("cluster", [512, 4096, 2 * MIB])
async def test_clusters(cluster, at, start_qemu, vm_dir, qemu_binary, invariant):
    vm = await running("chain", start_qemu, vm_dir, qemu_binary)
    invariant.forget(vm)
    target = vm_dir / "copy.qcow2"
    _, bounds, _ = await copied(vm, target, at, format="qcow2", cluster_size=cluster)
    await unharmed(vm)
    await vm.quit()
    told = subprocess.run(
        ["qemu-img", "info", "--output=json", target], capture_output=True, check=True
    )
    assert json.loads(told.stdout)["cluster-size"] == cluster
    subprocess.run(["qemu-img", "check", "-q", target], check=True)
    check_bytes(content(target, "qcow2"), bounds if at != "pivot" else None)


@pytest.mark.parametrize("kind", DISKS)
async def test_compressed(kind, start_qemu, vm_dir, qemu_binary):
    vm = await running(kind, start_qemu, vm_dir, qemu_binary)
    target = vm_dir / "copy.qcow2"
    result, bounds, _ = await copied(vm, target, format="qcow2", compress=True)
    assert (result.verified, result.disks[0].compressed) == (True, True)
    await unharmed(vm)
    clusters = json.loads(
        subprocess.run(
            ["qemu-img", "check", "--output=json", target], capture_output=True, check=True
        ).stdout
    )
    assert clusters["compressed-clusters"] == clusters["allocated-clusters"] > 0
    assert target.stat().st_blocks * 512 < 2 * MIB
    check_bytes(content(target, "qcow2"), bounds)


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
async def test_past_the_page_cache(fmt, at, start_qemu, vm_dir, qemu_binary):
    vm = await running("chain", start_qemu, vm_dir, qemu_binary)
    target = vm_dir / "copy"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with copy(controller, {disk: target}, at=at, format=fmt, direct=True, speed=8 * MIB):
            nodes = await vm.execute("query-named-block-nodes")
            ours = [one for one in nodes if one["node-name"].startswith("qmpblock-")]
            ours = [one for one in ours if "-to-" in one["node-name"]]
            assert len(ours) == 2
            assert all(one["cache"]["direct"] for one in ours)
    cached = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "-o", "RES", target], capture_output=True, check=True
    )
    assert int(cached.stdout) < 2 * MIB, cached  # a copy through the cache leaves all of it there
    await unharmed(vm)
    check_bytes(content(target, fmt))


async def test_past_the_cache_of_a_device(start_qemu, vm_dir, qemu_binary):
    vm = await running("chain", start_qemu, vm_dir, qemu_binary)
    image = vm_dir / "backing"
    with sparse_loop(image) as device:
        options = {"direct": True, "force": True, "verify": False}
        await copied(vm, device, "end", **options)
    check_bytes(image.read_bytes())
    await unharmed(vm)


async def test_a_file_system_that_can_neither(start_qemu, vm_dir, qemu_binary, monkeypatch):
    vm = await running("qcow2", start_qemu, vm_dir, qemu_binary)
    for name, answer, options, words in (
        ("direct_unit", None, {"direct": True}, "past the page cache"),
        ("direct_unit", 3 * MIB, {"direct": True}, "no multiple"),
        ("reserves", False, {"allocation": "full"}, "reserves no space"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(reservation, name, lambda _, answer=answer: answer)
            with pytest.raises(UnsupportedError, match=words) as caught:
                await copied(vm, vm_dir / "copy", "end", format="raw", **options)
        assert caught.value.standing == "nothing was touched"
    assert not list(vm_dir.glob("copy*"))
    await unharmed(vm)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vd0=a.raw", "--cluster-size", "64K", "--format", "raw"], "--cluster-size is of qcow2"),
        (["vd0=a", "--cluster-size", "3000"], "power of two"),
        (["vd0=a", "--cluster-size", "4M"], "power of two"),
        (["vd0=a", "--compress", "--at", "end"], "cannot be compressed"),
        (["vd0=a", "--compress", "--pivot"], "cannot be compressed"),
        (["vd0=a", "--compress", "--format", "raw"], "knows no compression"),
        (["vd0=a", "--compress", "--allocation", "full"], "--allocation full"),
        (["vd0=a", "--allocation", "full", "--layers", "top"], "--layers top"),
        (["vd0=a", "--direct", "--pivot"], "leave --direct out"),
        (["vd0=nbd://h/t", "--direct"], "no page cache of this host"),
        (["vd0=a", "--reflink", "--at", "end"], "shares no blocks"),
        (["vd0=a", "--reflink", "--compress"], "wants others"),
        (["vd0=nbd://h/t", "--reflink"], "two files of one file system"),
        (["vd0=nbd://h/t", "--allocation", "like"], "by itself"),
        (["vd0=nbd://h/t", "--cluster-size", "64K"], "is to be raw"),
        (["vd0=a", "--compress", "--resume"], "takes no compress"),
        (["vd0=a", "--cluster-size", "64K", "--resume"], "takes no cluster_size"),
    ],
)
async def test_what_makes_no_sense_is_refused(words, said, start_qemu, vm_dir, qemu_binary):
    vm = await running("chain", start_qemu, vm_dir, qemu_binary)
    code, out, err = await cli("copy", vm.monitor_path, *words)
    assert (code, out) == (2, ""), err
    assert said in err
    assert "nothing was touched" in err
    await unharmed(vm)


async def test_it_is_told_of(start_qemu, vm_dir, qemu_binary):
    vm = await running("chain", start_qemu, vm_dir, qemu_binary)
    words = ("vd0=" + str(vm_dir / "a"), "--allocation", "full", "--format", "raw", "--direct")
    code, out, err = await cli("copy", vm.monitor_path, *words)
    assert code == 0, err
    assert "raw, 64M, allocated in full, as it was when the copy began" in out
    words = ("vd0=" + str(vm_dir / "b"), "--compress", "--cluster-size", "128K")
    code, out, err = await cli("copy", vm.monitor_path, *words)
    assert code == 0, err
    assert "qcow2, 64M, compressed, as it was" in out
    await unharmed(vm)


def taken_of(place):
    subprocess.run(["sync", "-f", place], check=True)
    seen = os.statvfs(place)
    return (seen.f_blocks - seen.f_bfree) * seen.f_frsize


LARGE = {
    "raw": "[{format: raw, size: 256M, content: [write 1M 96M 0xaa]}]",
    "qcow2": "[{size: 256M, content: [write 1M 96M 0xaa]}]",
    "chain": "[{size: 256M, content: [write 1M 64M 0xaa]}, {content: [write 65M 32M 0xaa]}]",
}


@pytest.mark.parametrize("layers", ["all", "top"])
@pytest.mark.parametrize("kind", LARGE)
async def test_blocks_are_shared(kind, layers, start_qemu, vm_dir, qemu_binary, invariant):
    """It takes next to nothing, and is the point in time all the same."""
    with xfs(vm_dir) as place:
        scenario = parse_scenario(f"about: A disk.\nimages: {LARGE[kind]}\n", kind)
        built = await build(scenario, place / "images", Tools.of(qemu_binary))
        vm = await start_qemu(built, guest=True)
        invariant.forget(vm)
        await vm.guest.stress(replace(SPEC, offset=128 * MIB))
        before, target = taken_of(place), place / "copy"
        result, _, _ = await copied(vm, target, reflink=True, layers=layers)
        assert (result.verified, result.warnings) == (True, ())
        grown = taken_of(place) - before
        print(f"{kind}, {layers}: {result.seconds:.2f} s, {grown / MIB:.1f} MiB taken")
        assert grown < 24 * MIB  # what the guest wrote meanwhile, and tables
        shared = shared_ranges(str(target), target.stat().st_size)
        assert shared.total >= (32 if (kind, layers) == ("chain", "top") else 96) * MIB
        await unharmed(vm)
        await vm.quit()
        if layers == "all":
            fmt = result.disks[0].format
            assert content(target, fmt)[MIB : 97 * MIB] == b"\xaa" * (96 * MIB)


@pytest.mark.parametrize("kind", LARGE)
async def test_blocks_are_shared_of_what_was_missing(
    kind, start_qemu, vm_dir, qemu_binary, invariant
):
    """Of a copy that was broken off, or was another's: what is there stays as it is."""
    with xfs(vm_dir) as place:
        scenario = parse_scenario(f"about: A disk.\nimages: {LARGE[kind]}\n", kind)
        built = await build(scenario, place / "images", Tools.of(qemu_binary))
        vm = await start_qemu(built, guest=True)
        invariant.forget(vm)
        await vm.guest.stress(replace(SPEC, offset=128 * MIB))
        target, partial = place / "copy", place / "copy.partial"
        first, _, _ = await copied(vm, target, reflink=True)
        fmt = first.disks[0].format
        target.rename(partial)
        spoil = ("write -P 0xee 8M 8M", "write -z 30M 4M", "discard 40M 8M")
        words = [word for one in spoil for word in ("-c", one)]
        subprocess.run(["qemu-io", "-d", "unmap", "-f", fmt, *words, partial], check=True)
        before = taken_of(place)
        result, _, _ = await copied(vm, target, reflink=True, resume=True)
        assert (result.verified, result.warnings) == (True, ())
        assert 20 * MIB <= result.disks[0].missing < 40 * MIB
        grown = taken_of(place) - before
        print(f"{kind}: {grown / MIB:.1f} MiB taken")
        assert grown < 8 * MIB  # of 20 that were copied
        shared = shared_ranges(str(target), target.stat().st_size)
        assert shared.total >= 96 * MIB
        await unharmed(vm)
        await vm.quit()
        assert content(target, fmt)[MIB : 97 * MIB] == b"\xaa" * (96 * MIB)


async def test_what_shares_no_blocks_is_refused(start_qemu, vm_dir, qemu_binary, invariant):
    with xfs(vm_dir) as place:
        vm = await running("chain", start_qemu, vm_dir, qemu_binary)
        invariant.forget(vm)
        for target, words in (
            (place / "copy", "on the same file system"),
            (vm_dir / "copy", "no two files share blocks"),
        ):
            with pytest.raises(UnsupportedError, match=words) as caught:
                await copied(vm, target, reflink=True)
            assert caught.value.standing == "nothing was touched"
            assert not target.exists()
        await unharmed(vm)
        await vm.quit()


async def test_blocks_that_are_not_shared_are_warned_of(
    start_qemu, vm_dir, qemu_binary, monkeypatch, invariant
):
    arguments = Backups.arguments

    def copies(self, target):
        said = arguments(self, target)
        return said | {"x-perf": said["x-perf"] | {"use-copy-range": False}}

    with xfs(vm_dir) as place:
        scenario = parse_scenario(f"about: A disk.\nimages: {LARGE['raw']}\n", "raw")
        built = await build(scenario, place / "images", Tools.of(qemu_binary))
        vm = await start_qemu(built, guest=True)
        invariant.forget(vm)
        await vm.guest.stress(replace(SPEC, offset=128 * MIB))
        monkeypatch.setattr(Backups, "arguments", copies)
        result, _, _ = await copied(vm, place / "copy", reflink=True)
        [warning] = result.warnings
        assert ", 0 are shared with the disk's files" in warning
        await unharmed(vm)
        await vm.quit()


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("more", [{}, {"cluster_size": 4096}, {"compress": True}])
async def test_an_image_at_a_server(more, at, start_qemu, vm_dir, qemu_binary):
    """It is one as in a file, over whatever was there, and on the server's storage."""
    if at == "end" and "compress" in more:
        pytest.skip("that is refused")
    vm = await running("chain", start_qemu, vm_dir, qemu_binary)
    image, socket = vm_dir / "served", vm_dir / "socket"
    image.write_bytes(b"\xee" * (SIZE + 4 * MIB))
    async with serving(image, path=socket):
        uri = f"nbd+unix:///t?socket={socket}"
        result, bounds, _ = await copied(vm, uri, at, format="qcow2", verify=False, **more)
    assert result.disks[0].format == "qcow2"
    await unharmed(vm)
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", image], check=True)
    check_bytes(content(image, "qcow2"), bounds)


async def test_no_image_at_a_server_that_is_too_small(start_qemu, vm_dir, qemu_binary):
    vm = await running("chain", start_qemu, vm_dir, qemu_binary)
    image, socket = vm_dir / "served", vm_dir / "socket"
    image.write_bytes(b"\xee" * SIZE)
    async with serving(image, path=socket):
        uri = f"nbd+unix:///t?socket={socket}"
        with pytest.raises(RequestError, match="in a qcow2 image"):
            await copied(vm, uri, "end", format="qcow2")
    assert image.read_bytes() == b"\xee" * SIZE
    await unharmed(vm)


@pytest.mark.parametrize("shielded", [False, True])
async def test_what_a_mirror_does_with_zeros(shielded, start_qemu, vm_dir, qemu_version):
    """Before 10.0 they take away what a qcow2 target has, but through a raw node (F27)."""
    vm = await start_qemu(parse_scenario("about: Empty.\nimages: [{size: 64M}]\n", "empty"))
    target = vm_dir / "target.qcow2"
    options = ("-q", "-f", "qcow2", "-o", "preallocation=metadata")
    subprocess.run(["qemu-img", "create", *options, target, "64M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -q -P 7 0 64M", target], check=True)
    file = {"driver": "file", "filename": str(target)}
    image = {"driver": "qcow2", "node-name": "i", "discard": "ignore", "file": file}
    await vm.execute("blockdev-add", **image)
    if shielded:
        await vm.execute("blockdev-add", **{"driver": "raw", "node-name": "r", "file": "i"})
    to = "r" if shielded else "i"
    await vm.execute(
        "blockdev-mirror", **{"job-id": "m", "device": "d0", "target": to, "sync": "full"}
    )
    while [one["status"] for one in await vm.execute("query-jobs")] != ["ready"]:
        await asyncio.sleep(0.01)
    await vm.execute("block-job-cancel", device="m")
    while await vm.execute("query-jobs"):
        await asyncio.sleep(0.01)
    for node in ("r", "i")[not shielded :]:
        await vm.execute("blockdev-del", **{"node-name": node})
    held = space_of(await own_map(target, "qcow2")).total
    assert held == (SIZE if shielded or qemu_version >= (10, 0, 0) else 0)
