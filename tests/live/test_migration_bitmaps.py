"""Dirty bitmaps go along: each arrives with its disk, marks what it marked, and records on."""

import asyncio
import json
from dataclasses import replace

import pytest
from chains import cli
from migrating import arrived, both, machine, migrated, stressed, to_newer

import qmpblock
from qmpblock.errors import RequestError
from qmpblock.migration.landing import Landing
from qmpblock.migration.stream import Stream
from qmpblock.testing import Tools, build, counterpart, parse_scenario

pytestmark = pytest.mark.live

MIB = 1 << 20


@pytest.fixture
def begin(start_qemu, vm_dir, qemu_binary):
    """Give what starts a source whose guest writes to all of its disks."""

    async def start(text=None, **options):
        built = await build(
            parse_scenario(text or machine(), "source"), vm_dir / "source", Tools.of(qemu_binary)
        )
        return await stressed(await start_qemu(built, guest=True, **options), 100)

    return start


@pytest.fixture
def otherwise(start_qemu, vm_dir, qemu_binary):
    """Give what starts a destination whose nodes are called otherwise; or by nobody."""

    async def start(source, style):
        wanted = counterpart(source)
        disks = tuple(
            replace(
                disk,
                name=f"other-{disk.name}",
                attach=replace(disk.attach, style=style, node_names=style == "blockdev"),
            )
            for disk in wanted.disks
        )
        built = await build(replace(wanted, disks=disks), vm_dir / "there", Tools.of(qemu_binary))
        options = {"machine": source.machine, "guest": True, "incoming": "defer"}
        return await start_qemu(built.disks, extra=["-S"], **options)

    return start


async def add(vm, node, name, **how):
    await vm.execute("block-dirty-bitmap-add", node=node, name=name, **how)


async def bitmaps(vm):
    """Return what a VM's named bitmaps are."""
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    return {
        (node["node-name"], one["name"]): one
        for node in nodes
        for one in node.get("dirty-bitmaps", [])
        if "name" in one
    }


async def four(vm):
    """Give it a persistent, a transient, a fine one, and one that does not record."""
    await add(vm, "d0", "kept", persistent=True)
    await add(vm, "d0", "passing")
    await add(vm, "d1", "fine", granularity=4096, persistent=True)
    await add(vm, "d1", "off", disabled=True)


async def see_four(source, destination, result, *, prefix=""):
    """See that they have arrived, and record."""
    before = await bitmaps(source)
    assert {one.name: one.count for one in result.bitmaps} == {
        name: one["count"] for (_, name), one in before.items()
    }
    assert all(one.node.startswith(prefix) for one in result.bitmaps)
    now = {name: one for (_, name), one in (await bitmaps(destination)).items()}
    assert set(now) == {"kept", "passing", "fine", "off"}
    for name, one in now.items():
        [was] = [was for (_, other), was in before.items() if other == name]
        for part in ("granularity", "persistent", "recording", "inconsistent", "busy"):
            assert one.get(part) == was.get(part), (name, part)
        assert one["count"] >= was["count"] > 0 or name == "off"
    assert now["off"]["count"] == 0  # all of the disk was mirrored to it meanwhile
    [(node, _)] = [key for key in await bitmaps(destination) if key[1] == "passing"]
    await destination.execute("block-dirty-bitmap-clear", node=node, name="passing")
    async with asyncio.timeout(120):
        while not (await bitmaps(destination))[node, "passing"]["count"]:
            await asyncio.sleep(0.02)


async def stored(vm, number):
    """Return the bitmaps of a closed image."""
    image = vm.disks[number].active.path
    words = ("info", "-f", "qcow2", "--output=json", str(image))
    tools = Tools.of(vm.command[0])
    said = json.loads(await tools.run(tools.img, *words))
    return said["format-specific"]["data"].get("bitmaps", [])


