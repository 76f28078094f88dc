"""A sample of the fuzzing (tests/fuzz): what is wrong in an obvious way is found here already."""

from __future__ import annotations

import gc
import os

import pytest
from fuzz.source import Source, disturbed, words_of
from fuzz.targets import SEEDS, TARGETS
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st

#: Inputs that once got through, by target. Each was a fault, and is mended.
FOUND = {
    "graph": (bytes.fromhex("060a10275a00275aa43b3b"),),
    "policy": (b"\xbd",),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_sample(name: str) -> None:
    target = TARGETS[name]

    @seed(1)
    @settings(
        max_examples=150,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @example(b"")
    @given(st.binary(max_size=200))
    def sample(data: bytes) -> None:
        target(data)

    sample()


@pytest.mark.parametrize(
    ("name", "data"),
    [(name, one) for found in (SEEDS, FOUND) for name in found for one in found[name]],
)
def test_what_is_known(name: str, data: bytes) -> None:
    TARGETS[name](data)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", TARGETS)
def test_memory_stays_flat(name: str) -> None:
    """The same inputs once more leave nothing behind."""
    inputs = [bytes((7 * i * k + i) % 256 for k in range(60)) for i in range(200)]
    for data in inputs:
        TARGETS[name](data)
    gc.collect()
    before = _resident()
    for data in inputs:
        TARGETS[name](data)
    gc.collect()
    assert _resident() - before < 4 << 20


def test_documents_are_disturbed_in_a_copy() -> None:
    document = {"a": [1, {"b": "c"}], "d": None}
    whole = repr(document)
    changed = {
        repr(disturbed(document, Source(bytes([i, k, i, k, 3 * i % 256])), words_of(document)))
        for i in range(0, 256, 5)
        for k in range(0, 256, 5)
    }
    assert repr(document) == whole
    assert len(changed) > 20
