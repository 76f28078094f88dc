"""Live migration: the guest arrives with all that it was told is written, or stays where it was."""

import asyncio
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from chains import cli
from jsonschema import Draft202012Validator
from migrating import arrived, machine, migrated, stays, to_newer

from qmpblock.testing import Tools, build, parse_scenario

pytestmark = pytest.mark.live

STRUCK = """
import os, signal, sys
from qmpblock.cli import main
from qmpblock.migration.passage import Passage

phase, enter = sys.argv.pop(1), Passage.enter

async def strike(self, now, **how):
    await enter(self, now, **how)
    if now.value == phase:
        os.kill(os.getpid(), signal.SIGINT)

Passage.enter = strike
main()
"""
SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schema/migrate.schema.json").read_text())


async def test_the_memory_alone(begin, start_destination):
    source = await begin()
    destination = await start_destination(source, shared=True)
    result = await migrated(source, destination, memory_only=True)
    assert result.disks == ()
    await arrived(source, destination, result)


async def test_a_disk_and_the_memory(begin, start_destination):
    source = await begin()
    destination = await start_destination(source)
    await arrived(source, destination, await migrated(source, destination))


@pytest.mark.parametrize("number", [1, 2, 8])
@pytest.mark.parametrize("image", ["qcow2", "raw"])
@pytest.mark.parametrize("iothread", ["none", "one"])
@pytest.mark.parametrize("device", ["virtio-blk", "virtio-scsi"])
async def test_every_kind_of_disk(device, iothread, image, number, begin, start_destination):
    text = machine(number, device=device, iothread=iothread, image=image)
    source = await begin(text, rate=100)
    destination = await start_destination(source)
    await arrived(source, destination, await migrated(source, destination))


@pytest.mark.needs_qemu("< 8", reason="the machine type of 7.2 is what both know")
@pytest.mark.parametrize("number", [1, 2])
async def test_to_a_newer_qemu(number, begin, start_destination):
    options = to_newer()
    source = await begin(machine(number, device="virtio-scsi"), **options["here"])
    destination = await start_destination(source, **options["there"])
    await arrived(source, destination, await migrated(source, destination))


async def test_a_chain_arrives_as_one_image(begin, start_destination):
    text = (
        "about: A chain.\ndisks:\n  - {name: d0, images: ["
        "{size: 64M, content: [write 0 8M 0xbb]}, {content: [write 0 4M 0xaa]}, "
        "{content: [write 4M 4M 0xaa]}]}\n"
    )
    source = await begin(text)
    destination = await start_destination(source, image="raw")
    await arrived(source, destination, await migrated(source, destination))
    assert destination.disks[0].active.path.stat().st_blocks < (24 << 20) // 512


async def test_the_command(begin, start_destination):
    source = await begin(machine(2))
    destination = await start_destination(source)
    source.expect_exit()
    words = (source.monitor_path, destination.monitor_path, "--quit-source", "--json")
    code, out, err = await cli("migrate", *words)
    assert code == 0, err
    told = json.loads(out)
    Draft202012Validator(SCHEMA).validate(told)
    assert [one["disk"] for one in told["disks"]] == ["vd0", "vd1"]
    assert told["source"] == "ended"
    assert "migration: copying" in err
    await arrived(source, destination, SimpleNamespace(**told | {"phases": [], "warnings": ()}))
    code, _, err = await cli("migrate", *words)
    assert code == 3, err


async def test_the_command_is_interrupted(begin, start_destination):
    source = await begin(machine(2))
    destination = await start_destination(source)
    words = ("migrate", source.monitor_path, destination.monitor_path)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpblock", *words, "--speed", "1M"), stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        while len(await source.execute("query-jobs")) < 2:
            await asyncio.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == 130, err
    assert "nothing of ours is left" in err.decode()
    code, out, err = await cli(*words)
    assert code == 0, err
    assert "the guest runs at the destination; it stood for " in out
    assert "never continue it" in out
    code, _, err = await cli(*words)
    assert code == 2, err


@pytest.mark.parametrize("phase", ["memory", "held", "ended", "sent", "landed", "handed"])
async def test_the_command_is_interrupted_as_the_guest_goes(
    phase, begin, start_destination, invariant
):
    """By Ctrl-C when a phase has just begun: all is undone, or finished, for that was too late."""
    source = await begin()
    destination = await start_destination(source)
    destination.expect_exit()
    await invariant.begin(source)
    words = ("migrate", source.monitor_path, destination.monitor_path)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", STRUCK, phase, *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, said = await process.communicate()
    err, code = said.decode(), process.returncode
    late = {"handed": True, "landed": code == 1}.get(phase, False)  # there nobody has decided yet
    assert (code, out) == (1 if late else 130, b""), err
    assert ("interrupted too late: the guest had gone over" in err) is late, err
    if late:
        invariant.forget(source)
        assert "the guest runs at the destination; it stood for" in err
        gone = SimpleNamespace(seconds=0.0, downtime=0.0, phases=[], warnings=())
        await arrived(source, destination, gone)
    else:
        assert "interrupted; nothing of ours is left in the VM" in err
        await stays(source, invariant)


async def test_a_wrong_pair_is_refused(begin, start_qemu, vm_dir, qemu_binary, invariant):
    source = await begin()
    other = parse_scenario(machine().replace("64M", "32M"), "smaller")
    built = await build(other, vm_dir / "smaller", Tools.of(qemu_binary))
    destination = await start_qemu(built, guest=True, incoming="defer", extra=["-S"])
    code, _, err = await cli("migrate", source.monitor_path, destination.monitor_path)
    assert code == 2
    assert "has 67108864 bytes a" in err