async def test_each_arrives_with_its_disk(begin, start_destination):
    source = await begin(machine(2))
    destination = await start_destination(source)
    await four(source)
    result = await migrated(source, destination)
    await see_four(source, destination, result)
    for vm in (source, destination):
        assert "block-bitmap-mapping" not in await vm.execute("query-migrate-parameters")
    await arrived(source, destination, result)
    [kept] = await stored(destination, 0)
    assert (kept["name"], kept["flags"]) == ("kept", ["auto"])
    [fine] = await stored(destination, 1)
    assert (fine["name"], fine["granularity"]) == ("fine", 4096)


@pytest.mark.needs_qemu("< 8", reason="the machine type of 7.2 is what both know")
async def test_to_a_newer_qemu(begin, start_destination):
    options = to_newer()
    source = await begin(machine(2), **options["here"])
    destination = await start_destination(source, **options["there"])
    await four(source)
    result = await migrated(source, destination)
    await see_four(source, destination, result)
    await arrived(source, destination, result)


@pytest.mark.parametrize("style", ["blockdev", "drive"])
async def test_to_nodes_that_are_called_otherwise(style, begin, otherwise):
    """Or, of a legacy drive, by nobody."""
    source = await begin(machine(2))
    destination = await otherwise(source, style)
    await four(source)
    result = await migrated(source, destination)
    await see_four(source, destination, result, prefix="#" if style == "drive" else "other-")
    there = "drive-other-d0" if style == "drive" else "other-d0"
    for vm, alias in ((source, "d0"), (destination, there)):
        mapping = (await vm.execute("query-migrate-parameters"))["block-bitmap-mapping"]
        [one] = [one for one in mapping if one["alias"] == alias]
        assert {"name": "kept", "alias": "kept"} in one["bitmaps"]
    await arrived(source, destination, result)


async def test_a_destination_that_was_sent_nothing_knows_no_names_of_ours(
    begin, otherwise, monkeypatch
):
    async def refuse(_stream):
        raise qmpblock.Error("not today")

    source = await begin()
    destination = await otherwise(source, "blockdev")
    await add(source, "d0", "passing")
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "prepare", refuse)
        with pytest.raises(qmpblock.Error, match="the destination waits as before"):
            await migrated(source, destination)
    for vm in (source, destination):
        said = await vm.execute("query-migrate-parameters")
        assert "qmpblock" not in json.dumps(said)
    result = await migrated(source, destination)
    assert [one.name for one in result.bitmaps] == ["passing"]
    await arrived(source, destination, result)


async def test_from_a_legacy_drive(begin, start_destination):
    text = machine(2).replace("attach: {", "attach: {style: drive, ")
    source = await begin(text)
    destination = await start_destination(source)
    nodes = await source.execute("query-block")
    first, second = [one["inserted"]["node-name"] for one in nodes]
    await add(source, first, "kept", persistent=True)
    await add(source, second, "passing")
    result = await migrated(source, destination)
    assert {(one.disk, one.name) for one in result.bitmaps} == {("vd0", "kept"), ("vd1", "passing")}
    await arrived(source, destination, result)


async def test_with_the_memory_alone(begin, start_destination):
    source = await begin(machine(2))
    destination = await start_destination(source, shared=True)
    await four(source)
    result = await migrated(source, destination, memory_only=True)
    await see_four(source, destination, result)
    await arrived(source, destination, result)
    assert [one["name"] for one in await stored(destination, 0)] == ["kept"]


async def test_one_that_was_added_while_the_disks_were_copied(begin, start_destination):
    source = await begin()
    destination = await start_destination(source)
    async with both(source, destination) as vms, qmpblock.migrate(*vms) as job:
        async for seen in job:
            if seen.status == "mirroring" and not await bitmaps(source):
                await add(source, "d0", "late", persistent=True)
    assert [one.name for one in job.result.bitmaps] == ["late"]
    await arrived(source, destination, job.result)
    assert [one["name"] for one in await stored(destination, 0)] == ["late"]


