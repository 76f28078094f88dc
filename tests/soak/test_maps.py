"""Maps under stress, whole: `make soak`."""

import pytest
from rounds import maps_under_stress, rounds

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
