"""This project's live tests: every VM of `start_qemu` must end as it began.

Some tests run over every scenario and every case, which takes an hour for one QEMU. A run takes
a sample of them, by chance, at least one of each function; QMPBLOCK_SEED repeats it. `make soak`
deals all of them out among its slices (QMPBLOCK_SLICE), and QMPBLOCK_WHOLE=1 runs them all.
"""

from __future__ import annotations

import os
import random
import zlib
from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).parent

#: What share of a function's cases a run takes, by module.
SHARES = {
    "test_ahead": 0.3,
    "test_allocate": 0.1,
    "test_allocate_full": 0.1,
    "test_chains": 0.07,
    "test_drawings": 0.06,
    "test_job_commands": 0.3,
    "test_job_control": 0.2,
    "test_job_faults": 0.2,
    "test_policy": 0.04,
}


@pytest.fixture(autouse=True)
def _every_vm_ends_as_it_began(request: pytest.FixtureRequest) -> None:
    if "start_qemu" in request.fixturenames:
        request.getfixturevalue("invariant")


def seed() -> int:
    """Return the seed of the sample; the same in every process of a run, or they would differ."""
    given = os.environ.get("QMPBLOCK_SEED")
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    return int(given) if given else zlib.crc32(run.encode()) if run else _SEED


_SEED = random.SystemRandom().getrandbits(32)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not in the sample, or not in this slice of a soak."""
    ours = [item for item in items if item.path.parent == HERE]
    place = os.environ.get("QMPBLOCK_SLICE")
    if os.environ.get("QMPBLOCK_WHOLE") or (not ours):
        return
    if place:
        number, slices = map(int, place.split("/"))
        left = {item for at, item in enumerate(ours) if at % slices != number}
    else:
        left = _not_sampled(ours)
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


def _not_sampled(ours: list[pytest.Item]) -> set[pytest.Item]:
    functions = defaultdict(list)
    for item in ours:
        if item.path.stem in SHARES:
            functions[item.path.stem, item.nodeid.partition("[")[0]].append(item)
    chance = random.Random(seed())
    left: set[pytest.Item] = set()
    for (module, _), items in functions.items():
        count = max(1, round(SHARES[module] * len(items)))
        left.update(set(items) - set(chance.sample(items, count)))
    return left
