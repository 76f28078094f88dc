"""A seeded sample of what tests/soak runs whole."""

import pytest
from rounds import maps_under_stress, rounds

from qmpblock.testing.images import Tools

pytestmark = pytest.mark.live


@pytest.mark.scenarios("stress-*.yaml")
async def test_maps_under_stress_with_kills(scenario, start_qemu, qemu_binary, invariant):
    _, chance = rounds(20)
    vm = await start_qemu(scenario, guest=True)
    print(await maps_under_stress(vm, invariant, Tools.of(qemu_binary), chance, 20, 4))
