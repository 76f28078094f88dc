"""Somebody else reads a layer that a commit would change, or uses a bitmap of one that would go.

The scenario is chain-3.yaml: d0 on d0-1 on d0-2. A backup that reads a frozen layer by an export
or a job of its own gets nonsense if a commit writes below it, and QEMU lets both be done.
"""

import asyncio
import hashlib
from dataclasses import replace

import pytest
from disturbed import SLOW, begin, nothing_of_ours, seen, until

import qmpblock
from qmpblock.errors import BusyError, InUseError
from qmpblock.testing.images import Tools, build

pytestmark = [pytest.mark.live, pytest.mark.scenarios("chain-3.yaml")]

MIB = 1 << 20
ALL, UPPER, MIDDLE = {}, {"base": "@1"}, {"top": "@1"}


async def serve(vm):
    """Start a foreign NBD server; return its address."""
    path = str(vm.directory / "nbd")
    await vm.execute("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
    return path


async def export(vm, node, **more):
    await vm.execute("block-export-add", type="nbd", id="theirs", node_name=node, **more)


async def serve_vhost_user(vm, node):
    address = {"type": "unix", "path": str(vm.directory / "vhost")}
    await vm.execute(
        "block-export-add", type="vhost-user-blk", id="theirs", node_name=node, addr=address
    )


async def back_up(vm, node):
    await vm.execute("blockdev-add", driver="null-co", node_name="target", size=16 * MIB)
    await vm.execute(
        "blockdev-backup", job_id="theirs", device=node, target="target", sync="full", speed=65536
    )


async def end_all(vm):
    """Remove what the test made, whatever there is of it."""
    for info in await vm.execute("query-block-exports"):
        await vm.execute("block-export-del", id=info["id"], mode="hard")
    await until(lambda: no_exports(vm), "the end of the exports")
    for job in await vm.execute("query-jobs"):
        await vm.execute("job-cancel", id=job["id"])
    await until(lambda: no_jobs(vm), "the end of the jobs")
    nodes = {one["node-name"] for one in await vm.execute("query-named-block-nodes", flat=True)}
    if "target" in nodes:
        await vm.execute("blockdev-del", node_name="target")


async def no_exports(vm):
    return not await vm.execute("query-block-exports")


async def no_jobs(vm):
    return not await vm.execute("query-jobs")


async def read(vm, tools, out):
    """Return a digest of what the export shows to whoever reads it."""
    [found] = await vm.execute("query-block-exports")
    assert found["id"] == "theirs"
    uri = f"nbd+unix:///theirs?socket={vm.directory / 'nbd'}"
    await tools.run(tools.img, "convert", "-f", "raw", "-O", "raw", uri, str(out))
    return hashlib.sha256(out.read_bytes()).hexdigest()


def files(vm):
    return {layer.path: layer.path.read_bytes() for layer in vm.disks[0].active.chain()[1:]}


@pytest.mark.parametrize(
    ("use", "node", "arguments"),
    [
        (export, "d0-2", ALL),
        (export, "d0-2", MIDDLE),
        (export, "d0-1", ALL),
        (export, "d0-1", UPPER),
        (serve_vhost_user, "d0-2", ALL),
        (serve_vhost_user, "d0-2-file", ALL),
        (back_up, "d0-2", ALL),
        (back_up, "d0-1", UPPER),
        (back_up, "d0-2", MIDDLE),
    ],
)
async def test_what_somebody_reads_is_not_written(use, node, arguments, scenario, start_qemu):
    vm = await start_qemu(scenario)
    before = files(vm)
    await serve(vm)
    await use(vm, node)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(BusyError, match=r"is read by the (export|job) theirs") as caught:
            async with disk.commit(**arguments):
                pass
        assert caught.value.exit_code == 2
        assert caught.value.standing == "nothing was touched"
        assert caught.value.remedy is not None
    assert files(vm) == before
    await end_all(vm)
    await vm.execute("nbd-server-stop")


@pytest.mark.parametrize(
    ("node", "what"),
    [
        ("d0", "commit"),
        ("d0-1", "commit of middle layers"),
        ("d0-1", "stream"),
        ("d0-1", "stream into it"),
        ("d0", "allocate"),
        ("d0", "snapshot"),
    ],
)
async def test_who_sees_no_difference_reads_on(
    node, what, scenario, start_qemu, vm_dir, qemu_binary, invariant
):
    """By an export that follows the guest, or of a layer whose content stays what it is."""
    vm, tools = await start_qemu(scenario), Tools.of(qemu_binary)
    invariant.forget(vm)
    nbd = await serve(vm)
    await export(vm, node, name="theirs")
    before = await read(vm, tools, vm_dir / "out")
    async with qmpblock.connect(vm.monitor_path, nbd=nbd) as controller:
        [disk] = await controller.disks()
        if what == "allocate":
            await disk.allocate(full=True)
        elif what == "snapshot":
            await disk.snapshot(vm_dir / "overlay.qcow2")
        else:
            top = {"stream into it": "@1", "commit of middle layers": "@1"}.get(what)
            running = disk.stream(top=top) if "stream" in what else disk.commit(top=top)
            async with running:
                pass
    assert await read(vm, tools, vm_dir / "out") == before
    await end_all(vm)
    await vm.execute("nbd-server-stop")
    await nothing_of_ours(vm)


@pytest.mark.parametrize("goes", [False, True], ids=["stays", "goes"])
async def test_a_reader_that_comes_while_the_job_runs(
    goes, scenario, start_qemu, vm_dir, invariant
):
    """It is waited for; then the commit is given up, and the guest stays where it is."""
    vm = await start_qemu(scenario)
    invariant.forget(vm)  # QEMU 7.2 keeps the base of a cancelled commit open for writing
    await serve(vm)
    async with qmpblock.connect(vm.monitor_path, stall=20 if goes else 6) as controller:
        [disk] = await controller.disks()

        async def work():
            async with begin(disk, "pivot", speed=SLOW) as job:
                await seen(job, lambda now: now.status == "running", "a running job")
                await export(vm, "d0-2")
                await job.set_speed(0)
                await seen(job, lambda now: now.ready, "a ready job")
                job.complete()
                await asyncio.sleep(0.5)
                assert disk.chain.active.node.name == "d0"
                if goes:
                    await vm.execute("block-export-del", id="theirs")

        if goes:
            await work()
            assert disk.chain.active.node.name == "d0-2"
        else:
            with pytest.raises(BusyError, match="is read by the export theirs") as caught:
                await work()
            assert caught.value.exit_code == 1
            assert "the chain is as it was" in caught.value.standing
            await disk.refresh()
            assert [one.node.name for one in disk.chain.layers] == ["d0", "d0-1", "d0-2"]
    await end_all(vm)
    await vm.execute("nbd-server-stop")
    await nothing_of_ours(vm)


@pytest.mark.parametrize("style", ["blockdev", "drive"])
async def test_a_bitmap_in_use_of_the_active_layer_does_not_kill_qemu(
    style, scenario, start_qemu, vm_dir, qemu_binary
):
    """A pull backup reads the running disk; QEMU aborts where its layer goes after a pivot."""
    [spec] = scenario.disks
    attach = replace(spec.attach, style=style, node_names=style == "blockdev")
    scenario = replace(scenario, disks=(replace(spec, attach=attach),))
    vm = await start_qemu(await build(scenario, vm_dir / "images", Tools.of(qemu_binary)))
    await serve(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        node = disk.chain.active.node.name
        await vm.execute("block-dirty-bitmap-add", node=node, name="backup", disabled=True)
        await export(vm, node, bitmaps=["backup"])
        with pytest.raises(InUseError, match=r"the dirty bitmap backup .* QEMU aborts"):
            async with disk.commit():
                pass
        await disk.refresh()
        assert disk.chain.active.node.name == node
    assert vm.running, vm.evidence()
    await end_all(vm)
    await vm.execute("nbd-server-stop")
    await vm.execute("block-dirty-bitmap-remove", node=node, name="backup")
    await nothing_of_ours(vm)
