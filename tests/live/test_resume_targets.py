"""Copies that go on from what a block device or an NBD server holds, which bear no mark."""

import asyncio
import contextlib
from pathlib import Path

import pytest
import resuming
from disturbed import nothing_of_ours
from loopdevices import loop
from pointing import at_ease, written
from resuming import MIB, SIZE, SPEC, cancelled, check, check_figures, resumed

import qmpblock
from qmpblock.copying import resuming as library
from qmpblock.errors import NBDDisconnectedError, RequestError, StalledError
from qmpblock.testing import StorageDaemon, Tools, build, parse_scenario

pytestmark = pytest.mark.live

SERVED = "about: A server's.\ndisks: [{name: t, images: [{size: 72M, format: raw}]}]\n"
MORE = 8 * MIB  # bytes by which it is larger
GARBAGE = b"\xee"


@pytest.fixture
async def vm(start_qemu, vm_dir, qemu_binary):
    scenario = parse_scenario(resuming.DISK, "resumed")
    built = await build(scenario, vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    await written(vm, 50)
    return vm


@contextlib.contextmanager
def full_loop(image):
    """Have a file that is full of something else as a block device."""
    image.write_bytes(GARBAGE * (SIZE + MORE))
    with loop(image) as device:
        yield device


@contextlib.asynccontextmanager
async def daemon(vm_dir, qemu_binary, fill=True):
    """Serve a raw image; what it holds stays from one server to the next."""
    if fill:
        scenario = parse_scenario(SERVED, "served")
        built = await build(scenario, vm_dir / "served", Tools.of(qemu_binary))
        daemon.disks = built.disks
        Path(built.disks[0].active.path).write_bytes(GARBAGE * (SIZE + MORE))
    async with StorageDaemon(daemon.disks, writable=True) as server:
        server.image = Path(daemon.disks[0].active.path)
        yield server


async def test_a_block_device(vm, vm_dir):
    with full_loop(vm_dir / "backing") as device:
        kept = await cancelled(vm, device, force=True)
        assert kept == (device,)
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()
            with pytest.raises(RequestError, match="would be overwritten"):
                async with disk.copy(device, resume=True):
                    pass
            before = (vm_dir / "backing").read_bytes()[:SIZE]
            async with resumed(vm, controller, device, force=True) as (job, bounds):
                pass
    data = (vm_dir / "backing").read_bytes()
    check(data[:SIZE], bounds)
    assert data[SIZE:] == GARBAGE * MORE
    check_figures(job, before, data[:SIZE])
    assert job.result.disks[0].missing < SIZE - 4 * MIB
    await at_ease(vm, SPEC)


async def test_an_nbd_server_that_died(vm, vm_dir, qemu_binary):
    async with daemon(vm_dir, qemu_binary) as server:
        async with qmpblock.connect(vm.monitor_path) as controller:
            [disk] = await controller.disks()

            async def disturbed():
                async with disk.copy(server.uri("t"), speed=12 * MIB) as job:
                    async for seen in job:
                        if seen.done > 8 * MIB:
                            await server.kill()

            with pytest.raises(NBDDisconnectedError) as caught:
                await disturbed()
        assert f"kept in {server.uri('t')}" in caught.value.standing
    await nothing_of_ours(vm)
    before = server.image.read_bytes()[:SIZE]
    async with (
        daemon(vm_dir, qemu_binary, fill=False) as server,
        qmpblock.connect(vm.monitor_path) as controller,
        resumed(vm, controller, server.uri("t")) as (job, bounds),
    ):
        pass
    data = server.image.read_bytes()
    check(data[:SIZE], bounds)
    assert data[SIZE:] == GARBAGE * MORE
    check_figures(job, before, data[:SIZE])
    assert job.result.disks[0].missing < SIZE - 4 * MIB
    await at_ease(vm, SPEC)


@pytest.mark.parametrize("how", ["dies", "stops answering"])
async def test_a_server_that_fails_while_it_is_compared(how, vm, vm_dir, qemu_binary, monkeypatch):
    """The guest does not wait for it, nor does anybody for long."""
    compared = asyncio.Event()
    real = library.find_unequal

    async def compare(*clients, **options):
        compared.set()
        return await real(*clients, **options)

    monkeypatch.setattr(library, "find_unequal", compare)
    async with daemon(vm_dir, qemu_binary) as server:
        async with qmpblock.connect(vm.monitor_path, stall=4) as controller:
            [disk] = await controller.disks()

            async def disturbed():
                async with disk.copy(server.uri("t"), resume=True):
                    pass

            running = asyncio.ensure_future(disturbed())
            await asyncio.wait_for(compared.wait(), 60)
            if how == "dies":
                await server.kill()
            else:
                server.pause()
            with pytest.raises((NBDDisconnectedError, StalledError)) as caught:
                await running
        assert "there is no copy" in caught.value.standing
    held = (await vm.guest.latency()).held_us / 1e6
    assert held < 20
    await at_ease(vm, SPEC)
