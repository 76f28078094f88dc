"""Images whose file name does not say how they are opened: a crash in the window loses nothing."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from allocating import at_command, blank
from disturbed import nothing_of_ours

import qmpblock
from qmpblock.changes import imagerecovery
from qmpblock.errors import DisconnectedError, Error, UnsupportedError
from qmpblock.testing.images import Tools, build
from qmpblock.testing.qemu import QemuProcess

pytestmark = pytest.mark.live
MIB = 1 << 20
AT = 8 * MIB  # where nothing is
OLD, LAST = 0xAA, 0x77  # what the base holds in its first MiB; what the guest writes last


def img(*words):
    done = subprocess.run(
        ["qemu-img", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def in_file(path, **more):
    return {"driver": "file", "filename": str(path), **more}


def part(directory, base):
    """A qcow2 image that begins a MiB into its file; another one lies before it."""
    inner, file = directory / "inner.qcow2", directory / "part.bin"
    img("create", "-q", "-f", "qcow2", inner, "256K")
    other = inner.read_bytes()
    img("create", "-q", "-f", "qcow2", "-b", base["file"]["filename"], "-F", "raw", inner)
    with file.open("wb") as out:
        out.write(other)
        out.seek(MIB)
        out.write(inner.read_bytes())
        out.truncate(257 * MIB)
    inner.unlink()
    place = {"driver": "raw", "offset": MIB, "size": 256 * MIB}
    return file, {"driver": "qcow2", "file": {**place, "file": in_file(file)}, "backing": base}


def part_of_a_drive(directory, base):
    """The same by a legacy -drive: QEMU tells its numbers as they were written."""
    file, options = part(directory, base)
    options["file"] |= {"offset": "1M", "size": "0x10000000"}
    return file, options | {"drive": True}


def in_words(options, outer=""):
    """Write options as KEY=VALUE,..."""
    return ",".join(
        in_words(value, f"{outer}{key}.") if isinstance(value, dict) else f"{outer}{key}={value}"
        for key, value in options.items()
    )


def data_file(directory, base):
    """The header names another data file."""
    file, right, wrong = (directory / name for name in ("image", "right.raw", "wrong.raw"))
    options = f"data_file={wrong}"
    below = base["file"]["filename"]
    img("create", "-q", "-f", "qcow2", "-o", options, "-b", below, "-F", "raw", file)
    right.touch()
    os.truncate(right, 64 * MIB)
    found = {"driver": "qcow2", "file": in_file(file), "data-file": in_file(right)}
    return file, found | {"backing": base}


def backing(directory, base):
    """The header names another backing image; it shows where only a part of a cluster comes."""
    file, wrong = directory / "image", directory / "wrong.raw"
    wrong.write_bytes(b"\x55" * MIB)
    os.truncate(wrong, 64 * MIB)
    options = "cluster_size=1M"
    img("create", "-q", "-f", "qcow2", "-o", options, "-b", wrong, "-F", "raw", file)
    return file, {"driver": "qcow2", "file": in_file(file), "backing": base}


def no_format(directory, base):
    """Neither the header nor the name says the backing image's format, and it is not probed."""
    file, below = directory / "image", directory / "below"
    img("convert", "-f", "raw", "-O", "qcow2", base["file"]["filename"], below)
    img("create", "-q", "-f", "qed", "-b", below, "-F", "qcow2", file)
    lower = {"driver": "qcow2", "file": in_file(below)}
    return file, {"driver": "qed", "file": in_file(file), "backing": lower}


SHAPES = {
    "part": part,
    "part-of-a-drive": part_of_a_drive,
    "data-file": data_file,
    "backing": backing,
    "no-format": no_format,
}
#: The first and the last command of the window in which the guest writes to the overlay.
WHEN = {"transaction": "after", "job-complete": "before"}
SHAPE = pytest.mark.parametrize("shape", SHAPES)


