"""Maps of running disks, for every scenario, against QEMU's own tools."""

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from rounds import with_guest

import qmpblock
from qmpblock.cli.disks_command import document
from qmpblock.cli.map_command import _layer_document, _LayerView
from qmpblock.errors import NotFoundError, RangeError, ToolError
from qmpblock.extents.allocationmap import DATA, AllocationMap
from qmpblock.nbd import Client
from qmpblock.testing.images import build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"
CONTEXTS = ("base:allocation", "qemu:allocation-depth")


async def command(*arguments, code=0):
    """Run `qmpblock` and return its stdout."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "qmpblock",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "100"},
    )
    out, err = await process.communicate()
    assert process.returncode == code, err.decode()
    return out.decode()


def canonical(records):
    """Drop what `map --json` leaves out, and merge what then is equal."""
    merged = []
    for record in records:
        kept = {k: record[k] for k in ("start", "length", "depth", "present", "zero", "data")}
        if merged and all(merged[-1][k] == kept[k] for k in ("depth", "present", "zero", "data")):
            merged[-1]["length"] += kept["length"]
        else:
            merged.append(kept)
    return merged


async def test_every_scenario_maps_as_qemu_img_and_nbdinfo_do(
    scenario, start_qemu, invariant, vm_dir
):
    built = await build(scenario, vm_dir / "images")
    closed = await built.replayed(vm_dir / "closed")
    expected = {d.spec.name: canonical(await d.active.map(built.tools)) for d in closed.disks}
    vm = await start_qemu(built, **with_guest(scenario))
    for disk in vm.disks:
        await vm.guest_writes(disk)
    # What the guest wrote may have taken new protocol-level state (a grown file): from here
    # on nothing may change.
    await invariant.begin(vm)
    for disk in vm.disks:
        path = await vm.io.qom_path(disk)
        printed = await command("map", vm.monitor_path, path, "--json")
        assert json.loads(printed) == expected[disk.spec.name]
    await compare_with_nbdinfo(vm)


async def compare_with_nbdinfo(vm):
    """Through one server of the test's own, both contexts of every disk."""
    if vm.version < (10, 0, 0) and any(d.spec.attach.iothread != "none" for d in vm.disks):
        return  # K1: nbdinfo's own disconnect would abort this QEMU
    socket = str(vm.directory / "nbd")
    address = {"type": "unix", "data": {"path": socket}}
    await vm.execute("nbd-server-start", addr=address)
    async with qmpblock.connect(vm.monitor_path) as controller:
        for number, disk in enumerate(vm.disks):
            node = (await controller.disk(await vm.io.qom_path(disk))).chain.active.node.name
            name = f"reference{number}"
            await vm.execute(
                "block-export-add",
                id=name,
                type="nbd",
                name=name,
                node_name=node,
                allocation_depth=True,
            )
            async with await Client.connect(socket, export=name, contexts=CONTEXTS) as client:
                for context in CONTEXTS:
                    ours = await every_extent(client, context)
                    theirs = await nbdinfo(socket, name, context)
                    assert ours == theirs, context
    await vm.execute("nbd-server-stop")


async def every_extent(client, context):
    rows, offset = [], 0
    while offset < client.size:
        length = min(client.size - offset, client.max_status_length)
        extents = (await client.block_status(offset, length))[context]
        rows += extents.tolist()
        offset += int(extents[:, 0].sum())
    return merge(rows)


