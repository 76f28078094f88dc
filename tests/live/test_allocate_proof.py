"""Full allocation says what it will cost beforehand, and what can be seen of it afterwards."""

import json

import pytest
from allocating import at_command, blank
from chains import cli

import qmpblock
from qmpblock.allocation import allocate as allocation
from qmpblock.errors import DisconnectedError
from qmpblock.host import space
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

MIB = 1 << 20
AT = 8 * MIB  # where nothing is
TOUCHING = ("blockdev-", "block-commit", "block-export-add", "transaction", "job-", "object-add")


async def one_disk(start_qemu, vm_dir, qemu_binary, text=None):
    scenario = blank() if text is None else parse_scenario(f"about: One disk.\n{text}", "one")
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    return await start_qemu(built, guest=True)


async def bitmap(vm, name="backup", **options):
    await vm.execute("block-dirty-bitmap-add", node="d0", name=name, **options)


async def counts(vm):
    bitmaps = (await vm.execute("query-block"))[0]["inserted"]["dirty-bitmaps"]
    return {one["name"]: one["count"] for one in bitmaps}


def said_bytes(text):
    """Return the number in `up to N bytes`."""
    return int(text.partition("up to ")[2].split()[0])


# Below: data, explicit zeros, and nothing. The active layer: a little data, zeros, nothing.
CHAIN = """
attach: {discard: unmap}
images:
  - {size: 32M, content: [write 0 2M 0xaa, zero 4M 3M]}
  - {size: 32M, content: [write 16M 64K 0xbb, zero 20M 1M]}
"""


