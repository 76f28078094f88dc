"""Whoever is killed, at each thing that libvirt is asked for to reserve space: `make soak`."""

import pytest
from libvirtpoints import FULL, killed, make_four

pytestmark = [pytest.mark.live, pytest.mark.soak]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("victim", ["controller", "qemu", "daemon"])
@pytest.mark.parametrize("call", ["targets", "snapshot", "layers", "commit", "ready", "pivot"])
async def test_somebody_is_killed(call, victim, moment, libvirt, vm_dir, qemu_binary):
    chain = make_four(vm_dir, qemu_binary)
    told, layers = await killed(libvirt, chain, qemu_binary, FULL, victim, call, moment)
    assert told == ("paused" if call in ("snapshot", "pivot") else "running")
    if victim == "controller":
        assert layers[0] == "now.qcow2"


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("call", ["snapshot", "pivot"])
async def test_the_daemon_is_killed_as_it_takes_note(call, number, libvirt, vm_dir, qemu_binary):
    """Between QEMU's doing and its own note nothing of ours can stop it: a matter of luck."""
    chain = make_four(vm_dir, qemu_binary)
    await killed(libvirt, chain, qemu_binary, FULL, "daemon", call, "after")
