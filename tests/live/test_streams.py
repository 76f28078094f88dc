"""What is a stream's own: nothing lost when QEMU dies, short layers, dirty bitmaps."""

import asyncio
import json

import pytest
from chaincases import Case
from chains import cli, convert, digest_without, dirty, subjects

import qmpblock
from qmpblock.chains import jobs as chainjobs
from qmpblock.changes import finalize as driving
from qmpblock.errors import DisconnectedError, UnsupportedError
from qmpblock.testing.images import Tools, build
from qmpblock.testing.stamps import StressSpec

pytestmark = pytest.mark.live

CHAIN = pytest.mark.scenarios("chain-3.yaml")
SHORT = pytest.mark.scenarios("short-middle*.yaml")


async def streamed_and_killed(scenario, start_qemu, vm_dir, qemu_binary):
    """Kill QEMU the moment a stream concludes; return whether all that it copied is there.

    The guest writes throughout and never flushes: a flush of its own would save it all.
    """
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    subject = (await subjects(built, vm_dir))["d0"]
    vm = await start_qemu(built, guest=True)
    area = subject.area
    await vm.guest.stress(StressSpec(offset=area.offset, blocks=area.length // 4096, rate=500))

    async def kill():
        with vm.control.subscribe(
            "JOB_STATUS_CHANGE", match=lambda event: event["data"]["status"] == "concluded"
        ) as concluded:
            listening.set()
            await concluded.get(60)
            await vm.kill()

    listening = asyncio.Event()
    killing = asyncio.create_task(kill())
    await listening.wait()
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        with pytest.raises(DisconnectedError):
            async with disk.stream():
                pass
    await killing
    active = subject.layers[0]
    info = ["info", "-f", "qcow2", "--output=json", str(active.path)]
    recorded = json.loads(await built.tools.run(built.tools.img, *info))
    assert "backing-filename" not in recorded, "killed too early: the link is still there"
    content = vm_dir / "content.raw"
    await convert(built.tools, active, {**active.describe(), "backing": None}, content)
    return digest_without(content, area) == subject.digest


@pytest.mark.scenarios("chain-2.yaml", "chain-3.yaml", "iothread-virtio-blk.yaml", "raw-base.yaml")
async def test_all_that_was_streamed_survives_qemus_death(
    scenario, start_qemu, vm_dir, qemu_binary
):
    assert await streamed_and_killed(scenario, start_qemu, vm_dir, qemu_binary)


@CHAIN
async def test_without_the_flush_it_would_be_lost(
    scenario, start_qemu, vm_dir, qemu_binary, monkeypatch
):
    """K6: what the test above is worth."""

    async def none(*_):
        pass

    monkeypatch.setattr(driving, "flush", none)
    assert not await streamed_and_killed(scenario, start_qemu, vm_dir, qemu_binary)


# -- short middle layers


@SHORT
@pytest.mark.parametrize("case", [Case("stream", base=2), Case("commit", top=1, base=2)], ids=str)
@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "left-out"])
async def test_what_a_short_layer_hides_stays_hidden(
    case, explicit, scenario, start_qemu, invariant, vm_dir, qemu_binary, monkeypatch
):
    """Made explicit zeros in the active layer; left out, QEMU lets the base's old data appear."""
    if not explicit:
        monkeypatch.setattr(chainjobs, "make_explicit", nothing_explicit)
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    subject = (await subjects(built, vm_dir))["d0"]
    active, short, _ = subject.layers
    vm = await start_qemu(built, guest=True)
    invariant.forget(vm)  # test_chains.py looks at the VM
    await subject.attach(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        seen = await disk.map()
        hidden = seen.where(depth=short_depth(seen), present=False)
        async with getattr(disk, case.operation)(**case.layers) as job:
            pass
    subject.apply(case)
    await subject.keeps_writing()
    await subject.writer.stop()
    await vm.quit()
    if explicit:
        # The guest may have written over some of it between the look and the job.
        assert 0 < job.outcome.made_explicit <= hidden.total
        assert job.outcome.made_explicit <= active.spec.size - short.spec.size
        await subject.verify()
    else:
        with pytest.raises(AssertionError, match="the content has changed"):
            await subject.verify()


async def nothing_explicit(*_):
    return 0


def short_depth(seen):
    """What the short layer hides shows as not held by the layer above it (design.md, map)."""
    return 0 if seen.where(depth=0, present=False) else 1


@SHORT
@pytest.mark.parametrize("case", [Case("stream", 1, 3), Case("commit", 2, 3)], ids=str)
async def test_a_short_layer_below_a_frozen_one_is_refused(
    case, scenario, start_qemu, invariant, vm_dir, qemu_binary
):
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    subject = (await subjects(built, vm_dir))["d0"]
    vm = await start_qemu(built, guest=True)
    await subject.attach(vm)
    overlay = subject.directory / "overlay"
    async with qmpblock.connect(vm.monitor_path) as controller:
        await (await controller.disk("vd0")).snapshot(overlay)
    subject.add_overlay(overlay, "qcow2")
    subject.remember()
    await invariant.begin(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        with pytest.raises(UnsupportedError, match="old data") as caught:
            async with getattr(disk, case.operation)(**case.layers):
                pass
        assert "nothing was touched" in str(caught.value)
        assert not subject.changed_files()
        await subject.keeps_writing()
    await subject.writer.stop()
    await invariant.verify(vm)
    await vm.quit()
    await subject.verify()


# -- dirty bitmaps


@CHAIN
async def test_a_bitmap_of_a_layer_that_leaves_is_merged(scenario, start_qemu, invariant, vm_dir):
    vm = await start_qemu(scenario)
    invariant.forget(vm)  # the bitmaps are the test's
    await vm.execute("block-dirty-bitmap-add", node="d0", name="both", granularity=65536)
    await vm.qemu_io("d0", "write -P 1 1M 64K")
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        result = await disk.snapshot(vm_dir / "images0" / "overlay")
        node = result.overlays[0].node
        await vm.qemu_io("d0", "write -P 2 9M 128K")
        async with disk.stream(base="@2") as job:
            pass
        assert job.outcome.warnings == ()
        await vm.qemu_io("d0", "write -P 3 12M 64K")
    assert await dirty(vm, node, "both") == {1 << 20, 9 << 20, (9 << 20) + 65536, 12 << 20}


@CHAIN
async def test_a_bitmap_that_ends_is_named_and_exits_with_4(
    scenario, start_qemu, invariant, vm_dir
):
    vm = await start_qemu(scenario)
    invariant.forget(vm)
    await vm.execute("block-dirty-bitmap-add", node="d0-1", name="lonely", persistent=False)
    code, out, err = await cli("stream", vm.monitor_path, "vd0", "--base", "@2", "--json")
    assert code == 4, err
    assert "lonely" in json.loads(out)["warnings"][0]
    assert "warning: " in err
    assert "lonely" in err
    code, out, _ = await cli("stream", vm.monitor_path, "vd0", "--json")
    assert (code, json.loads(out)["warnings"]) == (0, [])
