"""The eight drawings by policy alone while the guest writes to the very ranges: `make soak`."""

import pytest
from rounds import rounds
from stressed_drawings import stressed_rounds

pytestmark = [pytest.mark.live, pytest.mark.soak]


async def test_drawings_while_the_guest_writes(start_qemu, vm_dir, qemu_binary):
    count, chance = rounds(200)
    outcome = await stressed_rounds(start_qemu, vm_dir, qemu_binary, chance, count)
    print(outcome)
    assert outcome.met > 0, "the guest never wrote where the policy was at work"
