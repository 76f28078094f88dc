"""Maps under stress, whole: `make soak`."""

import pytest
from rounds import kill_matrix, maps_under_stress, rounds, slice_of_soak

from qmpblock.testing.images import Tools

pytestmark = [pytest.mark.live, pytest.mark.soak]


@pytest.mark.scenarios("stress-chain.yaml")
async def test_maps_under_stress(scenario, start_qemu, qemu_binary, invariant):
    count, chance = rounds(500)
    vm = await start_qemu(scenario, guest=True)
    print(await maps_under_stress(vm, invariant, Tools.of(qemu_binary), chance, count, 0))


@pytest.mark.scenarios("stress-iothread.yaml")
async def test_maps_under_stress_with_an_iothread_and_kills(
    scenario, start_qemu, qemu_binary, invariant
):
    count, chance = rounds(500)
    vm = await start_qemu(scenario, guest=True)
    kills = max(1, count // 10)
    print(await maps_under_stress(vm, invariant, Tools.of(qemu_binary), chance, count, kills))


@pytest.mark.scenarios("stress-iothread.yaml")
async def test_a_controller_killed_at_every_command(scenario, start_qemu):
    vm = await start_qemu(scenario, guest=True)
    await kill_matrix(vm, slice_of_soak())


@pytest.mark.scenarios("stress-chain.yaml")
async def test_a_controller_killed_at_every_command_beside_a_foreign_server(
    scenario, start_qemu, vm_dir
):
    vm = await start_qemu(scenario)
    socket = str(vm_dir / "foreign")
    await vm.execute("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
    await kill_matrix(vm, slice_of_soak(), foreign=socket)
    await vm.execute("nbd-server-stop")
