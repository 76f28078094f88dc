"""Whoever is killed, at each thing that libvirt is asked for in a commit or a copy: `make soak`."""

import pytest
from libvirtpoints import ACTIVE, MIDDLE, MOVE, killed, make_four

pytestmark = [pytest.mark.live, pytest.mark.soak]

CALLS = {
    ACTIVE: ("layers", "commit", "ready", "pivot", "files"),
    MIDDLE: ("layers", "commit", "job"),
    MOVE: ("copy", "ready", "limit", "pivot"),
}


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("victim", ["controller", "qemu", "daemon"])
@pytest.mark.parametrize(
    ("what", "call"),
    [(what, call) for what, calls in CALLS.items() for call in calls],
    ids=[
        f"{name}-{call}"
        for what, name in ((ACTIVE, "active"), (MIDDLE, "middle"), (MOVE, "move"))
        for call in CALLS[what]
    ],
)
async def test_somebody_is_killed(what, call, victim, moment, libvirt, vm_dir, qemu_binary):
    chain = make_four(vm_dir, qemu_binary)
    told, _ = await killed(libvirt, chain, qemu_binary, what, victim, call, moment)
    moves = call in ("pivot", "files")
    assert told == ("paused" if moves else "running")


@pytest.mark.parametrize("what", [ACTIVE, MOVE], ids=["active", "move"])
@pytest.mark.parametrize("number", range(20))
async def test_the_daemon_is_killed_as_it_takes_note(number, what, libvirt, vm_dir, qemu_binary):
    """Between QEMU's doing and its own note nothing of ours can stop it: a matter of luck."""
    chain = make_four(vm_dir, qemu_binary)
    await killed(libvirt, chain, qemu_binary, what, "daemon", "pivot", "after")
