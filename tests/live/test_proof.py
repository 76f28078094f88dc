"""Copies of the start that are compared with their point before that is given up."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from disturbed import nothing_of_ours
from fleecing import MIB, SPEC, begin_writing, ran
from pointing import DISKS, SHOWN, STEPS, TWO, at_ease, written

import qmpblock
from qmpblock.copying import proof
from qmpblock.copying.copy import copy
from qmpblock.errors import BusyError, Error, NBDRequestError, UnsupportedError
from qmpblock.testing.scenario import parse_scenario
from qmpblock.testing.stamps import check_point_in_time

pytestmark = pytest.mark.live

PLACE = 16 * MIB + 123  # of a byte that the guest does not write
KINDS = ("raw", "chain", "throttle", "iothread", "luks")


async def content(path, fmt, secret=None):
    """Return what a guest would read from a copy."""
    raw = path.with_name("content.raw")
    if secret is None:
        command = ("qemu-img", "convert", "-f", fmt, "-O", "raw", path, raw)
    else:
        name = f"driver={fmt},encrypt.key-secret=key,file.filename={path}"
        key = ("--object", f"secret,id=key,data={secret}")
        command = ("qemu-img", "convert", *key, "--image-opts", "-O", "raw", name, raw)
    code, out = await ran(*command)
    assert code == 0, out
    data = raw.read_bytes()
    raw.unlink()
    return data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
async def test_a_copy_is_proven_while_the_guest_writes(kind, fmt, start_qemu, vm_dir, invariant):
    if kind == "luks" and fmt == "raw":
        pytest.skip("a raw copy would hold the plaintext, and is refused")
    vm = await start_qemu(parse_scenario(DISKS[kind], "disk"), guest=True)
    await begin_writing(vm)
    target = vm_dir / f"copy.{fmt}"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with AsyncExitStack() as stack:
            async with vm.guest.bounds(0) as bounds:
                copying = copy(controller, {disk: target}, format=fmt, verify=True)
                job = await stack.enter_async_context(copying)
            seen = [one async for one in job]
            await written(vm, 500)
    assert job.result.verified
    assert job.result.warnings == ()
    shown = [one for one in seen if one.phase == "verifying"]
    assert shown, [one.phase for one in seen]
    assert (shown[-1].done, shown[-1].total) == (disk.size, disk.size)
    assert sorted(one.done for one in shown) == [one.done for one in shown]
    data = await content(target, fmt, "sesame" if kind == "luks" else None)
    found = check_point_in_time(data[: 16 * MIB], SPEC, bounds[0])
    assert found.ok, found
    assert data[16 * MIB : 17 * MIB] == bytes([SHOWN]) * MIB
    await at_ease(vm)


async def test_a_copy_of_the_top_layer_is_proven_with_what_it_lies_on(
    start_qemu, vm_dir, invariant
):
    vm = await start_qemu(parse_scenario(DISKS["chain"], "disk"), guest=True)
    await begin_writing(vm)
    target = vm_dir / "copy.qcow2"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        async with copy(controller, {disk: target}, layers="top", verify=True) as job:
            pass
    assert job.result.verified
    data = await content(target, "qcow2")
    assert data[16 * MIB : 17 * MIB] == bytes([SHOWN]) * MIB
    await at_ease(vm)


async def test_two_disks_are_proven_against_one_instant(start_qemu, vm_dir, invariant):
    vm = await start_qemu(parse_scenario(TWO, "two"), guest=True)
    specs = await vm.guest.stress_in_step(*STEPS)
    await written(vm, 500)
    targets = [vm_dir / "copy0.raw", vm_dir / "copy1.qcow2"]
    async with qmpblock.connect(vm.monitor_path) as controller:
        disks = await controller.disks()
        async with AsyncExitStack() as stack:
            async with vm.guest.bounds(0, 1) as bounds:
                copying = copy(controller, dict(zip(disks, targets, strict=True)), verify=True)
                job = await stack.enter_async_context(copying)
            seen = [one async for one in job if one.phase == "verifying"]
    assert job.result.verified
    assert seen[-1].total == sum(disk.size for disk in disks) == seen[-1].done
    assert {one.done for one in job.disks.values()} == {disk.size for disk in disks}
    taken = [
        check_point_in_time(await content(target, one.format), spec, bounds[spec.disk])
        for target, one, spec in zip(targets, job.result.disks, specs, strict=True)
    ]
    assert all(one.ok for one in taken), taken
    await at_ease(vm, *specs)


def comparing(monkeypatch, before):
    """Have something done when all is ready to be compared."""
    real = proof.verify

    async def verify(*arguments, **options):
        await before()
        return await real(*arguments, **options)

    monkeypatch.setattr(proof, "verify", verify)


@pytest.mark.parametrize("fmt", ["qcow2", "raw", "luks"])
async def test_a_byte_that_changed_is_found(fmt, start_qemu, vm_dir, invariant, monkeypatch):
    """A copy that is not its point has no name, and the guest never knows."""
    kind, fmt = ("luks", "qcow2") if fmt == "luks" else ("chain", fmt)
    vm = await start_qemu(parse_scenario(DISKS[kind], "disk"), guest=True)
    await begin_writing(vm)
    target = vm_dir / f"copy.{fmt}"
    partial = f"{target}.partial"

    async def change():
        if kind == "luks":
            with open(partial, "r+b") as file:  # its last cluster of data
                file.seek(-65536, 2)
                byte = file.read(1)
                file.seek(-65536, 2)
                file.write(bytes([byte[0] ^ 1]))
            return
        code, out = await ran("qemu-io", "-f", fmt, "-c", f"write -P 0x55 {PLACE} 2", partial)
        assert code == 0, out

    comparing(monkeypatch, change)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(Error, match="is not what vd0 held") as caught:
            async with copy(controller, {disk: target}, format=fmt, verify=True) as job:
                pass
        assert job.result is None
        said = str(caught.value)
        if kind != "luks":
            assert f"2 bytes differ, the first at offset {PLACE}" in said
        assert "there is no copy" in caught.value.standing
        assert "find out which" in caught.value.remedy
        await disk.refresh()
    assert [path.name for path in vm_dir.iterdir() if "copy" in path.name] == []
    await at_ease(vm)


@pytest.mark.parametrize("kind", ["chain", "luks"])
async def test_broken_off_while_it_is_compared(kind, start_qemu, vm_dir, invariant, monkeypatch):
    vm = await start_qemu(parse_scenario(DISKS[kind], "disk"), guest=True)
    await begin_writing(vm)
    target, comparison = vm_dir / "copy.qcow2", asyncio.Event()

    async def wait():
        comparison.set()
        await asyncio.sleep(600)

    comparing(monkeypatch, wait)

    async def run():
        async with (
            qmpblock.connect(vm.monitor_path) as controller,
            copy(controller, {(await controller.disks())[0]: target}, format="qcow2", verify=True),
        ):
            pass

    running = asyncio.ensure_future(run())
    await asyncio.wait_for(comparison.wait(), 200)  # keys are derived, with time taken for it
    assert [one["id"] for one in await vm.execute("query-block-exports")]
    assert [path.name for path in vm_dir.iterdir() if "copy" in path.name] == ["copy.qcow2.partial"]
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [path.name for path in vm_dir.iterdir() if "copy" in path.name] == ["copy.qcow2.partial"]
    await at_ease(vm)


@pytest.mark.needs_qemu(">= 10.0", reason="before, frozen layers are the point: it stays")
async def test_a_point_that_is_given_up_proves_nothing(start_qemu, vm_dir, invariant, monkeypatch):
    """What the guest overwrites has no room any more while it is compared."""
    full = (
        "about: Data everywhere.\nimages: [{format: raw, size: 18M, content: [write 0 18M 0xaa]}]"
    )
    vm = await start_qemu(parse_scenario(full, "disk"), guest=True)
    target = vm_dir / "copy.raw"

    async def overwrite():
        await begin_writing(vm)
        await written(vm, 4000)

    comparing(monkeypatch, overwrite)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(NBDRequestError, match="cannot be compared") as caught:
            async with copy(controller, {disk: target}, verify=True, fleece_limit=5 * MIB):
                pass
    assert "give it more" in caught.value.remedy
    assert "there is no copy" in caught.value.standing
    assert [path.name for path in vm_dir.iterdir() if "copy" in path.name] == ["copy.raw.partial"]
    await at_ease(vm)


async def test_who_has_the_server_already_is_said_before_anything_is_copied(
    start_qemu, vm_dir, invariant
):
    vm = await start_qemu(parse_scenario(DISKS["raw"], "disk"), guest=True)
    await vm.execute(
        "nbd-server-start", addr={"type": "unix", "data": {"path": str(vm_dir / "theirs")}}
    )
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(BusyError, match="not ours already runs"):
            async with copy(controller, {disk: vm_dir / "copy.raw"}, verify=True):
                pass
    await vm.execute("nbd-server-stop")
    await nothing_of_ours(vm)


@pytest.mark.parametrize("at", ["end", "pivot"])
async def test_the_end_is_not_proven(at, start_qemu, vm_dir, invariant):
    """Its point is over with the guest's next write."""
    vm = await start_qemu(parse_scenario(DISKS["raw"], "disk"), guest=True)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(UnsupportedError, match="cannot be proven") as caught:
            async with copy(controller, {disk: vm_dir / "copy.raw"}, at=at, verify=True):
                pass
    assert caught.value.exit_code == 2
    assert "--at start" in caught.value.remedy
    await nothing_of_ours(vm)
