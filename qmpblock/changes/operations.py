"""What each operation says of itself: one class each, and the reading of what was written. Pure.

A new operation is a new class here and a row of `_KINDS`: what its fields are, when it took effect,
what is to be given back, which image holds the data if QEMU dies. Undoing it, carrying it on, its
journal and its locks are the same for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from qmpblock.changes.between import Made, name_below
from qmpblock.changes.copies import Copy, ManagersMove, Migration, Move
from qmpblock.changes.homing import FrozenCopy, ManagersStaging, Pivoting, StagedCommit
from qmpblock.changes.record import Link, Record, lies_on_something, pivoted, without_bitmaps
from qmpblock.changes.settings import check_settings, discard_and_zeroes_of
from qmpblock.changes.step import Step
from qmpblock.changes.verdict import ImageVerdict
from qmpblock.errors import printable
from qmpblock.graph.layeruse import check_readers
from qmpblock.graph.model import BlockGraph, JobInfo
from qmpblock.names import fleecing_nodes, is_ours, paused_node
from qmpblock.versioned import UnreadableError, read

__all__ = [
    "ActiveCommit",
    "Commit",
    "FrozenCopy",
    "ManagersCommit",
    "ManagersMove",
    "ManagersPivot",
    "ManagersSnapshot",
    "ManagersStaging",
    "PointInTime",
    "Snapshot",
    "StagedCommit",
    "Stream",
    "ThinAllocation",
    "read_record",
]


@dataclass(frozen=True)
class Snapshot(Record):
    """Overlays over the active layers of one or several disks: one transaction."""

    operation: ClassVar[str] = "snapshot"
    needed: ClassVar[tuple[str, ...]] = ("images", "files")

    def took_effect(self, graph: BlockGraph) -> bool:
        """Tell by any overlay: all lie on their images, or none does."""
        return any(node in graph.nodes and lies_on_something(graph, node) for node in self.nodes)

    def verdict(
        self, entries: Iterable[Mapping[str, object]], empty: Mapping[str, bool]
    ) -> ImageVerdict:
        """Name the overlays, once one of them may hold anything."""
        if any(not nothing for nothing in empty.values()):
            # An overlay shows what lies below where it holds nothing, so that the whole set
            # is right, also for a disk to which the guest had not written yet.
            return ImageVerdict(self.files, (), (), "the guest had begun to write to an overlay")
        return ImageVerdict(
            self.active_files,
            (),
            tuple(empty),
            "nothing was written to an overlay: the images hold it all",
        )


@dataclass(frozen=True)
class ManagersSnapshot(Snapshot):
    """The same by the manager that owns the chain: the nodes are its, and it knows of them.

    Where it has the guest go on is its to say, also at the next start: once it was asked, an
    overlay stays where it is.

    :ivar overlays: what is needed to see that one does not lie on what its header names.
    """

    operation: ClassVar[str] = "snapshot by its manager"

    overlays: tuple[Made, ...] = ()

    def took_effect(self, graph: BlockGraph) -> bool:
        """Tell by any overlay: all lie on their images, or none does."""
        made = {name for name, node in graph.nodes.items() if node.filename in self.files}
        return any(
            node.child("file") in made and lies_on_something(graph, name)
            for name, node in graph.nodes.items()
        )

    def gives_back(self, graph: BlockGraph, *, done: bool | None) -> Iterable[Step]:
        """Have their headers name what the manager has put them on."""
        return name_below(graph, self.overlays)

    def verdict(
        self, entries: Iterable[Mapping[str, object]], empty: Mapping[str, bool]
    ) -> ImageVerdict:
        """Leave it to the manager, which may start the VM from overlays that hold nothing yet."""
        said = super().verdict(entries, empty)
        why = f"{said.why}; the manager starts it from what it knows (virsh domblklist DOMAIN)"
        if said.unused:
            left = ", ".join(printable(file) for file in said.unused)
            why += f", and what that does not name of {left} can be removed"
        return ImageVerdict(said.start, (), (), why)


@dataclass(frozen=True)
class _Shortening(Record):
    """A job of QEMU's that copies from layers which then leave the chain.

    :ivar leaving: the nodes that leave the chain, each with its file name.
    """

    #: What QEMU calls its job.
    job_type: ClassVar[str]

    top: str = ""
    base: str = ""
    top_file: str = ""
    base_file: str = ""
    leaving: tuple[tuple[str, str], ...] = ()

    def check_readers(self, graph: BlockGraph) -> None:
        """Look once more, for somebody may have come since; `qmpblock.chains.plan` looks before."""
        for device in graph.devices:
            if device.qom_path in self.devices:
                check_readers(graph, device, self.job_type, self.top, self.base)


@dataclass(frozen=True)
class _Relinking(_Shortening):
    """One at whose end a layer that stays gets another backing image.

    :ivar flush: the node that must be flushed before the job is finalized, or empty.
    :ivar keeper: the node whose backing link will change.
    :ivar backing_name: that `keeper` will record for `base`, or empty.
    """

    needs_journal: ClassVar[bool] = False

    flush: str = ""
    keeper: str = ""
    backing_name: str = ""

    @property
    def link(self) -> Link:
        """The layer that stays, on its new backing image."""
        return Link(self.keeper, self.base, self.backing_name)

    def took_effect(self, graph: BlockGraph) -> bool | None:
        """Tell by what the layer that stays lies on."""
        if self.keeper not in graph.nodes:
            return None
        return (_below(graph, self.keeper) or "") == self.base


@dataclass(frozen=True)
class Stream(_Relinking):
    """What lies between `top` and `base` is copied into `top`.

    :ivar merges: dirty bitmaps to be taken over before the job is finalized:
        (target node, source node, name).
    """

    operation: ClassVar[str] = "stream"
    job_type: ClassVar[str] = "stream"

    merges: tuple[tuple[str, str, str], ...] = ()

    def verdict(
        self, entries: Iterable[Mapping[str, object]], empty: Mapping[str, bool]
    ) -> ImageVerdict:
        """Change nothing: no link is dropped before what came over it is on stable storage."""
        return ImageVerdict(
            self.active_files,
            (),
            (),
            "a stream changes no content: every link in the chain is as the headers say, and whole",
        )


@dataclass(frozen=True)
class _Committing(_Shortening):
    """What `top` and the layers above `base` hold is copied into `base`.

    :ivar bitmaps: dirty bitmaps that it adds to nodes that were there: (node, name).
    :ivar promotions: those of them that are to become persistent once their node is writable:
        (node, name of the transient one, name, granularity).
    """

    operation: ClassVar[str] = "commit"
    job_type: ClassVar[str] = "commit"

    bitmaps: tuple[tuple[str, str], ...] = ()
    promotions: tuple[tuple[str, str, str, int], ...] = ()

    def gives_back(self, graph: BlockGraph, *, done: bool | None) -> Iterable[Step]:
        """Take away dirty bitmaps that are not needed."""
        helpers = [(node, helper) for node, helper, _, _ in self.promotions]
        yield from without_bitmaps(graph, self.bitmaps if done is False else helpers)

    def verdict(
        self, entries: Iterable[Mapping[str, object]], empty: Mapping[str, bool]
    ) -> ImageVerdict:
        """Change nothing: the base alone is of no point in time."""
        why = (
            "the commit was not complete: the overlay holds the newest data. The base has got "
            "a part of it and shows no point in time by itself"
        )
        return ImageVerdict(self.active_files, (), (), why)


@dataclass(frozen=True)
class Commit(_Committing, _Relinking):
    """A commit of layers below the active one."""


@dataclass(frozen=True)
class ActiveCommit(Pivoting, _Committing):
    """A commit of the active layer: the guest moves on to the base.

    :ivar base_opened: the options that open the base as QEMU had it (`qmpblock.graph.opened`), as
        text; empty where its name and format suffice, or an older version wrote this.
    :ivar throttle: the guest's I/O limits, as they were, where it lowers them; empty if not.
        Its `group` is in `throttle_group`.
    :ivar detect_zeroes: that the base is to have at the end, where it has another one; empty if
        not. Likewise `discard`.
    """

    needed: ClassVar[tuple[str, ...]] = ("images", "top_file", "base_file")

    base_opened: str = ""
    throttle: tuple[tuple[str, int], ...] = ()
    throttle_group: str = ""
    detect_zeroes: str = ""
    discard: str = ""

    @property
    def home(self) -> str:
        """The image that is active before."""
        return self.top_file

    @property
    def link(self) -> Link:
        """The base, from which the VM is to be started."""
        return Link("", self.base, "")

    def gives_back(self, graph: BlockGraph, *, done: bool | None) -> Iterable[Step]:
        """Have the base be what the guest's disk was, and the guest as fast as it was."""
        if done:
            yield from self._settings(graph)
        if self.throttle:
            yield Step(
                "restore-limits",
                self.devices[0],
                "the guest was slowed down for the pivot",
                (self.throttle, self.throttle_group),
            )
        yield from super().gives_back(graph, done=done)

    def _settings(self, graph: BlockGraph) -> Iterable[Step]:
        why = "the guest's disk had it before the pivot"
        settings = self.discard, self.detect_zeroes
        yield from discard_and_zeroes_of(graph, self.base, *settings, why)

    def verdict(
        self, entries: Iterable[Mapping[str, object]], empty: Mapping[str, bool]
    ) -> ImageVerdict:
        """Name the base, once it was declared the image to trust."""
        if not pivoted(entries):
            left = super().verdict(entries, empty)
            return ImageVerdict(left.start, left.stale, left.unused, left.why, uncertain=True)
        return ImageVerdict(
            (self.base_file,),
            (self.top_file,),
            (),
            "the commit was complete and the guest had moved on to the base: it may hold newer "
            "data, and the overlay is stale",
            opened=self.base_opened,
        )

    def check(self) -> None:
        """Look at what goes into a command line, too."""
        super().check()
        check_settings(self.detect_zeroes, self.discard, self.base_opened)


