"""Somebody changes a chain in the last moment before a command of ours."""

import pytest
from intruding import Crossings, cross_some, verb

pytestmark = pytest.mark.live

_POINTS = 3  # each takes a second or two


@pytest.mark.parametrize(
    ("name", "way", "command"),
    [
        ("copy-start-top", "apart", "blockdev-backup"),
        ("copy-start-top", "inline", "blockdev-backup"),
        ("copy-end-top", "throttled", "blockdev-mirror"),
        ("pivot-top", "throttled", "blockdev-mirror"),
        ("commit", "throttled", "block-commit"),
    ],
)
async def test_what_is_meant_is_the_active_layer(name, way, command, vm_dir, qemu_binary):
    """Of another one a copy would hold what is in that alone, and a pivot would be none (K46)."""
    async with Crossings(verb(name), way, vm_dir, qemu_binary) as matrix:
        met = await matrix.met(matrix.number_of(command))
    if not met.theirs.startswith("refused"):
        assert "somebody" in met.ours


async def test_a_snapshot_at_any_command(vm_dir, qemu_binary):
    assert await cross_some(_POINTS, vm_dir, qemu_binary) > 0
