"""Ownership: whether the images of a VM are its QEMU's to read and to change, now.

The one gate that every verb asks before it does anything, and again at the last moment before it
exports or changes something (design.md, safety rule 10). Two things may speak against it:

- migration. A VM that waits for one has its images inactive: they are the source's, and a mere
  read-only export would activate them (K21). One that was migrated away tells the
  past, and what it writes destroys what the destination wrote. While one is under way, the images
  change hands at a moment that nobody announces (measured: NBD_CMD_CACHE and a stream that began
  before it go on writing on 7.2, the stream also on 11.1). What is not known to be safe is refused,
  states that we have never heard of included;
- a manager that owns the chain (`qmpblock.managers`), for what changes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from qmpblock.errors import UNTOUCHED, CommandError, UnsupportedError, printable
from qmpblock.host.processes import command_line
from qmpblock.managers import Manager, Traits, Verb, Work, recognise, refused
from qmpblock.qemu.monitor import Monitor
from qmpblock.qemu.runstate import MIGRATION_OVER, OF_ITS_OWN

if TYPE_CHECKING:
    from qmpblock.graph.model import BlockGraph, Device
    from qmpblock.qemu.connection import Connection

__all__ = [
    "Owner",
    "Situation",
    "ask",
    "ask_for_change",
    "inactive_devices",
    "look",
    "manager_of",
    "situation",
]


class Owner(Enum):
    """Whose the images are."""

    THIS = "this QEMU's"
    LEAVING = "this QEMU's until the migration or the saving that is under way has ended"
    SOURCE = "the migration's source's"
    GONE = "of whoever goes on with this VM"
    UNKNOWN = "not known to be this QEMU's"


@dataclass(frozen=True)
class Situation:
    """Whose the images are, and what tells.

    :ivar why: in words, where they are not simply this QEMU's; `remedy`: what to do then.
    """

    owner: Owner
    why: str = ""
    remedy: str = ""


_HERE = Situation(Owner.THIS)
_BY_TURNS: tuple[Verb, ...] = ("backup", "copy", "point")  # a monitor that others have suffices
_OF_PROXMOX = frozenset({"alloc-track", "zeroinit"})  # drivers of its QEMU alone
_WAIT = (
    "wait for its end, or cancel it (migrate_cancel); then run this again, on the VM in which the "
    "guest goes on"
)


def situation(status: str, migration: str, inactive: Iterable[str] = ()) -> Situation:
    """Judge by what QEMU says. Pure.

    :param status: of query-status.
    :param migration: the status of query-migrate; `none` where it has none.
    :param inactive: names of disks whose images are inactive in this QEMU.
    """
    if status == "inmigrate":
        return Situation(
            Owner.SOURCE,
            "this VM waits for a migration: its images belong to the VM that it is to take over, "
            "and to look into them here would activate them",
            "work on the VM in which the guest runs now, or on this one once the guest runs here",
        )
    if status == "postmigrate":
        return Situation(
            Owner.GONE,
            "this VM was migrated away, or saved to a file: its images belong to whoever goes on "
            "with it, and what this QEMU knows of them is the past",
            "work on the VM in which the guest goes on, and quit this one (never cont it, unless "
            "the other has certainly ended)",
        )
    if status in ("finish-migrate", "colo") or migration not in MIGRATION_OVER:
        what = f"query-status says {printable(status)}, query-migrate {printable(migration)}"
        return Situation(
            Owner.LEAVING,
            f"this VM is being migrated, or its state saved ({what}); its images may change hands "
            "at any moment",
            _WAIT,
        )
    if status == "restore-vm":
        return Situation(
            Owner.LEAVING,
            "QEMU is at work on going back to an internal snapshot of this VM, or stands since a "
            "loadvm that failed (query-status says restore-vm)",
            "wait for its end. If it has failed, some disks may be as of the snapshot, and the "
            "guest's memory is not: loadvm has said of which disk it failed; go back to it once "
            "that is mended, or reset the guest (system_reset) before cont",
        )
    if status == "save-vm":
        return Situation(
            Owner.LEAVING,
            f"QEMU is at work on an internal snapshot of this VM (query-status says {status})",
            "wait for its end, then run this again",
        )
    if status not in OF_ITS_OWN:
        return Situation(
            Owner.UNKNOWN,
            f"this VM is in a state that qmpblock does not know ({printable(status)}), so whether "
            "its images are its own cannot be told",
            "run this again when the VM runs or is paused",
        )
    names = ", ".join(printable(name) for name in inactive)
    if names:
        return Situation(
            Owner.SOURCE,
            f"the images of {names} are inactive in this VM: it took over a migration and was not "
            "continued yet, or somebody has handed them to another process",
            "continue the VM first (cont), once the other one has certainly ended or given them up",
        )
    return _HERE


def inactive_devices(debug_graph: Mapping[str, Any], devices: Iterable[Device]) -> tuple[str, ...]:
    """Return which of these disks' images are inactive, by their permissions. Pure.

    An active disk's block backend has at least `consistent-read`; QEMU takes all away from one
    whose images it deactivates (measured on 7.2, where nothing else tells, and 11.1), but `write`
    alone from that of a legacy -drive of a 7.2 that waits for a migration.

    :param debug_graph: the reply of x-debug-query-block-graph.
    """
    has = {
        str(node["name"]): set(edge["perm"])
        for node in debug_graph["nodes"]
        for edge in debug_graph["edges"]
        if node["type"] == "block-backend" and edge["parent"] == node["id"]
    }
    inactive = []
    for device in devices:
        for name in device.names():
            needs = "write" if device.drive and not device.read_only else "consistent-read"
            if name in has and needs not in has[name]:
                inactive.append(device.name)
                break
    return tuple(inactive)


async def look(monitor: Monitor, devices: Iterable[Device] = ()) -> Situation:
    """Ask QEMU whose the images are. Two short queries while the guest runs, three else.

    :param devices: whose images are meant; those of no device may be inactive unnoticed.
    """
    known = tuple(devices)
    owned = await _look(monitor, known)
    return (_being_filled(known) or owned) if owned.owner is Owner.THIS else owned


def _being_filled(devices: Iterable[Device]) -> Situation | None:
    """Tell that Proxmox VE is at work below the guest of a disk; None where it is not.

    Its QEMU has drivers for that of which no other knows, so neither do we what is where then.
    """
    for device in devices:
        for layer in () if device.chain is None else device.chain.layers:
            if layer.node.driver in _OF_PROXMOX:
                return Situation(
                    Owner.UNKNOWN,
                    f"Proxmox VE is at work on {printable(device.name)}: it has the node "
                    f"{printable(layer.node.name)} of its own QEMU's driver {layer.node.driver}, "
                    "so what supplies which part of the disk cannot be told",
                    "wait until its task (a live restore, a move of the disk) has ended",
                )
    return None


async def _look(monitor: Monitor, known: tuple[Device, ...]) -> Situation:
    # In this order: a migration that has just ended is still seen in the run state (11.1 says
    # `completed` a moment before it leaves finish-migrate), and never the other way round.
    migrates, runs = await monitor.read("query-migrate", "query-status")
    migration, status = str(migrates.get("status", "none")), str(runs["status"])
    owned = situation(status, migration)
    if owned.owner is not Owner.THIS or status == "running":
        return owned  # while a guest runs, QEMU deactivates nothing under it
    if not known:
        return owned
    try:
        inactive = inactive_devices(await monitor.execute("x-debug-query-block-graph"), known)
    except CommandError:  # unstable: a later QEMU may drop it
        told = {
            entry.get("qdev"): entry.get("inserted", {}).get("active")
            for entry in await monitor.execute("query-block")
        }
        inactive = tuple(
            device.name
            for device in known
            if False in (told.get(device.qom_path), told.get(device.id))
        )
    return situation(status, migration, inactive)


async def ask(
    monitor: Monitor,
    devices: Iterable[Device] = (),
    *,
    standing: str | None = UNTOUCHED,
) -> None:
    """Go on only where the images are this QEMU's.

    :param devices: whose images are meant.
    :param standing: what stands now, for the error.
    :raise UnsupportedError: they are not, or may not be for long; the reason and what to do.
    """
    owned = await look(monitor, devices)
    if owned.owner is not Owner.THIS:
        raise UnsupportedError(owned.why, standing=standing, remedy=owned.remedy)


async def manager_of(vm: Connection, graph: BlockGraph) -> Manager | None:
    """Return who manages a VM, by all that can be seen of it; None: nobody that we know."""
    chardevs, called = await vm.monitor.read("query-chardev", "query-name")
    return recognise(
        Traits(
            nodes={node.name: node.driver for node in graph.nodes.values()},
            devices=tuple(name for device in graph.devices for name in device.names()),
            chardevs={str(one["label"]): str(one["filename"]) for one in chardevs},
            name=str(called.get("name", "")),
            arguments=command_line(vm.monitor.peer_pid),
        )
    )


async def ask_for_change(
    vm: Connection, work: Work, graph: BlockGraph | None = None, *, asked: bool = False
) -> None:
    """Go on only where nobody else owns the chain that is to be changed.

    Asked at the beginning only: what has begun is brought to its end.

    :param work: what is to be done, for the manager's own way.
    :param graph: as it has just been read, if it has.
    :param asked: whether a manager that lends its monitor will be asked to do it itself.
    :raise UnsupportedError: a manager does; the reason, and its own way. Or it is not done by a
        monitor that is had by turns.
    """
    if vm.unmanaged and not vm.monitor.by_turns:
        return
    manager = await manager_of(vm, await vm.graph() if graph is None else graph)
    if vm.unmanaged:
        _check_by_turns(vm, work, manager)
        return
    if manager is not None and work.verb in refused(manager, lent=asked and vm.monitor.is_lent):
        raise UnsupportedError(
            f"this VM is managed by {manager.name} ({printable(manager.told_by)}), which would not "
            f"know that {work.effect}",
            standing=UNTOUCHED,
            remedy=f"{manager.way(work)}; --unmanaged (unmanaged=True) does it all the same",
        )


def _check_by_turns(vm: Connection, work: Work, manager: Manager | None) -> None:
    """Refuse what is not done by a monitor that others have in between, whoever owns the chain.

    In the midst of most changes the guest's I/O is held, or an event says how it ended.
    """
    if work.verb in _BY_TURNS:
        return
    manager = manager or Manager("Proxmox VE", "", "")
    raise UnsupportedError(
        f"{work.called} is not done by {vm.monitor.address}, which others have in between: the "
        "guest could be held until they are done",
        standing=UNTOUCHED,
        remedy=f"give the VM a second monitor, and use that: {manager.monitor_to_add()}; then shut "
        "it down, and start it again",
    )
