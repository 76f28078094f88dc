"""Somebody changes a chain before every command of ours, whole: `make soak`."""

import pytest
from intruding import VERBS, WAYS, cross_all

pytestmark = [pytest.mark.live, pytest.mark.soak]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verb", VERBS, ids=str)
async def test_a_change_before_every_command(verb, way, vm_dir, qemu_binary):
    await cross_all(verb, way, vm_dir, qemu_binary)
