"""The commands on a living QEMU: documents, pictures, exit codes, signals."""

import asyncio
import json
import os
import re
import signal
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
from forking import forked
from jsonschema import Draft202012Validator

import qmpblock
from qmpblock.testing.images import Tools, build

pytestmark = pytest.mark.live

SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"
CHAIN = pytest.mark.scenarios("chain-3.yaml")


def valid(value, name):
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    Draft202012Validator(schema).validate(value)
    return value


SETTINGS = {"COLUMNS": "100", "PYTHONUTF8": "1"}


async def start(*arguments):
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "qmpblock",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **SETTINGS},
    )


async def run(*arguments, code=0, **environment):
    settings = {**os.environ, **SETTINGS, **environment}
    done, out, err = await forked(*arguments, environment=settings)
    assert done == code, err
    return out, err


@CHAIN
async def test_disks_command(scenario, start_qemu):
    vm = await start_qemu(scenario, empty_tray=True)
    out, err = await run("disks", vm.monitor_path, "--json")
    [disk, tray] = sorted(valid(json.loads(out), "disks"), key=lambda e: not e["layers"])
    assert err == ""
    assert len(disk["layers"]) == 3
    assert tray["size"] is None
    out, _ = await run("disks", vm.monitor_path)
    assert disk["device"] in out
    assert "(empty)" in out
    assert out.count("qcow2") >= 2


@CHAIN
async def test_names_are_whole_however_narrow_the_terminal(
    scenario, start_qemu, vm_dir, qemu_binary
):
    """Nor are they taken for markup; in a pipe the width is 80, whatever the names are."""
    vm = await start_qemu(scenario)
    theirs = "theirs-" + "x" * 60
    image = vm_dir / f"[bold] [/] :smile: {'y' * 60}.qcow2"
    await vm.execute("blockdev-add", driver="null-co", node_name="n", size=4096)
    await vm.execute("blockdev-add", driver="null-co", node_name="m", size=4096)
    await vm.execute(
        "blockdev-mirror", job_id=theirs, device="n", target="m", sync="full", auto_dismiss=False
    )
    tools = Tools.of(qemu_binary)
    image.parent.mkdir()
    await tools.run(str(tools.img), "create", "-q", "-f", "qcow2", str(image), "1M")
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
    files = [one.file for one in disk.chain.layers]
    for words, names in {
        ("disks", vm.monitor_path): [disk.device.qom_path, *files],
        ("map", vm.monitor_path, disk.name, "--totals"): files,
        ("map", str(image), "--totals"): [str(image)],
        ("jobs", vm.monitor_path): [theirs],
    }.items():
        out, _ = await run(*words, COLUMNS="30")
        assert [name for name in names if name not in out] == [], out
    await vm.execute("block-job-cancel", device=theirs)
    while not [one for one in await vm.execute("query-jobs") if one["status"] == "concluded"]:
        await asyncio.sleep(0.01)
    await vm.execute("job-dismiss", id=theirs)
    for node in "nm":
        await vm.execute("blockdev-del", node_name=node)


@CHAIN
async def test_disks_shows_jobs_filters_and_exports(scenario, start_qemu, invariant, vm_dir):
    vm = await start_qemu(scenario)

    target = str(vm_dir / "target.raw")
    async with qmpblock.connect(vm.monitor_path) as controller:
        found = (await controller.disks())[0]
        root, node, size = found.chain.root.name, found.chain.active.node.name, found.size
    with open(target, "wb") as file:
        file.truncate(size)
    await vm.execute("blockdev-add", driver="file", node_name="target", filename=target)
    await vm.execute("blockdev-mirror", job_id="theirs", device=root, target="target", sync="full")
    await vm.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(vm_dir / "n")}})
    await vm.execute("block-export-add", id="foreign", type="nbd", node_name=node)
    out, _ = await run("disks", vm.monitor_path, "--json")
    [entry] = valid(json.loads(out), "disks")
    assert entry["format_node"] == node
    assert [f["driver"] for f in entry["filters"]] == ["mirror_top"]
    assert [(j["id"], j["type"]) for j in entry["jobs"]] == [("theirs", "mirror")]
    assert entry["exports"] == ["foreign"]
    out, _ = await run("disks", vm.monitor_path)
    assert "mirror_top" in out
    assert "theirs" in out
    assert "foreign" in out
    await vm.execute("nbd-server-stop")
    # Mapping goes on under a foreign job, and does not touch it.
    out, _ = await run("map", vm.monitor_path, entry["device"], "--json")
    valid(json.loads(out), "map")
    assert [job["id"] for job in await vm.execute("query-jobs")] == ["theirs"]
    await vm.execute("block-job-cancel", device="theirs", force=True)
    while await vm.execute("query-jobs"):
        await asyncio.sleep(0.01)
    await vm.execute("blockdev-del", node_name="target")


