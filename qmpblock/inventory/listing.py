"""`vms`: the VMs of this host, whoever runs them, and how each can be worked on.

Every running VM is a process, whoever started it; so that is where they are found, libvirt's and
Proxmox's too, whether or not their daemons run or may be asked. What is in a VM its monitor tells,
by the address that is given for it; where the manager holds its own monitor, by the one that it
lends or shares, or by one that stands beside it.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from qmpblock.address import (
    IncusAddress,
    LibvirtAddress,
    MonitorAddress,
    ProxmoxAddress,
    UnixAddress,
    parse_monitor,
)
from qmpblock.errors import Error, printable
from qmpblock.graph.model import Device
from qmpblock.host.processes import command_line
from qmpblock.inventory.commandline import Listening
from qmpblock.inventory.processes import QEMU, Found, find, qemus
from qmpblock.managers import Manager, Traits, Work, recognise, refused
from qmpblock.qemu import ownership
from qmpblock.qemu.connection import Connection, NBDAccess

__all__ = ["RunningVM", "vms"]

_AT_ONCE = 32  # VMs that are asked; what does not answer takes no processor
_GREETING = 5.0  # seconds; a monitor that nobody holds takes milliseconds, on a busy host more
_ANSWERS = 10.0  # seconds for all that is asked of one VM
_Way = Callable[[], Awaitable[Found]]
_INCUS = re.compile(r"/run/incus/([\w.-]+)/qmpblock\.qmp", re.ASCII)
_SESSION = re.compile(r"/libvirt/qemu/lib/domain-")  # under a home; the system's: .../qemu/domain-


@dataclass(frozen=True)
class RunningVM:
    """A VM of this host.

    :ivar name: empty where it has none. Its manager's own may be another: `manager.vm`.
    :ivar pid: of its QEMU, which runs as `user`.
    :ivar manager: who owns its chains; None: nobody that is known.
    :ivar address: what an ADDRESS is given as; None: it has none.
    :ivar trouble: why it has no address, or cannot be worked on by that now; empty where it can.
    :ivar remedy: what to do then.
    :ivar status: as QEMU says it (`running`); None where it was not asked, or did not answer.
    :ivar devices: the guest's drives, empty ones, too; None likewise.
    :ivar called: what the manager calls them, by their own names, where that is another.
    :ivar refused: what is not done there because of the manager, and the manager's own way to it.
    """

    name: str
    pid: int
    user: str
    manager: Manager | None = None
    address: str | None = None
    trouble: str = ""
    remedy: str = ""
    status: str | None = None
    devices: tuple[Device, ...] | None = None
    called: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


async def vms() -> tuple[RunningVM, ...]:
    """List the VMs of this host, by name.

    Each is asked by its monitor, with queries alone, and given ten seconds: what a VM that is
    busy, hangs, or may not be looked into does not tell is missing, and its `trouble` says why.
    Cancelling leaves nothing behind.
    """
    few = asyncio.Semaphore(_AT_ONCE)

    async def ask(qemu: QEMU) -> RunningVM | None:
        async with few:
            vm = await _look(qemu)
        # One that has ended meanwhile is no VM of this host, nor trouble for anybody.
        return None if vm.trouble and command_line(qemu.pid) != qemu.words else vm

    found = await asyncio.to_thread(qemus)
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(ask(qemu)) for qemu in found]
    seen = (one.result() for one in asked)
    return tuple(sorted((vm for vm in seen if vm), key=lambda vm: (vm.name, vm.pid)))


async def _look(qemu: QEMU) -> RunningVM:
    started = qemu.started
    manager = recognise(Traits(chardevs=started.chardevs, name=started.name, arguments=qemu.words))
    vm = _managed(RunningVM(started.name, qemu.pid, qemu.user), manager)
    best = replace(vm, trouble=_none(manager), remedy=_what_to_add(qemu, manager))
    whys = []
    try:
        async with asyncio.timeout(_ANSWERS):
            async for found in _found(_ways(qemu, manager)):
                if found.address is None:
                    whys.append(f"its monitor {printable(found.why)}")
                    continue
                at = replace(vm, address=_written(found.address), trouble=found.why, remedy="")
                if best.address is None:
                    best = at
                if not found.why:
                    try:
                        return await _asked(at, found.address)
                    except Error as error:
                        best = _troubled(best, at, error)
    except TimeoutError:
        return replace(
            best,
            trouble=f"its monitor did not answer within {_ANSWERS:g} s",
            remedy="look whether its process is stopped, or its storage hangs",
        )
    return best if best.address or not whys else replace(best, trouble="; ".join(whys))


def _troubled(best: RunningVM, at: RunningVM, error: Error) -> RunningVM:
    """Say what was met at an address, where that is the one that is told."""
    if best.address != at.address:
        return best
    words = "; ".join(word for word in (error.standing, error.remedy) if word)
    return replace(at, trouble=error.message, remedy=" ".join(words.split()))


async def _asked(vm: RunningVM, address: MonitorAddress) -> RunningVM:
    async with Connection.open(
        address, NBDAccess(), greeting_timeout=_GREETING, stall=_ANSWERS
    ) as connection:
        return await _inside(vm, connection)


def _managed(vm: RunningVM, manager: Manager | None) -> RunningVM:
    lent = vm.address is not None and vm.address.startswith("libvirt:")
    works = [Work(verb, "") for verb in refused(manager, lent=lent)]
    ways = {work.called: manager.way(work) for work in works} if manager else {}
    return replace(vm, manager=manager, refused=ways)


def _ways(qemu: QEMU, manager: Manager | None) -> list[_Way]:
    """Return what finds an address of a VM, or says why there is none; the best way first."""
    if manager is not None and manager.name == "libvirt":
        return [partial(_by_libvirt, qemu, manager)]
    free: list[_Way] = []
    shared: list[_Way] = []
    for monitor in qemu.started.monitors:
        said = qemu.started.chardevs[monitor.chardev]
        if manager is None or not manager.holds(monitor.chardev, said):
            free.append(partial(find, qemu, monitor))
        elif manager.shares:
            shared.append(partial(_by_turns, qemu, monitor))
    return [*free, *shared]


async def _by_turns(qemu: QEMU, monitor: Listening) -> Found:
    found = await find(qemu, monitor)
    address = None if found.address is None else parse_monitor(str(found.address))
    if address is None or isinstance(address, ProxmoxAddress):
        return replace(found, address=address)
    return Found(None, f"is its manager's own ({found.address})")


async def _found(ways: Iterable[_Way]) -> AsyncIterator[Found]:
    """Yield what is found, last what somebody holds: for a moment, perhaps."""
    held = []
    for way in ways:
        found = await way()
        if found.held:
            held.append(found)
        else:
            yield found
    for found in held:
        yield found


def _none(manager: Manager | None) -> str:
    whose = f" but {manager.name}'s own" if manager is not None else ""
    return f"it has no QMP monitor that listens{whose}"


async def _by_libvirt(qemu: QEMU, manager: Manager) -> Found:
    if not any(_SESSION.search(word) for word in qemu.words):
        return Found(LibvirtAddress(manager.vm))
    if qemu.uid == os.geteuid():
        return Found(LibvirtAddress(manager.vm, "qemu:///session"))
    return Found(None, f"is lent by the libvirt session of {qemu.user} alone")


def _what_to_add(qemu: QEMU, manager: Manager | None) -> str:
    if manager is None:
        return "start it with -qmp unix:/run/qmpblock/VM.qmp,server=on,wait=off"
    if manager.name == "libvirt":
        return f"run this as {printable(qemu.user)}"
    return f"{manager.monitor_to_add()}; then shut it down, and start it again"


def _written(address: MonitorAddress) -> str:
    if isinstance(address, LibvirtAddress) and address == LibvirtAddress(address.domain):
        return f"libvirt:{address.domain}"
    if isinstance(address, UnixAddress) and (match := _INCUS.fullmatch(address.path)):
        return str(IncusAddress.of(match[1]))
    return str(address)


async def _inside(vm: RunningVM, connection: Connection) -> RunningVM:
    monitor = connection.monitor
    called = str((await monitor.execute("query-name")).get("name", ""))
    others = isinstance(monitor.address, LibvirtAddress) and monitor.peer_pid not in (None, vm.pid)
    if others or (vm.name and called != vm.name):
        return replace(
            vm,
            address=None,
            trouble=f"{printable(vm.address)} is the monitor of another VM, {printable(called)}",
            remedy="run this where that name leads to this one",
        )
    vm, graph = replace(vm, name=called), await connection.graph()
    # The graph tells more than a command line; and now it is known by what way it is reached.
    vm = _managed(vm, vm.manager or await ownership.manager_of(connection, graph))
    status = await monitor.execute("query-status")
    owned = await ownership.look(monitor, graph.devices)
    names = await connection.disks_called(graph)
    return replace(
        vm,
        status=str(status["status"]),
        devices=graph.devices,
        called={disk: name for name, disk in names.items()},
        trouble=owned.why,
        remedy=owned.remedy,
    )
