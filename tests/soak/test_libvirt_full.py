"""Whoever is killed, at each thing that libvirt is asked for to reserve space: `make soak`."""

import pytest
from libvirthost import libvirt_host
from libvirtpoints import FULL, killed, make_four

pytestmark = [pytest.mark.live, pytest.mark.soak]


@pytest.fixture(scope="module")
def host(qemu_binary):
    with libvirt_host() as host:
        yield host


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("victim", ["controller", "qemu", "daemon"])
@pytest.mark.parametrize("call", ["targets", "snapshot", "layers", "commit", "ready", "pivot"])
async def test_somebody_is_killed(call, victim, moment, host, vm_dir, qemu_binary):
    chain = make_four(vm_dir, qemu_binary)
    told, layers = await killed(host, chain, qemu_binary, FULL, victim, call, moment)
    assert told == ("paused" if call in ("snapshot", "pivot") else "running")
    if victim == "controller":
        assert layers[0] == "now.qcow2"


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("call", ["snapshot", "pivot"])
async def test_the_daemon_is_killed_as_it_takes_note(call, number, host, vm_dir, qemu_binary):
    """Between QEMU's doing and its own note nothing of ours can stop it: a matter of luck."""
    chain = make_four(vm_dir, qemu_binary)
    await killed(host, chain, qemu_binary, FULL, "daemon", call, "after")