@CHAIN
async def test_map_command(scenario, start_qemu, vm_dir):
    vm = await start_qemu(scenario)

    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = (await controller.disks())[0]
        found, name = await disk.map(), disk.name
    out, err = await run("map", vm.monitor_path, name, "--json")
    assert err == ""
    assert valid(json.loads(out), "map") == found.to_qemu_img()
    out, _ = await run(
        "map", vm.monitor_path, name, "--json", "--offset", "100001", "--length", "3M"
    )
    assert json.loads(out) == found.clip(100001, 3 << 20).to_qemu_img()
    out, _ = await run("map", vm.monitor_path, name, "--json", "--totals")
    assert valid(json.loads(out), "map-totals")["size"] == found.length
    out, _ = await run("map", vm.monitor_path, name, "--json", "--layers")
    assert [one["depth"] for one in valid(json.loads(out), "layers")["layers"]] == [0, 1, 2]
    out, _ = await run("map", vm.monitor_path, name)
    strips = [line.split()[0] for line in out.splitlines() if line.strip()]
    order = [strips.index(word) for word in ("implicit", "@2", "@1", "@0", "guest")]
    assert order == sorted(order)
    assert "█" in out
    assert "in no layer" in out
    out, _ = await run(
        "map", vm.monitor_path, name, PYTHONUTF8="0", LC_ALL="C", PYTHONIOENCODING="ascii"
    )
    assert out.isascii()
    out, _ = await run("map", vm.monitor_path, name, "--layers")
    assert out.count("\n@") + out.startswith("@") == 3
    out, _ = await run("map", vm.monitor_path, name, "--totals")
    assert "in no layer" in out
    picture = vm_dir / "picture.svg"
    out, _ = await run("map", vm.monitor_path, name, "--svg", str(picture))
    assert out == ""
    assert xml.etree.ElementTree.parse(picture).getroot().tag.endswith("svg")
    before = picture.read_bytes()
    await run("map", vm.monitor_path, name, "--svg", str(picture))
    assert picture.read_bytes() == before
    await run("map", vm.monitor_path, name, "--svg", str(vm_dir / "no" / "such.svg"), code=2)
    images = sorted(vm_dir.rglob("*.qcow2"))
    assert images
    for file in images:
        held = file.read_bytes()
        _, said = await run("map", vm.monitor_path, name, "--svg", str(file), code=2)
        assert "it exists, and holds something else" in said
        assert file.read_bytes() == held
    await run("map", vm.monitor_path, name, "--offset", "100G", code=2)
    await run("map", vm.monitor_path, name, "--length", "100G", code=2)


async def test_a_closed_image_maps_as_qemu_img_says(scenario, vm_dir):
    """For what needs no secret; qemu-img does it, with the format given, never probed."""
    built = await build(scenario, vm_dir / "images")
    from qmpblock.errors import UnsupportedError
    from qmpblock.host.imagechain import blockdev
    from qmpblock.host.qemuimg import QemuImg

    for disk in built.disks:
        chain = disk.active.chain()
        if any(image.secret for image in chain):
            continue
        tool = QemuImg(built.tools.img)
        if any(i.spec.backing_name == "json" for i in chain):
            with pytest.raises(UnsupportedError):
                await tool.chain(str(chain[0].path), chain[0].spec.format)
            continue
        images = await tool.chain(str(chain[0].path), chain[0].spec.format)
        assert [image.size for image in images] == [
            (await tool.chain(str(i.path), i.spec.format))[0].size for i in chain
        ]
        found = await tool.map(
            blockdev(images[0].format, images[0].file, images[1:]), [i.format for i in images]
        )
        records = await disk.active.map(built.tools)
        assert found.to_qemu_img() == [
            {k: v for k, v in r.items() if k not in ("offset", "filename", "compressed")}
            for r in merged(records)
        ]


def merged(records):
    keys = ("depth", "present", "zero", "data")
    out = []
    for record in records:
        if out and all(out[-1][k] == record[k] for k in keys):
            out[-1] = {**out[-1], "length": out[-1]["length"] + record["length"]}
        else:
            out.append(dict(record))
    return out


@CHAIN
async def test_map_of_an_image_by_command(scenario, start_qemu, vm_dir):
    built = await build(scenario, vm_dir / "images")
    active = built.disks[0].active
    out, _ = await run("map", str(active.path), "--json")
    assert json.loads(out) == [
        {k: v for k, v in r.items() if k not in ("offset", "filename", "compressed")}
        for r in merged(await active.map(built.tools))
    ]
    out, _ = await run("map", str(active.path))
    assert "guest sees" in out
    out, _ = await run("map", str(active.path), "--layers", "--json")
    assert len(valid(json.loads(out), "layers")["layers"]) == 3
    hidden = active.path.with_name("nosuffix")
    active.path.rename(hidden)
    _, err = await run("map", str(hidden), "--json", code=2)
    assert "--format" in err
    again, _ = await run("map", str(hidden), "--json", "--format", "qcow2")
    assert json.loads(again)


@CHAIN
async def test_an_image_that_a_vm_holds_is_refused(scenario, start_qemu, vm_dir):
    vm = await start_qemu(scenario)
    _, err = await run("map", str(vm.disks[0].active.path), "--json", code=1)
    assert "qmpblock map ADDRESS DISK" in err


@CHAIN
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_undoes_and_is_130(number, scenario, start_qemu):
    """The command waits for the lock that this test holds, and is interrupted there."""
    from qmpblock.names import NBD_LOCK
    from qmpblock.qemu import lock
    from qmpblock.qemu.lock import Holder

    vm = await start_qemu(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = (await controller.disks())[0]

        async def nothing(holder):
            raise AssertionError(holder)

        await lock.acquire(controller.monitor, NBD_LOCK, Holder.me("test"), nothing, stall=1)
        process = await start("map", vm.second_monitor_path, disk.name)
        await asyncio.sleep(1.5)
        assert process.returncode is None
        process.send_signal(number)
        _, err = await process.communicate()
        assert process.returncode == 130, err
        assert b"nothing of ours is left" in err
        await lock.release(controller.monitor, NBD_LOCK)


async def test_demo_says_that_all_is_equal(qemu_binary, vm_dir):
    out, _ = await run("demo", "--json", "--qemu", qemu_binary)
    verdicts = valid(json.loads(out), "demo")
    assert verdicts["before"]["equals_qemu_img"] is True
    assert verdicts["after"]["equals_qemu_img"] is True
    assert verdicts["after"]["extents"] > verdicts["before"]["extents"]
    out, _ = await run("demo", "--qemu", qemu_binary)
    assert not re.search("DIFFERENT", out)
    assert out.count("guest sees") == 2
