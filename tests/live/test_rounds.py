"""A seeded sample of what tests/soak runs whole."""

import pytest
from copyrounds import KINDS, copies_under_stress
from killing import Graveyard
from migrationattempts import broken_off_then_made
from migrationrounds import migrations_under_stress
from rounds import kill_matrix, maps_under_stress, rounds, sample

import qmpblock
from qmpblock.errors import BusyError
from qmpblock.testing.images import Tools

pytestmark = pytest.mark.live


@pytest.mark.scenarios("stress-*.yaml")
async def test_maps_under_stress_with_kills(scenario, start_qemu, qemu_binary, invariant):
    _, chance = rounds(12)
    vm = await start_qemu(scenario, guest=True)
    print(await maps_under_stress(vm, invariant, Tools.of(qemu_binary), chance, 12, 3))


@pytest.mark.scenarios("stress-iothread.yaml")
async def test_a_controller_killed_at_any_command(scenario, start_qemu, vm_dir):
    vm = await start_qemu(scenario, guest=True)
    tried, points = await kill_matrix(vm, sample(0.15))
    assert 0 < tried < points
    assert not [p for p in (vm_dir / "t").iterdir() if p.name.startswith("qmpblock")]


@pytest.mark.scenarios("stress-chain.yaml")
async def test_a_controller_killed_at_any_command_beside_a_foreign_server(
    scenario, start_qemu, vm_dir
):
    vm = await start_qemu(scenario)
    socket = str(vm_dir / "foreign")
    await vm.execute("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
    await kill_matrix(vm, sample(0.07), foreign=socket)
    await vm.execute("nbd-server-stop")


@pytest.mark.scenarios("stress-iothread.yaml")
async def test_a_half_open_connection_needs_its_own_monitor(scenario, start_qemu, invariant):
    """Where stopping the server would hang QEMU, another monitor is sent to the right one."""
    vm = await start_qemu(scenario, guest=True)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
    what, number = {"do": "map", "disk": disk.name}, 1
    async with Graveyard() as graveyard:
        while True:  # up to the command after which the export is there, and no handshake yet
            died, _ = await graveyard.control(vm, what, number, "after")
            assert died
            if await vm.execute("query-block-exports"):
                break
            async with qmpblock.connect(vm.monitor_path) as controller:
                await (await controller.disks())[0].map()
            number += 1
    async with qmpblock.connect(vm.second_monitor_path) as controller:
        [disk] = await controller.disks()
        if vm.version < (10, 0, 0):
            with pytest.raises(BusyError, match="handshake") as caught:
                await disk.map()
            assert vm.monitor_path in caught.value.remedy
        else:
            await disk.map()
            invariant.expect(r"socket")  # its descriptor stays with the other monitor
    async with qmpblock.connect(vm.monitor_path) as controller:
        await (await controller.disks())[0].map()


async def test_copies_while_the_guest_writes(start_qemu, vm_dir, qemu_binary, qemu_version):
    count, chance = 2, rounds(2)[1]
    print(
        await copies_under_stress(
            start_qemu, vm_dir, qemu_binary, qemu_version, chance, count, kinds=KINDS
        )
    )


async def test_migrations_while_the_guest_writes(
    start_qemu, start_destination, vm_dir, qemu_binary, qemu_version
):
    count, chance = 2, rounds(2)[1]
    where = (start_qemu, start_destination, vm_dir, qemu_binary, qemu_version)
    print(await migrations_under_stress(*where, chance, count))


async def test_a_migration_is_broken_off_at_any_moment_then_made(
    begin, start_destination, monkeypatch
):
    _, chance = rounds(5)
    print(await broken_off_then_made(begin, start_destination, monkeypatch, chance, 5))