async def nbdinfo(socket, export, context):
    process = await asyncio.create_subprocess_exec(
        "nbdinfo",
        "--json",
        f"--map={context}",
        f"nbd+unix:///{export}?socket={socket}",
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return merge([r["length"], r["type"]] for r in json.loads(out))


def merge(rows):
    merged = []
    for length, flags in rows:
        if merged and merged[-1][1] == flags:
            merged[-1][0] += length
        else:
            merged.append([length, flags])
    return merged


@pytest.mark.scenarios("chain-3.yaml")
async def test_ranges_clip_at_any_byte(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        whole = await disk.map()
        for offset, length in ((0, 1), (1, 1), (65535, 2), (100_001, 3_333_333), (disk.size, 0)):
            assert await disk.map(offset, length) == whole.clip(offset, length)
        tail = await disk.map(disk.size - 7)
        assert (tail.start, tail.stop) == (disk.size - 7, disk.size)
        for offset, length in ((-1, 1), (0, disk.size + 1), (disk.size + 1, 0), (5, -1)):
            with pytest.raises(RangeError) as caught:
                await disk.map(offset, length)
            assert caught.value.exit_code == 2


async def test_every_scenarios_disks_and_layers(scenario, start_qemu, invariant):
    """Listed as they were made; layers the same through exports, through qemu-img, stacked."""
    vm = await start_qemu(scenario, **with_guest(scenario))
    for disk in vm.disks:
        await vm.guest_writes(disk)
    await invariant.begin(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        graph = await controller.graph()
        listed = valid([document(device) for device in graph.devices], "disks")
        with_media = {entry["qom_path"]: entry for entry in listed if entry["layers"]}
        assert len(with_media) == len(vm.disks)
        assert len(listed) == len(with_media) + scenario.empty_tray
        for disk in vm.disks:
            path = await vm.io.qom_path(disk)
            compare_listing(with_media[path], disk)
            await compare_layers(await controller.disk(path))


def compare_listing(entry, disk):
    chain, attach = disk.active.chain(), disk.spec.attach
    assert [layer["format"] for layer in entry["layers"]] == [i.spec.format for i in chain]
    assert [layer["file"] for layer in entry["layers"]] == [str(i.path) for i in chain]
    assert [layer["depth"] for layer in entry["layers"]] == list(range(len(chain)))
    # A legacy -drive throttles and copies on read in its backend, without filter nodes.
    filters = attach.filters if attach.style == "blockdev" else ()
    assert sorted(node["driver"] for node in entry["filters"]) == sorted(filters)
    assert entry["jobs"] == []


async def compare_layers(disk):
    seen = await disk.map()
    local = await disk.layers()
    remote = await disk.layers(local=False)
    assert local[0].source == "nbd"
    assert {layer.source for layer in remote} == {"nbd"}
    for one, other in zip(local, remote, strict=True):
        assert one.map.without_reserved() == other.map.without_reserved(), one.layer
    stacked = AllocationMap.stack([layer.map for layer in remote])
    assert stacked.without_reserved() == seen
    found = await disk.map(reserved=True)
    totals = valid(found.totals().as_json(size=disk.size), "map-totals")
    held = sum(row["data"] + row["zero"] for row in totals["totals"])
    assert held + totals["absent"] == disk.size
    views = [
        _LayerView(
            one.layer.depth,
            one.layer.node.name,
            one.layer.file,
            one.layer.format,
            one.layer.size,
            one.map,
            one.source,
        )
        for one in local
    ]
    valid({"layers": [_layer_document(view) for view in views]}, "layers")
    valid(found.to_qemu_img(), "map")


def valid(value, name):
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    Draft202012Validator(schema).validate(value)
    return value


@pytest.mark.scenarios("chain-20.yaml")
async def test_frozen_layers_on_this_host_are_read_by_qemu_img(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        sources = [layer.source for layer in await disk.layers()]
    assert sources == ["nbd"] + ["qemu-img"] * 19


@pytest.mark.scenarios("raw-fallocated.yaml")
async def test_fallocated_raw_ranges_show_as_reserved(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        plain = await disk.map()
        marked = await disk.map(reserved=True)
    assert not plain.where(reserved=True)
    assert marked.where(reserved=True).total > 0
    assert marked.where(reserved=True, zero=False).total == 0
    assert marked.without_reserved() == plain


@pytest.mark.scenarios("qcow2-empty.yaml")
async def test_two_maps_at_once_take_turns(scenario, start_qemu, invariant):
    """A VM has one NBD server: on two monitors, the second waits for the first."""
    vm = await start_qemu(scenario)
    async with (
        qmpblock.connect(vm.monitor_path) as one,
        qmpblock.connect(vm.second_monitor_path) as two,
    ):
        disks = [(await one.disks())[0], (await two.disks())[0]] * 5
        maps = await asyncio.gather(*(disk.map() for disk in disks))
    assert all(found == maps[0] for found in maps)


@pytest.mark.scenarios("qcow2-empty.yaml")
async def test_a_disk_that_does_not_exist(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        with pytest.raises(NotFoundError):
            await controller.disk("nosuch")
    await command("map", vm.monitor_path, "nosuch", code=2)
    await command("map", vm.monitor_path + "x", "nosuch", code=3)


@pytest.mark.scenarios("chain-3.yaml")
async def test_an_image_of_a_running_vm_is_not_a_closed_one(scenario, start_qemu, invariant):
    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        _, *frozen = await disk.layers()
        open_in_vm = await qmpblock.closed_image(disk.chain.active.file)  # its header may be read
        for look in (open_in_vm.map, open_in_vm.layers):
            with pytest.raises(ToolError) as caught:
                await look()
            assert "map it through that VM's monitor" in caught.value.remedy
        image = await qmpblock.closed_image(frozen[0].layer.file, format=frozen[0].layer.format)
        for one, other in zip(await image.layers(), frozen, strict=True):
            assert one.map == other.map.without_reserved()
            assert (one.file, one.size) == (other.layer.file, other.layer.size)


async def test_a_chain_of_150_layers(start_qemu, vm_dir, invariant):
    """Made by hand: QEMU's tools open the whole chain for each layer added to it."""
    scenario = parse_scenario(DEEP, "deep")
    built = await build(scenario, vm_dir / "deep")
    tools, layers = built.tools, list(reversed(built.disks[0].active.chain()))
    below = layers[0]
    for number in range(1, 149):
        path = vm_dir / "deep" / f"middle{number}.qcow2"
        create = [tools.img, "create", "-q", "-u", "-f", "qcow2", "-F", below.spec.format]
        await tools.run(*create, "-b", str(below.path), str(path), "16M")
        below = replace(layers[1], path=path, backing=below)
        if number % 15 == 0:
            io = f"json:{json.dumps({**below.describe(), 'backing': None})}"
            await tools.run(tools.io, io, "-c", f"write {number * 64}K 64K")
    await tools.run(
        tools.img,
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        str(below.path),
        str(layers[1].path),
    )
    active = replace(layers[1], backing=below)
    vm = await start_qemu([replace(built.disks[0], active=active)])
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        assert len(disk.chain.layers) == 150
        found = await disk.map()
        held = await disk.layers()
        assert {one.source for one in await disk.layers(local=False)} == {"nbd"}
    written = {149 - number for number in range(15, 149, 15)} | {149}
    assert {int(d) for d in np.unique(found.depth[(found.flags & DATA) > 0])} == written
    assert {one.layer.depth for one in held if one.map.where(data=True)} == written


DEEP = """
about: The two ends of a deep chain.
images:
  - {size: 16M, content: [write 0 64K 0xaa]}
  - {size: 16M}
"""