async def opened(shape, vm_dir, qemu_binary):
    """Return a QEMU whose disk is such an image, its file, and how it is opened."""
    built = await build(blank(), vm_dir / "images", Tools.of(qemu_binary))
    lowest = vm_dir / "images" / "lowest"
    lowest.write_bytes(bytes([OLD]) * MIB)
    os.truncate(lowest, 64 * MIB)
    base = {"driver": "raw", "file": in_file(lowest)}
    file, options = shape(vm_dir / "images", base)
    vm = QemuProcess.of(built, guest=True, qemu=qemu_binary, directory=vm_dir)
    drive = options.pop("drive", False)
    own = {key: value for key, value in options.items() if key != "apart"}
    own["discard"] = "unmap"
    disk = ("-blockdev", json.dumps({**own, "node-name": "d0"}))
    if drive:
        disk = ("-drive", f"if=none,id=d0,{in_words(own)}")
    apart = [options.pop("apart")] if "apart" in options else []
    [at] = [
        number
        for number, word in enumerate(vm.command)
        if word.startswith("{") and json.loads(word).get("node-name") == "d0"
    ]
    vm.command = (
        *vm.command[:1],
        *(word for one in apart for word in ("-blockdev", json.dumps(one))),
        *vm.command[1 : at - 1],
        *disk,
        *vm.command[at + 1 :],
    )
    return vm, file, options


def holds(options, directory):
    """Return what a closed image holds, opened so."""
    raw = directory / "content.raw"
    img("convert", "-O", "raw", "json:" + json.dumps(options), raw)
    found = raw.read_bytes()
    raw.unlink()
    return found


def expected():
    found = bytearray(64 * MIB)
    found[:MIB] = bytes([OLD]) * MIB
    return found


@SHAPE
async def test_it_is_opened_so_for_its_map_too(shape, vm_dir, qemu_binary):
    """And full allocation works whole, and leaves nothing."""
    vm, _, options = await opened(SHAPES[shape], vm_dir, qemu_binary)
    wanted = expected()
    async with vm:
        await vm.guest.fill(0, AT, MIB, LAST)
        wanted[AT : AT + MIB] = bytes([LAST]) * MIB
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()
            assert (await disk.allocate(AT, 4 * MIB, full=True)).reserved == 3 * MIB
            again = await disk.allocate(AT, 4 * MIB, full=True)
            assert again.reserved == 0
        await nothing_of_ours(vm)
        await vm.quit()
    assert holds(options, vm_dir) == wanted


@SHAPE
@pytest.mark.parametrize("command", ["transaction", "job-complete"])
async def test_both_die_in_the_window(shape, command, vm_dir, qemu_binary, monkeypatch):
    vm, file, options = await opened(SHAPES[shape], vm_dir, qemu_binary)
    wanted = expected()
    async with vm, qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()

        async def strike():
            for at, length in ((AT, MIB), (256 << 10, 4096)):
                await vm.guest.fill(0, at, length, LAST)
                wanted[at : at + length] = bytes([LAST]) * length
            await vm.guest.flush(0)
            await vm.kill()

        async def dead(*_, **__):
            raise Error("the controller is dead too")

        with monkeypatch.context() as patching:
            patching.setattr(imagerecovery, "recover_journal", dead)
            with (
                at_command(controller.monitor, command, strike, WHEN[command]),
                pytest.raises(DisconnectedError) as caught,
            ):
                await disk.allocate(AT, 4 * MIB, full=True)
        assert f"qmpblock recover {file}" in caught.value.remedy
    assert wanted != expected(), "the guest wrote nothing"
    [foreseen] = await qmpblock.recover_images([file], dry_run=True)
    [found] = await qmpblock.recover_images([file])
    assert found.verdict == foreseen.verdict
    assert found.verdict.start == (str(file),)
    assert found.verdict.commit
    assert holds(options, vm_dir) == wanted
    assert await qmpblock.recover_images([file]) == []
    assert not list(file.parent.glob("*qmpblock*"))
    if shape.startswith("part"):  # the other image in that file is as it was
        img("check", "-q", "-f", "qcow2", file)