@dataclass(frozen=True)
class ManagersCommit(Commit):
    """A commit of layers below the active one, by the manager that owns the chain.

    Its job is ours, which copies first, and never comes to its end (`qmpblock.chains.managed`).
    """

    operation: ClassVar[str] = "commit by its manager"


@dataclass(frozen=True)
class ManagersPivot(Pivoting, _Committing):
    """A commit of the active layer by the manager: the guest moves on to the base.

    While the manager takes note the VM is paused, so that both images hold the same: whatever dies
    then, the VM can be started from either.

    :ivar known_as: what the manager calls the disk.
    :ivar detect_zeroes: as of an `ActiveCommit`; likewise `discard`.
    """

    operation: ClassVar[str] = "commit by its manager"
    needed: ClassVar[tuple[str, ...]] = ("images", "top_file", "base_file")
    needs_journal: ClassVar[bool] = False

    known_as: str = ""
    detect_zeroes: str = ""
    discard: str = ""

    def of_manager(self, graph: BlockGraph) -> tuple[Step, ...]:
        """Have it give its job up; or say where the guest is, before that goes on."""
        works = [
            job
            for device in graph.disks()
            if device.qom_path in self.devices
            for job in device.jobs
            if _is_managers(job)
        ]
        if works:
            why = "the manager began it for us; the guest has not moved"
            return (Step("give-up", self.known_as, why),)
        # Whose manager has noted that the guest moved on, of that it has closed the top.
        moved = self.took_effect(graph) and self.top in graph.nodes
        if moved or paused_node(self.run) in graph.nodes:
            why = "the manager and QEMU are to name the same image, before the guest goes on"
            return (Step("agree", self.known_as, why),)
        return ()

    def check_readers(self, graph: BlockGraph) -> None:
        """Look whether somebody reads what changes besides the manager's own job."""
        others = tuple(job for job in graph.jobs if not _is_managers(job))
        super().check_readers(replace(graph, jobs=others))

    def gives_back(self, graph: BlockGraph, *, done: bool | None) -> Iterable[Step]:
        """Have the base be what the guest's disk was."""
        if done:
            why = "the guest's disk had it before the pivot"
            yield from discard_and_zeroes_of(
                graph, self.base, self.discard, self.detect_zeroes, why
            )

    def verdict(
        self, entries: Iterable[Mapping[str, object]], empty: Mapping[str, bool]
    ) -> ImageVerdict:
        """Name the base once the manager knew that the guest is there: until then either is right.

        The guest wrote nothing between.
        """
        how = "; the manager starts the VM from what it knows (virsh domblklist DOMAIN)"
        if pivoted(entries):
            why = f"the commit was complete, and its manager knew{how}"
            return ImageVerdict((self.base_file,), (self.top_file,), (), why)
        return ImageVerdict(
            self.active_files, (), (), f"the guest had not gone on in the base by then{how}"
        )

    def check(self) -> None:
        """Look at what goes into a command line, too."""
        super().check()
        check_settings(self.detect_zeroes, self.discard, "")


