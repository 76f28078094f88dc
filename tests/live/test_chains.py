"""Snapshot, stream and commit over every shape of chain, with a guest that writes throughout.

A run takes a sample of the cases (conftest.py). A case that failed has the same name in
tests/soak/test_chains_soak.py, where all of them are.
"""

import pytest
from chaincases import scenarios_with_cases
from chains import do_and_verify

pytestmark = pytest.mark.live


@pytest.mark.parametrize(("scenario", "disk", "case"), scenarios_with_cases())
async def test_every_chain(scenario, disk, case, start_qemu, invariant, vm_dir, qemu_binary):
    await do_and_verify(scenario, disk, case, start_qemu, invariant, vm_dir, qemu_binary)
