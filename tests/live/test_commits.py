"""What a commit's own is: dirty bitmaps that go on, bases of other sizes."""

import json

import pytest
from chains import bitmaps, cli, dirty

import qmpblock
from qmpblock.errors import RequestError
from qmpblock.testing.images import Tools

pytestmark = pytest.mark.live

CHAIN = pytest.mark.scenarios("chain-3.yaml")
MIB = 1 << 20


def steps(offset, length, step=65536):
    return set(range(offset, offset + length, step))


@CHAIN
@pytest.mark.parametrize("persistent", [False, True], ids=["transient", "persistent"])
async def test_a_bitmap_goes_on_in_the_base(
    persistent, scenario, start_qemu, invariant, qemu_binary
):
    """At least all that was dirty is dirty, and later writes are recorded; kept if it was."""
    vm = await start_qemu(scenario)
    invariant.forget(vm)  # the bitmap is the test's
    add = {"node": "d0", "name": "kept", "granularity": 65536, "persistent": persistent}
    await vm.execute("block-dirty-bitmap-add", **add)
    await vm.qemu_io("d0", "write -P 1 9M 128K")
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        async with disk.commit(base="@1") as job:
            pass
        assert job.outcome.warnings == ()
        node = disk.chain.active.node.name
    assert node == "d0-1"
    assert await dirty(vm, node, "kept") >= steps(9 * MIB, 2 * 65536)
    await vm.qemu_io("d0", "write -P 2 14M 64K")
    assert await dirty(vm, node, "kept") >= steps(9 * MIB, 2 * 65536) | {14 * MIB}
    assert 13 * MIB not in await dirty(vm, node, "kept")  # it says something, not everything
    [found] = await bitmaps(vm, node)
    assert (found["persistent"], found["recording"]) == (persistent, True)
    base = vm.disks[0].active.backing.path
    await vm.quit()
    tools = Tools.of(qemu_binary)
    info = json.loads(await tools.run(tools.img, "info", "-f", "qcow2", "--output=json", str(base)))
    stored = info["format-specific"]["data"].get("bitmaps", [])
    assert [one["name"] for one in stored] == (["kept"] if persistent else [])
    assert all("in-use" not in one["flags"] for one in stored)


@CHAIN
async def test_a_bitmap_that_the_base_has_already_gets_what_is_committed(
    scenario, start_qemu, invariant
):
    vm = await start_qemu(scenario)
    invariant.forget(vm)
    for node in ("d0", "d0-1"):
        await vm.execute("block-dirty-bitmap-add", node=node, name="both", granularity=65536)
    await vm.qemu_io("d0", "write -P 1 9M 64K")
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        async with disk.commit(base="@1") as job:
            pass
        assert job.outcome.warnings == ()
    assert 9 * MIB in await dirty(vm, "d0-1", "both")
    await vm.qemu_io("d0", "write -P 2 14M 64K")
    assert {9 * MIB, 14 * MIB} <= await dirty(vm, "d0-1", "both")


@pytest.mark.scenarios("raw-base.yaml")
async def test_a_base_that_cannot_store_the_bitmap_is_named_and_exits_with_4(
    scenario, start_qemu, invariant
):
    vm = await start_qemu(scenario)
    invariant.forget(vm)
    add = {"node": "d0", "name": "kept", "granularity": 65536, "persistent": True}
    await vm.execute("block-dirty-bitmap-add", **add)
    await vm.qemu_io("d0", "write -P 1 9M 64K")
    code, out, err = await cli("commit", vm.monitor_path, "vd0", "--json")
    assert code == 4, err
    assert "not persistently" in json.loads(out)["warnings"][0]
    assert "not persistently" in err
    assert 9 * MIB in await dirty(vm, "d0-1", "kept")


@CHAIN
async def test_a_bitmap_that_does_not_record_ends_with_its_layer(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    invariant.forget(vm)
    await vm.execute("block-dirty-bitmap-add", node="d0", name="done", disabled=True)
    code, out, err = await cli("commit", vm.monitor_path, "vd0", "--base", "@1", "--json")
    assert code == 4, err
    assert "done" in json.loads(out)["warnings"][0]
    assert await bitmaps(vm, "d0-1") == []


@CHAIN
async def test_a_refused_commit_leaves_no_bitmap(scenario, start_qemu, invariant):
    """Where QEMU refuses the job itself, after the base's bitmap was made."""
    vm = await start_qemu(scenario)
    await vm.execute("block-dirty-bitmap-add", node="d0", name="kept")
    await invariant.begin(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        with pytest.raises(qmpblock.Error):
            async with disk.commit(base="@1", speed=-1):
                pass
        real = controller.monitor.execute

        async def execute(name, arguments=None, **more):
            if name == "block-commit":
                arguments = {**arguments, "base-node": "nosuch"}
            return await real(name, arguments, **more)

        controller.monitor.execute = execute
        with pytest.raises(qmpblock.Error, match="nosuch"):
            async with disk.commit(base="@1"):
                pass
        controller.monitor.execute = real
    assert [one["name"] for one in await bitmaps(vm, "d0")] == ["kept"]


@pytest.mark.scenarios("longer-base.yaml")
async def test_a_larger_base_is_refused_with_both_sizes(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        with pytest.raises(RequestError, match=rf"{16 * MIB}.*{5 * MIB}"):
            async with disk.commit():
                pass


@pytest.mark.scenarios("short-base.yaml")
async def test_a_smaller_base_grows_to_the_disks_size(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    invariant.forget(vm)  # test_chains.py looks at the VM
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        size = disk.size
        async with disk.commit():
            pass
        assert disk.chain.active.size == size == 16 * MIB
    await vm.qemu_io("d0", "write -P 3 15M 64K")
    await vm.qemu_io("d0", "read -P 0xbc 8M 64K")
    await vm.qemu_io("d0", "read -P 0 13M 64K")