async def test_one_that_arrives_as_another_has_the_guest_stay(
    begin, start_destination, monkeypatch
):
    """The bitmap at the destination is cleared behind QEMU's back before it is compared."""
    source = await begin()
    destination = await start_destination(source)
    await add(source, "d0", "kept", persistent=True)
    has_all = Landing.until_it_has_all

    async def cleared(self):
        await has_all(self)
        await destination.execute("block-dirty-bitmap-clear", node="d0", name="kept")

    monkeypatch.setattr(Landing, "until_it_has_all", cleared)
    destination.expect_exit()
    with pytest.raises(qmpblock.Error, match="kept has arrived at d0 as another: count") as caught:
        await migrated(source, destination)
    assert "the guest runs at the source" in str(caught.value)
    assert (await source.execute("query-status"))["status"] == "running"
    assert (await bitmaps(source))["d0", "kept"]["recording"]
    end = await source.guest.stop_stress()
    assert (end.bad, end.errors) == (0, 0)
    await source.quit()
    assert [one["flags"] for one in await stored(source, 0)] == [["auto"]]


async def test_a_raw_image_is_refused_before_anything_is_copied(begin, start_destination):
    source = await begin()
    destination = await start_destination(source, image="raw")
    await add(source, "d0", "kept", persistent=True)
    with pytest.raises(RequestError, match=r"kept.*persistent, and raw stores none"):
        await migrated(source, destination)
    await source.execute("block-dirty-bitmap-remove", node="d0", name="kept")
    await add(source, "d0", "passing")
    result = await migrated(source, destination)
    assert [one.name for one in result.bitmaps] == ["passing"]
    await arrived(source, destination, result)


@pytest.mark.parametrize("shared", [True, False])
async def test_one_in_use_is_refused(shared, begin, start_destination):
    source = await begin()
    destination = await start_destination(source, shared=shared)
    await add(source, "d0", "used")
    place = str(source.directory / "nbd")
    await source.execute("nbd-server-start", addr={"type": "unix", "data": {"path": place}})
    export = {"type": "nbd", "id": "theirs", "node-name": "d0", "writable": False}
    await source.execute("block-dirty-bitmap-disable", node="d0", name="used")
    await source.execute("block-export-add", **export, bitmaps=["used"])
    with pytest.raises(RequestError, match=r"used.* is in use"):
        await migrated(source, destination, memory_only=shared)
    await source.execute("nbd-server-stop")


async def test_one_of_a_lower_layer_stays_behind(begin, start_destination):
    text = "about: A chain.\ndisks:\n  - {name: d0, images: [{size: 64M}, {}]}\n"
    source = await begin(text)
    destination = await start_destination(source)
    await add(source, "d0-1", "below")
    await add(source, "d0", "above")
    result = await migrated(source, destination)
    assert [one.name for one in result.bitmaps] == ["above"]
    [warning] = result.warnings
    assert "below of vd0" in warning
    assert {name for _, name in await bitmaps(destination)} == {"above"}
    source.expect_exit()


async def test_a_mapping_is_not_unset(begin, invariant):
    """What is relied on when the source's is taken back."""
    invariant.expect(r"migration: block-bitmap-mapping is \[\]")
    source = await begin()
    name = "block-bitmap-mapping"
    assert name not in await source.execute("query-migrate-parameters")
    await source.execute("migrate-set-parameters", **{name: []})
    with pytest.raises(qmpblock.Error, match="Invalid parameter type"):
        await source.execute("migrate-set-parameters", **{name: None})
    assert (await source.execute("query-migrate-parameters"))[name] == []


async def test_the_dry_run_names_them(begin, start_destination):
    source = await begin()
    destination = await start_destination(source)
    await add(source, "d0", "kept", persistent=True)
    words = ("migrate", source.monitor_path, destination.monitor_path, "--dry-run", "--json")
    code, out, err = await cli(*words)
    assert code == 0, err
    kept = {"disk": "vd0", "name": "kept", "persistent": True}
    assert json.loads(out)["bitmaps"] == [kept]
    code, out, _ = await cli(*words[:-1])
    assert "vd0: its dirty bitmap kept would go along" in out