@pytest.mark.parametrize("shape", ["no-format", "data-file"])
async def test_the_overlay_comes_home_to_no_other_file(shape, vm_dir, qemu_binary, monkeypatch):
    """Somebody restored a backup over the image, or its data file, before recovery."""
    vm, file, options = await opened(SHAPES[shape], vm_dir, qemu_binary)
    wanted = expected()
    async with vm, qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()

        async def strike():
            await vm.guest.fill(0, AT, MIB, LAST)
            await vm.guest.flush(0)
            await vm.kill()

        async def dead(*_, **__):
            raise Error("the controller is dead too")

        with monkeypatch.context() as patching:
            patching.setattr(imagerecovery, "recover_journal", dead)
            with (
                at_command(controller.monitor, "transaction", strike, "after"),
                pytest.raises(DisconnectedError),
            ):
                await disk.allocate(AT, 4 * MIB, full=True)
    wanted[AT : AT + MIB] = bytes([LAST]) * MIB
    other = file.parent / "right.raw" if shape == "data-file" else file
    kept, copy = file.parent / "kept", file.parent / "copy"
    other.rename(kept)
    for gone in (True, False):
        if gone and other == file:
            continue  # that there is no such image is said anyway
        if not gone:
            copy.write_bytes(kept.read_bytes())
            copy.rename(other)
        with pytest.raises(Error, match=f"{other} is not the file any more") as caught:
            await qmpblock.recover_images([file])
        assert "is kept" in caught.value.standing
        assert "put the file itself back" in caught.value.remedy
    assert other.read_bytes() == kept.read_bytes()
    assert [one.name for one in file.parent.glob(f"{file.name}.qmpblock-*")]
    kept.rename(other)
    [found] = await qmpblock.recover_images([file])
    assert found.verdict.commit
    assert holds(options, vm_dir) == wanted


async def test_a_controller_that_lives_brings_it_home_at_once(vm_dir, qemu_binary):
    vm, file, options = await opened(part, vm_dir, qemu_binary)
    wanted = expected()
    async with vm, qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()

        async def strike():
            await vm.guest.fill(0, AT, MIB, LAST)
            await vm.guest.flush(0)
            await vm.kill()

        with (
            at_command(controller.monitor, "transaction", strike, "after"),
            pytest.raises(DisconnectedError) as caught,
        ):
            await disk.allocate(AT, 4 * MIB, full=True)
        assert f"start the VM from {file}" in caught.value.standing
    wanted[AT : AT + MIB] = bytes([LAST]) * MIB
    assert holds(options, vm_dir) == wanted


async def test_what_could_not_be_opened_again_is_refused(vm_dir, qemu_binary):
    """A layer below that lies in a part of a file: qemu-img cannot be told so."""

    def below(directory, base):
        _, lower = part(directory, base)
        file = directory / "image"
        img("create", "-q", "-f", "qcow2", file, "64M")
        img("rebase", "-u", "-f", "qcow2", "-b", directory / "part.bin", "-F", "qcow2", file)
        apart = {**lower, "node-name": "lower"}  # a child of its name QEMU itself cannot open so
        return file, {
            "driver": "qcow2",
            "file": in_file(file),
            "backing": "lower",
            "apart": apart,
        }

    vm, file, _ = await opened(below, vm_dir, qemu_binary)
    async with vm:
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()
            with pytest.raises(UnsupportedError, match="part of a file") as caught:
                await disk.allocate(AT, MIB, full=True)
            assert caught.value.exit_code == 2
            assert caught.value.standing == "nothing was touched"
        await nothing_of_ours(vm)
        assert not list(file.parent.glob("*qmpblock*"))
        await vm.quit()


async def over_another(vm_dir, qemu_binary):
    def over(directory, base):
        _, lower = data_file(directory, base)
        file = directory / "top.qcow2"
        img("create", "-q", "-f", "qcow2", file, "64M")
        return file, {"driver": "qcow2", "file": in_file(file), "backing": lower}

    return await opened(over, vm_dir, qemu_binary)


async def test_a_commit_says_how_the_base_is_opened(vm_dir, qemu_binary):
    """The VM is to be started from it, and its name alone would be another image."""
    vm, _, options = await over_another(vm_dir, qemu_binary)
    async with vm:
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()
            async with disk.commit(base="@1") as job:
                job.complete()
        await vm.quit()
    assert Path(job.outcome.active).name == "image"
    assert json.loads(job.outcome.opened) == options["backing"]


async def test_so_does_recovery_after_the_pivot(vm_dir, qemu_binary):
    vm, top, options = await over_another(vm_dir, qemu_binary)
    wanted = expected()
    async with vm:
        await vm.guest.fill(0, AT, MIB, LAST)
        await vm.guest.flush(0)
        wanted[AT : AT + MIB] = bytes([LAST]) * MIB
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()
            with (
                at_command(controller.monitor, "job-finalize", vm.kill),
                pytest.raises(DisconnectedError) as caught,
            ):
                async with disk.commit(base="@1") as job:
                    job.complete()
    assert "Its name does not suffice; it was open as {" in caught.value.standing
    assert f"Never use or commit {top}" in caught.value.standing
    assert holds(options["backing"], vm_dir) == wanted
