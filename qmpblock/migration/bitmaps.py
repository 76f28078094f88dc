"""Bitmaps: the dirty bitmaps of the guest's disks go along, each with its disk.

QEMU sends them itself (capability `dirty-bitmaps`, which the source needs alone), the last of it
when the guest stands and no mirror writes any more. What is mirrored marks nothing at the
destination: until the guest runs there they do not record (F33).

It names them by the source's nodes. Where the destination's are called otherwise, or where
there are some that are to stay, both are told which are which (`block-bitmap-mapping`); that QEMU
cannot be made to forget again, so afterwards it is told what means the same (F33).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qmpblock.errors import BusyError, Error, printable
from qmpblock.migration.job import MigratedBitmap
from qmpblock.migration.machine import WITH_BITMAPS
from qmpblock.names import export_name, is_of_run

if TYPE_CHECKING:
    from qmpblock.graph.model import DiskDevice
    from qmpblock.migration.look import Pair
    from qmpblock.qemu.connection import Connection

__all__ = ["Bitmaps", "put_back"]

_MAPPING = "block-bitmap-mapping"
#: What is the same at both ends once the guest has arrived.
_ALIKE = ("count", "granularity", "persistent", "recording")


class Bitmaps:
    """Those of one migration. `prepare`, `count`, `check`; `restore` in any case.

    :ivar moved: what `count` found.
    """

    def __init__(
        self, source: Connection, destination: Connection, run: str, pairs: Sequence[Pair]
    ) -> None:
        self.moved: tuple[MigratedBitmap, ...] = ()
        self._source = source
        self._destination = destination
        self._run = run
        self._pairs = pairs
        self._names: dict[str, tuple[str, ...]] = {}  # by the source's node
        self._counted: dict[tuple[str, str], dict[str, Any]] = {}
        self._told: dict[Connection, list[dict[str, Any]] | None] = {}  # what each had before

    async def prepare(self) -> None:
        """Say which go along, and where.

        They are those of now: somebody may have added some while the disks were copied.

        :raise BusyError: one is in use.
        :raise Error: one cannot go along.
        """
        graph = await self._source.graph()
        for pair in self._pairs:
            node = pair.source.chain.active.node.name
            stored = pair.destination.chain.active.format in WITH_BITMAPS
            for one in graph.nodes[node].bitmaps:
                named = f"the dirty bitmap {printable(one.name)} of {printable(pair.source.name)}"
                if one.busy:
                    raise BusyError(f"{named} is in use", remedy="wait for what uses it")
                if one.inconsistent or (one.persistent and not stored):
                    why = (
                        "inconsistent" if one.inconsistent else "persistent; its image stores none"
                    )
                    raise Error(f"{named}, which was added meanwhile, is {why}", remedy="remove it")
            self._names[node] = tuple(one.name for one in graph.nodes[node].bitmaps)
        every = {name for name, node in graph.nodes.items() if node.bitmaps}
        if every:
            await self._tell(every)

    @property
    def disks(self) -> tuple[DiskDevice, ...]:
        """The source's disks of which some go along."""
        sources = (pair.source for pair in self._pairs)
        return tuple(one for one in sources if self._names.get(one.chain.active.node.name))

    async def _tell(self, every: set[str]) -> None:
        """Say which are which, where QEMU would not find it by itself, or was told another thing.

        :param every: node of the source that has any.
        """
        here, there = [], []
        by_themselves = every == {node for node, names in self._names.items() if names}
        for number, pair in enumerate(self._pairs):
            node, other = (
                pair.source.chain.active.node.name,
                pair.destination.chain.active.node.name,
            )
            alias, names = export_name(self._run, number), self._names[node]
            here.append(_mapped(node, alias, names))
            there.append(_mapped(other, alias, names))
            if names and (_known_as(pair.source) != node or node != other):
                by_themselves = False
        had = {
            vm: (await vm.monitor.execute("query-migrate-parameters")).get(_MAPPING)
            for vm in (self._source, self._destination)
        }
        if not by_themselves or any(one is not None for one in had.values()):
            self._told = had
            for vm, mapping in zip(had, (here, there), strict=True):
                await vm.monitor.execute("migrate-set-parameters", {_MAPPING: mapping})

    async def count(self) -> None:
        """Note what each marks, now that the guest stands."""
        if not any(self._names.values()):
            return
        found = await _read(self._source)
        moved = []
        for pair in self._pairs:
            node = pair.source.chain.active.node.name
            there = pair.destination.chain.active.node.name
            for name in self._names[node]:
                one = found[node, name]
                self._counted[there, name] = one
                moved.append(
                    MigratedBitmap(pair.source.name, name, there, one["persistent"], one["count"])
                )
        self.moved = tuple(moved)

    async def check(self) -> None:
        """See that what has arrived is what was sent.

        :raise Error: it is not; the guest must not run there.
        """
        if not self._counted:
            return
        found = await _read(self._destination)
        for key, was in self._counted.items():
            node, name = map(printable, key)
            if key not in found:
                raise Error(f"the dirty bitmap {name} has not arrived at {node}")
            wrong = [part for part in _ALIKE if found[key].get(part) != was.get(part)]
            if wrong:
                said = "; ".join(
                    f"{part} {was.get(part)}, there {found[key].get(part)}" for part in wrong
                )
                raise Error(f"the dirty bitmap {name} has arrived at {node} as another: {said}")

    async def restore(self, vm: Connection) -> None:
        """Take back what a side was told. Idempotent."""
        if vm in self._told:
            await _set(vm, self._told[vm])
            del self._told[vm]


async def put_back(vm: Connection, run: str) -> None:
    """Have a VM know no aliases of a migration's any more, of whoever made that. Idempotent."""
    mapping = (await vm.monitor.execute("query-migrate-parameters")).get(_MAPPING, ())
    if any(is_of_run(one["alias"], run) for one in mapping):
        await _set(vm, None)


async def _set(vm: Connection, mapping: list[dict[str, Any]] | None) -> None:
    """Set the mapping: None cannot be, but one can that says what none means."""
    if mapping is None:
        mapping = [
            _mapped(device.chain.active.node.name, name, names)
            for device in (await vm.graph()).disks()
            if (name := _known_as(device))
            and (names := [one.name for one in device.chain.active.node.bitmaps])
        ]
    await vm.monitor.execute("migrate-set-parameters", {_MAPPING: mapping})


def _known_as(device: DiskDevice) -> str:
    """Return by what name QEMU sends a disk's bitmaps, told nothing; empty where by none."""
    name = device.drive or device.chain.active.node.name
    return "" if name.startswith("#") else name


def _mapped(node: str, alias: str, names: Iterable[str]) -> dict[str, Any]:
    bitmaps = [{"name": name, "alias": name} for name in names]
    return {"node-name": node, "alias": alias, "bitmaps": bitmaps}


async def _read(vm: Connection) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the named dirty bitmaps of a VM, by node and name."""
    nodes = await vm.monitor.execute("query-named-block-nodes", {"flat": True})
    return {
        (node["node-name"], one["name"]): one
        for node in nodes
        for one in node.get("dirty-bitmaps", ())
        if "name" in one  # those of jobs have none
    }
