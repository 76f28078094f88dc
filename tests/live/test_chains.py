"""Snapshot, stream and commit over every shape of chain, with a guest that writes throughout.

Every scenario has its turn in each run, with half of its cases, by chance. A case that failed
has the same name in tests/soak/test_chains_soak.py, where all of them are.
"""

import os
import random
import zlib

import pytest
from chaincases import scenarios_with_cases
from chains import do_and_verify

pytestmark = pytest.mark.live

# The same in every process of one run, or they would not agree on what there is to test.
SEED = os.environ.get("QMPBLOCK_SEED") or zlib.crc32(
    os.environ.get("PYTEST_XDIST_TESTRUNUID", str(random.SystemRandom().random())).encode()
)
CHANCE = random.Random(int(SEED))


def half(cases):
    chosen = CHANCE.sample(cases, -(-len(cases) // 2))
    return [case for case in cases if case in chosen]


@pytest.mark.parametrize(("scenario", "disk", "case"), scenarios_with_cases(choose=half))
async def test_every_chain(scenario, disk, case, start_qemu, invariant, vm_dir, qemu_binary):
    await do_and_verify(scenario, disk, case, start_qemu, invariant, vm_dir, qemu_binary)