@pytest.mark.parametrize("granularity", [4096, 65536, MIB])
async def test_the_growth_of_bitmaps_is_said_before_anything_is_touched(
    granularity, start_qemu, vm_dir, qemu_binary, invariant
):
    vm = await one_disk(start_qemu, vm_dir, qemu_binary, CHAIN)
    await bitmap(vm, granularity=granularity)
    await bitmap(vm, "off", disabled=True)
    await invariant.begin(vm)
    told = []
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with at_command(controller.monitor, 0, None) as trace:
            result = await disk.allocate(
                full=True, warn=lambda text: told.append((text, list(trace)))
            )
    [(text, before)] = told
    assert result.warnings == (text,)
    # Only a map was read by then: one export, and the lock around it, both gone again.
    touching = [command for command in before if command.startswith(TOUCHING)]
    assert touching == ["object-add", "block-export-add"]
    assert before.count("block-export-del") == before.count("object-del") == 1
    # The data from below, and what the active layer held, do not count.
    exact = 32 * MIB - 2 * MIB - 65536
    assert result.reserved == exact
    rounded = -(-exact // granularity) * granularity
    assert said_bytes(text) == rounded
    assert await counts(vm) == {"backup": rounded, "off": 0}
    await vm.quit()


async def test_zeros_that_come_up_as_data_are_said_once_they_are_known(
    start_qemu, vm_dir, qemu_binary, invariant
):
    """The map calls them data; QEMU finds nothing but zeros in them, and stores zero clusters."""
    text = CHAIN.replace("0xaa", "0x00")
    vm = await one_disk(start_qemu, vm_dir, qemu_binary, text)
    await bitmap(vm)
    await invariant.begin(vm)
    told = []
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with at_command(controller.monitor, 0, None) as trace:
            result = await disk.allocate(full=True, warn=lambda t: told.append((t, list(trace))))
    exact = 32 * MIB - 65536
    assert [said_bytes(text) for text, _ in told] == [exact - 2 * MIB, exact]
    assert not any("transaction" in before for _, before in told), "not before the snapshot"
    assert result.reserved == exact
    assert await counts(vm) == {"backup": exact}


async def test_the_command_says_it_first(start_qemu, vm_dir, qemu_binary, invariant):
    vm = await one_disk(start_qemu, vm_dir, qemu_binary)
    await bitmap(vm)
    await invariant.begin(vm)
    words = ["--offset", str(AT), "--length", "2M", "--full"]
    code, out, err = await cli("allocate", vm.monitor_path, "vd0", *words, "--json")
    assert code == 4
    [warning] = json.loads(out)["warnings"]
    first, *others = err.splitlines()
    assert first == f"warning: {warning}"
    assert any("reserving" in line for line in others)
    assert "warning" not in "".join(others)


async def test_what_grows_nothing_says_nothing(start_qemu, vm_dir, qemu_binary, invariant):
    """Thin, and a second time: bitmaps stay as they are, and the exit code is 0."""
    vm = await one_disk(start_qemu, vm_dir, qemu_binary)
    await bitmap(vm)
    await invariant.begin(vm)
    told = []
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        result = await disk.allocate(warn=told.append)
        assert (told, result.warnings, await counts(vm)) == ([], (), {"backup": 0})
        await disk.allocate(AT, MIB, full=True, warn=told.append)
        assert len(told) == 1
        again = await disk.allocate(AT, MIB, full=True, warn=told.append)
        assert (len(told), again.reserved, again.warnings) == (1, 0, ())


def then(monkeypatch, name, act):
    """Have the guest do something just after the space was reserved, and before the proof."""
    real = getattr(allocation, name)

    async def reserve(*arguments, **options):
        done = await real(*arguments, **options)
        await act()
        return done

    monkeypatch.setattr(allocation, name, reserve)


RAW = "attach: {discard: unmap}\nimages: [{format: raw, size: 32M, content: [write 0 1M 0xaa]}]\n"
OLD = 'attach: {discard: unmap}\nimages: [{size: 32M, options: {compat: "0.10"}}]\n'
GONE, DOUBT = "bytes of vd0 have no host space any more", "bytes of vd0 were discarded by the guest"
CASES = {
    # (images, what reserves, what the guest does, what is said, what a second run reserves)
    "qcow2-discard": (
        None,
        "reserve_by_staging",
        "discard",
        DOUBT,
        MIB,
    ),  # zero clusters, all the same
    "qcow2-0.10-discard": (OLD, "reserve_by_staging", "discard", GONE, MIB),  # which knows none
    "qcow2-zeroes": (
        None,
        "reserve_by_staging",
        "write_zeroes",
        DOUBT,
        0,
    ),  # QEMU kept the clusters
    "chain-discard": (CHAIN, "reserve_by_staging", "discard", DOUBT, MIB),
    "chain-zeroes": (CHAIN, "reserve_by_staging", "write_zeroes", DOUBT, 0),
    "raw-discard": (RAW, "reserve_ranges", "discard", GONE, MIB),
    "raw-zeroes": (RAW, "reserve_ranges", "write_zeroes", None, 0),
}


@pytest.mark.parametrize("case", CASES)
async def test_what_the_guest_gives_back_meanwhile_is_no_success(
    case, start_qemu, vm_dir, qemu_binary, invariant, monkeypatch
):
    text, way, how, words, more = CASES[case]
    vm = await one_disk(start_qemu, vm_dir, qemu_binary, text)

    async def give_back():
        await getattr(vm.guest, how)(0, AT + MIB, MIB)

    then(monkeypatch, way, give_back)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        result = await disk.allocate(AT, 4 * MIB, full=True)
        assert result.reserved == 4 * MIB
        assert len(result.warnings) == (words is not None)
        if words is not None:
            assert result.warnings[0].startswith(f"{MIB} {words}")
        monkeypatch.undo()
        again = await disk.allocate(AT, 4 * MIB, full=True)
        assert (again.reserved, again.warnings) == (more, ())


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
async def test_all_of_it_is_seen(fmt, start_qemu, vm_dir, qemu_binary, invariant):
    vm = await one_disk(start_qemu, vm_dir, qemu_binary, RAW if fmt == "raw" else None)
    code, out, _ = await cli("allocate", vm.monitor_path, "vd0", "--full", "--json")
    assert (code, json.loads(out)["warnings"]) == (0, [])


async def test_zeros_that_had_their_space_are_no_doubt(start_qemu, vm_dir, qemu_binary, invariant):
    text = (
        "images: [{size: 32M, options: {preallocation: falloc}, "
        "content: [write 0 1M 0x11, zero 8M 8M]}]\n"
    )
    vm = await one_disk(start_qemu, vm_dir, qemu_binary, text)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        seen = await disk.map()
        assert seen.where(zero=True, data=False).total == 8 * MIB, "no zero clusters"
        result = await disk.allocate(full=True)
        assert (result.reserved, result.warnings) == (0, ())


async def test_metadata_alone_is_no_proof(start_qemu, vm_dir, qemu_binary, invariant):
    """qemu-img gave each cluster a place in a sparse file: the host has no space for them."""
    text = "images: [{size: 32M, options: {preallocation: metadata}, content: [write 0 1M 0x11]}]\n"
    vm = await one_disk(start_qemu, vm_dir, qemu_binary, text)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        result = await disk.allocate(AT, 4 * MIB, full=True)
    assert result.reserved == 0
    [warning] = result.warnings
    assert f"{4 * MIB} bytes of vd0 were preallocated" in warning


async def test_a_file_system_that_does_not_tell(
    start_qemu, vm_dir, qemu_binary, invariant, monkeypatch
):
    """As tmpfs: it reserves, but has no FIEMAP. Nothing is claimed that was not seen."""
    vm = await one_disk(start_qemu, vm_dir, qemu_binary, RAW)
    monkeypatch.setattr(space, "reserved_ranges", lambda *_, **__: None)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        part = await disk.allocate(AT, 4 * MIB, full=True)
        assert (part.reserved, len(part.warnings)) == (4 * MIB, 1)
        assert f"{4 * MIB} bytes are not seen to be so" in part.warnings[0]
        # A file with as many blocks as bytes has no holes: that is seen without FIEMAP.
        whole = await disk.allocate(full=True)
        assert whole.warnings == ()


async def test_a_qemu_that_dies_when_all_is_done_takes_nothing_back(
    start_qemu, vm_dir, qemu_binary, invariant, monkeypatch
):
    """It was refused with "nothing was touched": the image was looked for once more."""
    vm = await one_disk(start_qemu, vm_dir, qemu_binary)
    invariant.forget(vm)
    real = allocation._prove_staged

    async def prove(disk, *arguments):
        look = disk.map

        async def last_look(*span):
            found = await look(*span)
            vm.expect_exit()
            await vm.kill()
            return found

        monkeypatch.setattr(disk, "map", last_look)
        await real(disk, *arguments)

    monkeypatch.setattr(allocation, "_prove_staged", prove)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        result = await disk.allocate(AT, 4 * MIB, full=True)
    assert (result.reserved, result.warnings) == (4 * MIB, ())


async def test_a_qemu_that_dies_before_the_first_slice_is_told(
    start_qemu, vm_dir, qemu_binary, invariant, monkeypatch
):
    """It was an image that "cannot be found from here", exit code 2."""
    vm = await one_disk(start_qemu, vm_dir, qemu_binary)
    invariant.forget(vm)
    real = allocation.reserve_by_staging

    async def reserve(disk, *arguments, **options):
        look = disk.refresh

        async def last_look():
            await look()
            vm.expect_exit()
            await vm.kill()

        monkeypatch.setattr(disk, "refresh", last_look)
        return await real(disk, *arguments, **options)

    monkeypatch.setattr(allocation, "reserve_by_staging", reserve)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(DisconnectedError):
            await disk.allocate(AT, 4 * MIB, full=True)