@dataclass(frozen=True)
class ThinAllocation(Record):
    """What lies below a range comes up; nothing that it makes outlives QEMU."""

    operation: ClassVar[str] = "allocate"
    needed: ClassVar[tuple[str, ...]] = ("images", "pivot")  # it has no journal


class _Fleecing(Record):
    """Disks are seen as they were at one instant (`qmpblock.copying.fleecing`).

    Its nodes are, for each disk, those of `fleecing_nodes`; its files what the filters keep.
    Nothing of that holds what the guest wrote.
    """

    def gives_back(self, graph: BlockGraph, *, done: bool | None) -> Iterable[Step]:
        """Take each filter out of the guest's way, and before it what is seen through it."""
        for export, node in graph.exports.items():
            if node in self.nodes and is_ours(export):
                yield Step("end-export", export, "it shows the point in time, which ends")
        for number in range(len(self.devices)):
            view, filter_, _ = fleecing_nodes(self.run, number)
            if view in graph.nodes:
                yield Step("delete-node", view, "it shows the point in time, which ends")
            if filter_ in graph.nodes and set(graph.users(filter_)) - {f"node {view}"}:
                yield Step("take-out", filter_, "the guest is to go on without it")

    def may_hold_writes(self, graph: BlockGraph, node: str, *, stale: bool | None) -> bool:
        """Never: the guest's writes go through the filters, and only what was there is kept."""
        return False


