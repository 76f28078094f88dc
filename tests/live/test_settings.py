"""What a guest's disk is set to is the same after a snapshot and a pivot, or it is said.

`discard` no QMP command tells: it is seen by what a discard does to the file.
"""

import json

import pytest
from chains import cli
from disturbed import nothing_of_ours

import qmpblock
from qmpblock.testing.images import Tools

pytestmark = pytest.mark.live

MIB = 1 << 20
PATH = "/machine/peripheral/vd0/virtio-backend"
AT = "20M 4M"  # where no layer holds anything
VALUES = [("unmap", "unmap"), ("ignore", "off"), ("ignore", "on")]


async def make_chain(tools, directory):
    """Make an active image on a base; return both."""
    base, active = directory / "base.qcow2", directory / "active.qcow2"
    await tools.run(tools.img, "create", "-q", "-f", "qcow2", str(base), "32M")
    await tools.run(tools.io, "-f", "qcow2", "-c", "write -P 0xaa 0 1M", str(base))
    await tools.run(
        tools.img, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(active)
    )
    return base, active


def blockdev(base, active, discard, zeroes):
    """Both layers described, the lower with options of its own, as libvirt does."""
    lower = {"driver": "qcow2", "node-name": "d1", "read-only": True}
    lower["file"] = {"driver": "file", "filename": str(base), "auto-read-only": True}
    upper = {"driver": "qcow2", "node-name": "d0", "backing": "d1"}
    upper |= {"discard": discard, "detect-zeroes": zeroes}
    upper["file"] = {"driver": "file", "filename": str(active), "discard": "unmap"}
    words = [word for one in (lower, upper) for word in ("-blockdev", json.dumps(one))]
    return [*words, "-device", "virtio-blk-pci,drive=d0,id=vd0"]


def by_itself(base, active, discard, zeroes):
    """The base is opened by QEMU, because the active image names it."""
    upper = f"driver=qcow2,node-name=d0,discard={discard},detect-zeroes={zeroes}"
    upper += f",file.driver=file,file.filename={active}"
    return ["-blockdev", upper, "-device", "virtio-blk-pci,drive=d0,id=vd0"]


def drive(base, active, discard, zeroes):
    text = f"file={active},format=qcow2,if=none,id=dr,discard={discard},detect-zeroes={zeroes}"
    return ["-drive", text, "-device", "virtio-blk-pci,drive=dr,id=vd0"]


async def effects(vm, file):
    """Return what discard and detect-zeroes do: bytes freed, and bytes that zeros take."""

    async def io(command):
        await vm.qemu_io_at(PATH, f"{command} {AT}")
        return file.stat().st_blocks * 512

    full = await io("write -P 7")
    freed = full - await io("discard")
    full = await io("write -P 7")
    zeros = full - await io("write -P 0")
    again = await io("discard")  # as it was
    assert again <= full
    return freed > 3 * MIB, zeros > 3 * MIB


async def reported(vm):
    [block] = [one for one in await vm.execute("query-block") if "inserted" in one]
    return block["inserted"]["detect_zeroes"]


@pytest.mark.parametrize(("discard", "zeroes"), VALUES)
@pytest.mark.parametrize("attach", [blockdev, by_itself, drive])
async def test_discard_and_detect_zeroes_stay(
    attach, discard, zeroes, start_qemu, vm_dir, qemu_binary, invariant
):
    tools = Tools.of(qemu_binary)
    base, active = await make_chain(tools, vm_dir)
    vm = await start_qemu([], extra=attach(base, active, discard, zeroes))
    invariant.forget(vm)
    before = (await reported(vm), *await effects(vm, active))
    assert before == (zeroes, discard == "unmap", zeroes == "unmap")
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        overlay = vm_dir / "overlay.qcow2"
        result = await disk.snapshot(overlay)
        assert result.warnings == ()
        assert (await reported(vm), *await effects(vm, overlay)) == before
        async with disk.commit(base="@1") as job:
            pass
        assert job.outcome.warnings == ()
        assert (await reported(vm), *await effects(vm, active)) == before
        async with disk.commit() as job:
            pass
        assert job.outcome.warnings == ()
        assert (await reported(vm), *await effects(vm, base)) == before
    await nothing_of_ours(vm)


