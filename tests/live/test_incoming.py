"""What a storage daemon may do to the images of a QEMU that waits for a migration."""

import asyncio
from pathlib import Path

import pytest
from migrating import NEWER, OLD_MACHINE

from qmpblock.errors import CommandError
from qmpblock.testing import StorageDaemon, Tools, build, parse_scenario

pytestmark = pytest.mark.live
IMAGES = {
    "qcow2": "{size: 64M}",
    "raw": "{size: 64M, format: raw}",
    "luks": "{size: 64M, format: luks, secret: geheim}",
    "data-file": "{size: 64M, data_file: there.data}",
}
TEXT = "about: A disk.\ndisks: [{{name: d0, images: [{image}], attach: {{discard: unmap}}}}]\n"


@pytest.fixture(params=["same", "newer"])
def destination_of(request, start_qemu, vm_dir, qemu_binary, invariant):
    """Start a source, and a destination that has an image of that kind open."""

    async def start(kind):
        options = {"guest": True}
        program = qemu_binary
        if request.param == "newer":
            if not NEWER.exists() or Path(qemu_binary).resolve() == NEWER.resolve():
                pytest.skip("another QEMU, newer than this one, is needed")
            program = str(NEWER)
            options["machine"] = OLD_MACHINE
        text = TEXT.format(image=IMAGES[kind])
        here = await build(parse_scenario(text, "here"), vm_dir / "here", Tools.of(qemu_binary))
        there = await build(parse_scenario(text, "there"), vm_dir / "there", Tools.of(program))
        source = await start_qemu(here, **options)
        waiting = {"qemu": program, "incoming": "defer", "extra": ["-S"]}
        destination = await start_qemu(there, **options, **waiting)
        for vm in (source, destination):
            invariant.forget(vm)
        return source, destination

    return start


async def written(server, pattern, at):
    words = [Tools.of().io, "-f", "raw", "-c", f"write -P {pattern} {at} 4M", server.uri("d0")]
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0, out


async def reads(vm, pattern, at):
    """Whether QEMU reads that there: it says so on its stdout."""
    before = len(vm.stdout)
    command = f'qemu-io {vm.disks[0].spec.name} "read -P {pattern} {at} 4M"'
    await vm.execute("human-monitor-command", command_line=command)
    async with asyncio.timeout(120):
        while "ops/sec" not in (said := vm.stdout[before:]):
            await asyncio.sleep(0.01)
    return "verification failed" not in said


async def come(source, destination, where):
    """Have the guest come, by QEMU's own means."""
    on = [{"capability": "return-path", "state": True}]
    await source.execute("migrate-set-capabilities", capabilities=on)
    uri = f"unix:{where}"
    await destination.execute("migrate-incoming", uri=uri)
    await source.execute("migrate", uri=uri)
    async with asyncio.timeout(120):
        while (await source.execute("query-migrate"))["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.02)
        while (await destination.execute("query-migrate")).get("status") == "active":
            await asyncio.sleep(0.02)
    return [(await vm.execute("query-status"))["status"] for vm in (source, destination)]


@pytest.mark.parametrize("kind", IMAGES)
async def test_the_guest_sees_what_was_written_before_it_came(kind, destination_of, vm_dir):
    source, destination = await destination_of(kind)
    async with StorageDaemon(destination.disks, writable=True) as server:
        await written(server, 0xAB, "20M")
        await written(server, 0xCD, "40M")
    # What says where the data is was read before there was any, and is read again with the guest.
    stale = kind in ("qcow2", "data-file")
    assert await reads(destination, 0xAB, "20M") is not stale
    assert await come(source, destination, vm_dir / "stream") == ["postmigrate", "paused"]
    await destination.execute("cont")
    assert await reads(destination, 0xAB, "20M")
    assert await reads(destination, 0xCD, "40M")
    await destination.quit()
    await destination.disks[0].active.check(Tools.of(destination.command[0]))


async def test_another_has_its_image_when_the_guest_comes(destination_of, vm_dir):
    source, destination = await destination_of("qcow2")
    async with StorageDaemon(destination.disks, writable=True) as server:
        assert await come(source, destination, vm_dir / "stream") == ["postmigrate", "paused"]
        with pytest.raises(CommandError, match='Failed to get "write" lock'):
            await destination.execute("cont")
        assert (await destination.execute("query-status"))["status"] == "paused"
        await written(server, 0xAB, "20M")
    # It was read again in vain, and is not once more: what was written since is not seen.
    await destination.execute("cont")
    assert not await reads(destination, 0xAB, "20M")