@dataclass(frozen=True)
class PointInTime(_Fleecing):
    """Somebody reads disks as they were, while the guest goes on.

    :ivar wires: see `Record.wires`.
    """

    operation: ClassVar[str] = "point-in-time"
    needed: ClassVar[tuple[str, ...]] = ("images", "files")

    wires: tuple[tuple[str, str], ...] = ()

    def verdict(
        self, entries: Iterable[Mapping[str, object]], empty: Mapping[str, bool]
    ) -> ImageVerdict:
        """Name the images: they hold all that the guest wrote."""
        why = "the guest's disks were read as they had been, and not changed"
        return ImageVerdict(self.active_files, (), tuple(empty), why)


#: By what the record says: the operation, and whether its job pivots.
_KINDS: Mapping[tuple[str, bool], type[Record]] = {
    ("snapshot", False): Snapshot,
    ("snapshot by its manager", False): ManagersSnapshot,
    ("stream", False): Stream,
    ("commit", False): Commit,
    ("commit", True): ActiveCommit,
    ("commit by its manager", False): ManagersCommit,
    ("commit by its manager", True): ManagersPivot,
    ("allocate", False): ThinAllocation,
    ("allocate", True): StagedCommit,
    ("allocate by its manager", True): ManagersStaging,
    ("point-in-time", False): PointInTime,
    ("copy", False): Copy,
    ("copy", True): FrozenCopy,
    ("move", False): Move,
    ("copy by its manager", False): ManagersMove,
    ("migrate", False): Migration,
}
#: What the record of any of them may say. Older versions wrote all of it, most of it empty.
_KNOWN = {one.name for kind in _KINDS.values() for one in fields(kind)} - {"more"}


def read_record(data: Any, run: str | None = None) -> Record:
    """Read a record that another version may have written, or somebody forged.

    :param run: whose it must be; None: of any.
    :raise UnreadableError: it is no record, or not one that this version understands.
    """
    if not isinstance(data, Mapping):
        raise UnreadableError("a Record is no JSON object")
    said = {name: data[name] for name in data if name not in ("operation", "pivot")}
    for name, kind in (("operation", str), ("pivot", bool)):
        if name == "operation" and name not in data:
            raise UnreadableError("its field operation is absent")
        if type(data.get(name, False if kind is bool else "")) is not kind:
            raise UnreadableError(f"its field {name} is of another type")
    operation, pivots = data["operation"], data.get("pivot", False)
    if not any(operation == known for known, _ in _KINDS):
        raise UnreadableError(f"its operation is {printable(operation, 40)!r}")
    found = _KINDS.get((operation, pivots))
    if found is None:
        raise UnreadableError(f"a {operation} does not pivot")
    its = {one.name for one in fields(found)}
    # What is empty, and of another operation, says nothing.
    record = read(found, {name: said[name] for name in said if name in its or _says(name, said)})
    if run not in (None, record.run):
        raise UnreadableError("its run is none")
    record.check()
    return record


def _says(name: str, said: Mapping[str, Any]) -> bool:
    return name not in _KNOWN or said[name] not in ("", [], ())


def _is_managers(job: JobInfo) -> bool:
    """Whether a job is what a manager began for us: nobody else's is on the disk by then."""
    return job.type == "commit" and not job.ours


def _below(graph: BlockGraph, node: str) -> str | None:
    """Return the node that an image lies on, filters left out."""
    below = graph.nodes[node].child("backing")
    while below is not None and graph.nodes[below].is_filter:
        below = graph.nodes[below].child("file", "backing", "image")
    return below