async def test_a_stream_changes_none(start_qemu, vm_dir, qemu_binary, invariant):
    base, active = await make_chain(Tools.of(qemu_binary), vm_dir)
    vm = await start_qemu([], extra=drive(base, active, "unmap", "unmap"))
    invariant.forget(vm)
    before = (await reported(vm), *await effects(vm, active))
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        await disk.allocate(full=True, independent=True)
        assert len(disk.chain.layers) == 1
    assert (await reported(vm), *await effects(vm, active)) == before == ("unmap", True, True)


async def test_what_cannot_be_given_back_is_said(start_qemu, vm_dir, qemu_binary, invariant):
    """Options of the file, and copy-on-read of a legacy -drive; a write threshold."""
    _, active = await make_chain(Tools.of(qemu_binary), vm_dir)
    text = f"file={active},format=qcow2,if=none,id=dr,copy-on-read=on,aio=io_uring"
    if "io_uring" not in json.dumps(await _schema(start_qemu)):
        text = text.replace("io_uring", "native,cache=none")
    vm = await start_qemu([], extra=["-drive", text, "-device", "virtio-blk-pci,drive=dr,id=vd0"])
    invariant.forget(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk("vd0")
        storage = disk.chain.active.storage.name
        await vm.execute("block-set-write-threshold", node_name=storage, write_threshold=1 << 30)
        result = await disk.snapshot(vm_dir / "overlay.qcow2")
        assert [_subject(one) for one in result.warnings] == ["copy-on-read", "write threshold"]
        async with disk.commit(base="@1") as job:
            pass
        assert job.outcome.warnings == ()  # the image is what it was
    code, out, err = await cli("commit", vm.monitor_path, "vd0", "--json")
    assert code == 4, err
    said = json.loads(out)["warnings"]
    assert [_subject(one) for one in said] == ["aio", "copy-on-read", "write threshold"]
    assert all(one in err for one in said)


def _subject(warning):
    names = ("copy-on-read", "write threshold", "aio", "cache")
    return next(name for name in names if name in warning)


async def _schema(start_qemu):
    vm = await start_qemu()
    return await vm.execute("query-qmp-schema")


# -- internal snapshots


async def test_internal_snapshots_that_leave_are_said(start_qemu, vm_dir, qemu_binary, invariant):
    """Before it starts, with exit code 4; those of the base stay, and keep their content."""
    tools = Tools.of(qemu_binary)
    base, active = await make_chain(tools, vm_dir)
    for image, name in ((base, "monday"), (active, "tuesday")):
        await tools.run(tools.img, "snapshot", "-c", name, str(image))
    await tools.run(tools.io, "-f", "qcow2", "-c", "write -P 0xbb 0 1M", str(active))
    vm = await start_qemu([], extra=by_itself(base, active, "unmap", "off"))
    invariant.forget(vm)
    code, out, err = await cli("commit", vm.monitor_path, "vd0", "--json")
    assert code == 4, err
    [said] = json.loads(out)["warnings"]
    assert f"@0 {active} holds internal snapshots (savevm): tuesday" in said
    assert said in err
    await vm.quit()
    assert "monday" in await tools.run(tools.img, "snapshot", "-l", str(base))
    await tools.run(tools.img, "snapshot", "-a", "monday", str(base))
    assert "failed" not in await tools.run(tools.io, "-r", "-c", "read -P 0xaa 0 1M", str(base))


async def test_a_stream_says_so_too(start_qemu, vm_dir, qemu_binary, invariant):
    tools = Tools.of(qemu_binary)
    base, active = await make_chain(tools, vm_dir)
    await tools.run(tools.img, "snapshot", "-c", "monday", str(base))
    vm = await start_qemu([], extra=by_itself(base, active, "unmap", "off"))
    invariant.forget(vm)
    code, out, err = await cli("allocate", vm.monitor_path, "vd0", "--independent", "--json")
    assert code == 4, err
    [said] = json.loads(out)["warnings"]
    assert "monday" in said
