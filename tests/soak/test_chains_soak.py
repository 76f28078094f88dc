"""Snapshot, stream and commit over every shape of chain, from every layer to every other."""

import pytest
from chaincases import every_case, scenarios_with_cases
from chains import do_and_verify
from rounds import slice_of_soak

pytestmark = [pytest.mark.live, pytest.mark.soak]

CHOSEN = slice_of_soak()
ALL = [param for point, param in enumerate(scenarios_with_cases(every_case)) if CHOSEN(point)]


@pytest.mark.parametrize(("scenario", "disk", "case"), ALL)
async def test_every_chain(scenario, disk, case, start_qemu, invariant, vm_dir, qemu_binary):
    await do_and_verify(scenario, disk, case, start_qemu, invariant, vm_dir, qemu_binary)
