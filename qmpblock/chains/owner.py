"""Owner: who changes a disk's chain. Every verb that does asks it, and does no more than it says.

QEMU itself, where nobody else owns the chain: then it is done by QMP, and is what it always was.
Where a manager does, that lends its monitor (`libvirt:DOMAIN`), it is asked to do it itself, by its
own API, with files that we have made and proven: then it knows of them, also at the next start.
Whoever owns a chain and cannot be asked so is not gone behind (`qmpblock.managers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qmpblock.chains.headers import by_qemu_img
from qmpblock.chains.overlay import Item, make_header, make_overlay, prove, take
from qmpblock.changes.backingproof import check_made, check_name
from qmpblock.changes.change import Change
from qmpblock.changes.operations import ManagersSnapshot, Snapshot
from qmpblock.changes.record import Record
from qmpblock.errors import UNTOUCHED, Error, GraphError, UnsupportedError, printable
from qmpblock.graph.model import BlockGraph, Chain, DiskDevice
from qmpblock.graph.openings import storage_of
from qmpblock.graph.places import FileId, Place
from qmpblock.host.openfiles import OpenFiles
from qmpblock.managers import Work
from qmpblock.qemu import ownership

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["Owner", "check_manager_knows", "is_asked", "manager_names", "owner_of"]


class Owner(Protocol):
    """Who changes the chains of a VM."""

    def record(self, said: Snapshot, items: Sequence[Item]) -> Snapshot:
        """Return what a snapshot of its says of itself."""

    async def check(self, items: Sequence[Item], fmt: str) -> None:
        """Refuse what it cannot; nothing was touched."""

    async def make(self, change: Change[Record], item: Item, fmt: str) -> None:
        """Make an overlay, and what the owner needs of it before it is taken."""

    async def prove(self, change: Change[Record], items: list[Item]) -> None:
        """See, at the last moment, that overlays are ours and that their headers lead back."""

    async def take(self, items: list[Item]) -> None:
        """Have every disk go on in its overlay, at one point, or none."""

    async def agree(self, change: Change[Record], items: list[Item], graph: BlockGraph) -> None:
        """See that whoever starts the VM next does it from there.

        :param graph: as it is after that.
        :raise GraphError: it does not; what it takes for the image, and what to do.
        """

    def nodes(self, item: Item) -> tuple[str, ...]:
        """Return the nodes that we add for an overlay."""

    def node(self, item: Item, chain: Chain) -> str:
        """Return the node of an overlay that was taken."""


def is_asked(vm: Connection) -> bool:
    """Whether the manager that lends the monitor is asked to change chains itself."""
    return vm.monitor.is_lent and not vm.unmanaged


async def owner_of(vm: Connection, work: Work) -> Owner:
    """Return who changes the chains of this VM.

    :param work: what is to be done, for the words of whoever owns them and cannot be asked.
    :raise UnsupportedError: such a one does.
    """
    await ownership.ask_for_change(vm, work, asked=True)
    return _Lender(vm) if is_asked(vm) else _QEMU(vm)


async def manager_names(vm: Connection, devices: Sequence[DiskDevice]) -> list[str]:
    """Return what the manager that lends the monitor calls these disks.

    :raise UnsupportedError: it knows none of that.
    """
    known: Mapping[str, str] = await vm.monitor.through(lambda lender: lender.targets())
    by_id = {device: name for name, device in known.items()}
    for device in devices:
        if device.id not in by_id:
            raise UnsupportedError(
                f"libvirt does not know the disk {printable(device.name)}: somebody else added it",
                standing=UNTOUCHED,
                remedy="--unmanaged (unmanaged=True) does it all the same",
            )
    return [by_id[str(device.id)] for device in devices]


async def check_manager_knows(vm: Connection) -> None:
    """See that a manager that lends its monitor knows where the guest of each disk writes.

    Its daemon may have been ended between QEMU's doing and its own note of that.

    :raise GraphError: it does not; what it takes for the image, and what to do.
    """
    if not vm.monitor.is_lent:
        return
    graph = await vm.graph()
    known = await vm.monitor.through(lambda lender: lender.targets())
    now, later = await vm.monitor.through(lambda lender: lender.files())
    places = OpenFiles(vm.monitor.peer_pid)
    for name, device_id in known.items():
        device = next((one for one in graph.disks() if one.id == device_id), None)
        storage = None if device is None else storage_of(device.chain.active)
        place = None if storage is None else places.place(storage)
        if not isinstance(place, Place):
            continue  # no file of this host's
        for said in (now, later):
            file = "" if said is None else said.get(name, "")
            if file and not places.leads(file, place.file):
                raise _disagrees(name, file, place.path)


class _QEMU:
    """QEMU itself."""

    def __init__(self, vm: Connection) -> None:
        self._vm = vm

    def record(self, said: Snapshot, items: Sequence[Item]) -> Snapshot:
        return said

    async def check(self, items: Sequence[Item], fmt: str) -> None:
        for item in items:
            await by_qemu_img(self._vm, item.plan.key_secret, local=item.local)  # or refuse

    async def make(self, change: Change[Record], item: Item, fmt: str) -> None:
        await make_overlay(self._vm, change, item, fmt, local=item.local)

    async def prove(self, change: Change[Record], items: list[Item]) -> None:
        await prove(self._vm, change, items)

    async def take(self, items: list[Item]) -> None:
        await take(self._vm, items)

    async def agree(self, change: Change[Record], items: list[Item], graph: BlockGraph) -> None:
        pass

    def nodes(self, item: Item) -> tuple[str, ...]:
        return item.node, item.storage

    def node(self, item: Item, chain: Chain) -> str:
        return item.node


class _Lender:
    """The manager that lends the monitor."""

    def __init__(self, vm: Connection) -> None:
        self._vm = vm

    def record(self, said: Snapshot, items: Sequence[Item]) -> Snapshot:
        actives = [item.plan.active for item in items]
        overlays = tuple(
            (item.file, active.node.name, storage_of(active).filename, item.backing_name)
            for item, active in zip(items, actives, strict=True)
        )
        return said.to(ManagersSnapshot, overlays=overlays)

    async def check(self, items: Sequence[Item], fmt: str) -> None:
        if fmt != "qcow2":
            raise UnsupportedError(
                f"libvirt is not asked to go on in an overlay of format {fmt}",
                standing=UNTOUCHED,
                remedy="make it qcow2",
            )
        for item in items:
            what = ""
            if item.plan.key_secret is not None:
                what = "is encrypted, and libvirt would have to be told the key of its overlay"
            elif not item.local:
                what = "is in a file system that only its VM sees, so that no overlay is made here"
            if what:
                raise UnsupportedError(
                    f"{item.plan.active.describe()} {what}",
                    standing=UNTOUCHED,
                    remedy="virsh snapshot-create DOMAIN SNAPSHOT.xml --disk-only --atomic, "
                    "with the overlay in that",
                )
            await by_qemu_img(self._vm, None, local=True)
        await manager_names(self._vm, [item.plan.device for item in items])

    async def make(self, change: Change[Record], item: Item, fmt: str) -> None:
        await make_header(self._vm, change, item, fmt)

    async def prove(self, change: Change[Record], items: list[Item]) -> None:
        graph = await self._vm.graph()
        files = OpenFiles(self._vm.monitor.peer_pid)
        places = files.places(graph.nodes.values())
        for item in items:
            check_name(files, places, item.backing_name, item.file, item.plan.active)
            assert item.directory is not None  # it was made here
            if not item.directory.holds(Path(item.file).name, _made(change, item)):
                raise Error(f"somebody put another file at {printable(item.file)} meanwhile")

    async def take(self, items: list[Item]) -> None:
        names = await manager_names(self._vm, [item.plan.device for item in items])
        overlays = {name: item.file for name, item in zip(names, items, strict=True)}
        await self._vm.monitor.through(lambda lender: lender.snapshot(overlays))

    async def agree(self, change: Change[Record], items: list[Item], graph: BlockGraph) -> None:
        assert change.journal is not None  # begin() wrote it
        places = OpenFiles(self._vm.monitor.peer_pid).places(graph.nodes.values())
        now, later = await self._vm.monitor.through(lambda lender: lender.files())
        names = await manager_names(self._vm, [item.plan.device for item in items])
        for name, item in zip(names, items, strict=True):
            chain = graph.device(item.plan.device.qom_path).chain
            node = storage_of(chain.active)
            place = places.get(node.name) if node is not None else None
            check_made(place, item.file, change.journal.made()[item.file])
            for said in (now, later):
                if said is not None and said.get(name) != item.file:
                    raise _disagrees(name, said.get(name, ""), item.file)
        for item in items:
            self._check_below(graph, item)

    def _check_below(self, graph: BlockGraph, item: Item) -> None:
        """See that an overlay lies on the image that it was made for.

        libvirt puts it on the active layer, whichever that is by then; its header has been made to
        name that (`qmpblock.changes.between`).

        :raise GraphError: it is another's.
        """
        over, under = graph.device(item.plan.device.qom_path).chain.layers[:2]
        if under.node.name == item.plan.active.node.name:
            return
        name, file = item.plan.device.name, printable(under.file)
        error = GraphError(
            f"somebody else has taken a snapshot of {name} in the last moment: the guest goes on "
            f"in {printable(item.file)}, over {file}",
            standing="nothing is lost: its header names that image",
            remedy="look at the chain: qmpblock disks ADDRESS",
        )
        if over.node.backing_filename != under.file:
            error.standing = "nothing is lost while this VM runs; started again, it would be "
            error.standing += f"without what was written to {file}"
            error.remedy = "bring the guest back to that before the VM ends: "
            error.remedy += f"qmpblock commit ADDRESS {name} --base @1"
        raise error

    def nodes(self, item: Item) -> tuple[str, ...]:
        return ()

    def node(self, item: Item, chain: Chain) -> str:
        return chain.active.node.name


def _made(change: Change[Record], item: Item) -> FileId:
    assert change.journal is not None  # begin() wrote it
    return FileId(*change.journal.made()[item.file])


def _disagrees(name: str, said: str, file: str) -> GraphError:
    return GraphError(
        f"the guest goes on in {printable(file)}, but libvirt takes {printable(said) or 'nothing'} "
        f"for the image of {name}: its daemon was ended in the middle, say",
        standing="nothing is lost while this VM runs; started again, it would be from that image",
        remedy=f"bring the guest back to it before the VM ends: qmpblock commit ADDRESS {name} "
        "--base @1 --unmanaged",
    )
