"""Record: what every change says of itself, for whoever undoes it or carries it on.

It is kept in the data of the change's locks and in its journal (`qmpblock.changes.journal`), and
read back by `qmpblock.changes.operations.read_record`. Each operation is a class of its own there:
what it alone has are its fields, and what only it can answer are its methods. The engine that
undoes and carries on (`qmpblock.changes.unfinished`) asks, and knows no operation. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from qmpblock.changes.step import Choice, Step
from qmpblock.changes.verdict import ImageVerdict
from qmpblock.errors import printable
from qmpblock.graph.model import BlockGraph, JobInfo
from qmpblock.names import LockKind, is_of_run, is_pivot, is_run, lock_kind
from qmpblock.qemu.jobstate import ACTIVE
from qmpblock.versioned import UnreadableError, plain

__all__ = [
    "ASKED",
    "PIVOTED",
    "WORTH",
    "Link",
    "Passage",
    "Record",
    "VMIdentity",
    "asked",
    "is_in",
    "lies_on_something",
    "pivoted",
    "without_bitmaps",
    "worth_keeping",
]

RecordT = TypeVar("RecordT", bound="Record")
#: The key of the entry that says that a manager may have the guest go over from now on.
ASKED = "asked"
#: The key of the entry that says whether the base is the image to trust now.
PIVOTED = "pivoted"
#: That of the entry that says whether a file that was made is worth to be gone on from.
WORTH = "worth"


@dataclass(frozen=True)
class VMIdentity:
    """Which QEMU process it was.

    :ivar uuid: of the VM; zeros where it has none.
    :ivar pid: 0 where it is unknown (a TCP monitor); with `start`, its start time in clock
        ticks since boot, and `boot`, the boot's id, it names one process for ever.
    :ivar monitor: the address that the controller came by.
    """

    name: str
    uuid: str
    pid: int
    start: int
    boot: str
    monitor: str
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Link:
    """What the VM depends on once a change is done.

    :ivar keeper: the node whose backing link changes; empty where the VM starts from `base`.
    :ivar name: by which `keeper` records the node `base`, or empty.
    """

    keeper: str
    base: str
    name: str


@dataclass(frozen=True)
class Passage:
    """One disk whose manager has the guest go over from one image to another.

    :ivar device: its QOM path.
    :ivar nodes: of both images, as they are before; the latter's is empty where the manager makes
        it: by its file it is known then.
    :ivar files: of both images, as the manager calls them.
    """

    device: str
    nodes: tuple[str, str]
    files: tuple[str, str]

    def is_over(self, graph: BlockGraph) -> bool:
        """Whether the guest has gone over; to a snapshot of that image, say."""
        before, after = self.nodes
        layers = self._layers(graph)
        if before in layers:
            return False
        if after:
            return after in layers
        return any(is_in(graph, layer, self.files[1]) for layer in layers)

    def stays(self, graph: BlockGraph) -> bool:
        """Whether the guest is on the image that it was on before, or on a snapshot of that."""
        return self.nodes[0] in self._layers(graph)

    def _layers(self, graph: BlockGraph) -> tuple[str, ...]:
        disk = graph.disk_at(self.device)
        return () if disk is None else tuple(layer.node.name for layer in disk.chain.layers)


@dataclass(frozen=True)
class Record:
    """What one change intends: all that undoing it, or carrying it on, needs to know.

    :ivar run: in the names of all that it makes.
    :ivar devices: QOM paths of the disks; `names`: what people call them.
    :ivar locks: the ids of the locks that it holds.
    :ivar job: the id of its job, or empty; `helpers`: of those that only prepare.
    :ivar nodes: nodes that it adds, in the order in which they can be removed.
    :ivar files: image files that it makes.
    :ivar images: every image file of the disks, the active ones first.
    :ivar more: what another version wrote that this one does not know.
    """

    #: What the record and people call it.
    operation: ClassVar[str] = ""
    #: What it must say in a journal: a default there would have another image started than the
    #: newest one.
    needed: ClassVar[tuple[str, ...]] = ("images",)
    #: Whether its images are whole, and start from where they did, whoever dies without a journal.
    needs_journal: ClassVar[bool] = True

    run: str
    vm: VMIdentity
    devices: tuple[str, ...]
    names: tuple[str, ...]
    locks: tuple[str, ...]
    job: str = ""
    helpers: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)

    # What a class may have as a field, and has none of otherwise.

    @property
    def pivot(self) -> bool:
        """Whether its job ends in a pivot."""
        return False

    @property
    def top(self) -> str:
        """The node that is streamed into, or the upper end of a commit; `base` the lower."""
        return ""

    @property
    def base(self) -> str:
        """The node that stays below, or that is committed into."""
        return ""

    @property
    def top_file(self) -> str:
        """The image file of `top`."""
        return ""

    @property
    def base_file(self) -> str:
        """The image file of `base`."""
        return ""

    @property
    def flush(self) -> str:
        """The node that must be flushed before the job is finalized."""
        return ""

    @property
    def leaving(self) -> tuple[tuple[str, str], ...]:
        """The nodes that leave the chain, each with its file name."""
        return ()

    @property
    def bitmaps(self) -> tuple[tuple[str, str], ...]:
        """Dirty bitmaps that it adds to nodes that were there: (node, name)."""
        return ()

    @property
    def promotions(self) -> tuple[tuple[str, str, str, int], ...]:
        """Those of them that are to become persistent once their node is writable.

        (node, name of the transient one, name, granularity)
        """
        return ()

    @property
    def merges(self) -> tuple[tuple[str, str, str], ...]:
        """Dirty bitmaps to be taken over before the job is finalized.

        (target node, source node, name)
        """
        return ()

    @property
    def throttle(self) -> tuple[tuple[str, int], ...]:
        """The guest's I/O limits, as they were, where it lowers them."""
        return ()

    @property
    def throttle_group(self) -> str:
        """The group of these limits."""
        return ""

    @property
    def wires(self) -> tuple[tuple[str, str], ...]:
        """Nodes of its `nodes` that reach a server by a relay of ours, each with its socket."""
        return ()

    # What a class answers for itself.

    @property
    def home(self) -> str:
        """The image beside which its journal is kept too; empty where it pivots nothing."""
        return ""

    @property
    def link(self) -> Link | None:
        """What the VM depends on, once it is done, that it did not before; None if nothing."""
        return None

    def to(self, kind: type[RecordT], **otherwise: Any) -> RecordT:
        """Return the record of another kind of change that says the same, as far as it can.

        :param otherwise: what it says otherwise, or besides.
        """
        its = {one.name: getattr(self, one.name) for one in fields(self)}
        known = {one.name for one in fields(kind)}
        return kind(**{name: said for name, said in its.items() if name in known} | otherwise)

    def seen_in(self, graph: BlockGraph) -> Record:
        """Return it with the names that somebody else has given meanwhile, as far as they show."""
        return self

    def took_effect(self, graph: BlockGraph) -> bool | None:
        """Whether it is done, as far as the guest and the chain go; None: cannot tell."""
        return None

    def passage(self, name: str) -> Passage:
        """Return how a disk goes over that the manager calls so."""
        return Passage(self.devices[0], (self.top, self.base), (self.top_file, self.base_file))

    def may_start(
        self, graph: BlockGraph, entries: Iterable[Mapping[str, object]]
    ) -> Collection[str]:
        """Return files that it made from which a manager may start the VM: they stay.

        They may hold the guest's newest data, though nothing uses them.

        :param entries: of the journal.
        """
        return ()

    def of_manager(self, graph: BlockGraph) -> tuple[Step, ...]:
        """Return what the manager that lends the monitor is to be asked, before anything else."""
        return ()

    def way_home(self, graph: BlockGraph, *, stale: bool | None) -> tuple[Step, ...]:
        """Return what brings the guest back, where an overlay of ours holds its newest data.

        :param stale: whether the journal says that it is stale; None: there is no journal.
        """
        return ()

    def gives_back(self, graph: BlockGraph, *, done: bool | None) -> Iterable[Step]:
        """Yield what gives nodes and disks that stay what they had, or are to have.

        :param done: see `took_effect`.
        """
        return ()

    def may_hold_writes(self, graph: BlockGraph, node: str, *, stale: bool | None) -> bool:
        """Whether a node of ours has been written to by the guest, or could be.

        So an overlay that lies on an image, also if its disk was unplugged since.
        """
        return lies_on_something(graph, node)

    def check_readers(self, graph: BlockGraph) -> None:
        """Refuse to end its job under somebody who reads what changes.

        :raise InUseError: somebody does.
        """

    def verdict(
        self, entries: Iterable[Mapping[str, object]], empty: Mapping[str, bool]
    ) -> ImageVerdict:
        """Say which image to start from (F13), now that QEMU is gone.

        :param entries: of the journal.
        :param empty: for each image that the change made and that is there: whether it is
            certain that it holds nothing.
        """
        return ImageVerdict(self.active_files, (), (), "it changed no image")

    def of_job(
        self, job: JobInfo, choice: Choice, graph: BlockGraph, *, stale: bool | None
    ) -> Step:
        """Return what is to be done about a job of this change, which is not over.

        :param stale: see `way_home`.
        """
        if job.status == "concluded":
            verdict = "with success" if job.error is None else f"with {printable(job.error)!r}"
            return Step("dismiss", job.id, f"it has ended, {verdict}")
        if job.status == "pending" and self.pivot and job.id == self.job:
            return Step("pivot", job.id, "it holds the guest's I/O until it is finalized")
        if choice is Choice.UNDO and (job.status in ACTIVE or job.status == "pending"):
            return Step("cancel", job.id, f"it is {job.status}; nothing final has been done")
        if job.status in ACTIVE:
            return Step("follow", job.id, f"it is {job.status}, and is to be carried on")
        if job.status == "pending":
            return Step("finalize", job.id, "its data is flushed, then the chain changes")
        return Step("wait", job.id, f"it is {printable(job.status)}")

    def holding(self, graph: BlockGraph, *, stale: bool | None) -> Iterable[Step]:
        """Yield what is to be done about jobs that hold the guest's I/O, before anything else.

        :param stale: see `way_home`.
        """
        job = graph.job(self.job)
        if self.pivot and job is not None and job.status == "pending":
            yield self.of_job(job, Choice.UNDO, graph, stale=stale)

    # Of all alike.

    @property
    def active_files(self) -> tuple[str, ...]:
        """The image files of the active layers, as they were."""
        return self.images[: len(self.devices)]

    def active_nodes(self, graph: BlockGraph) -> set[str]:
        """Return the active layers of its disks."""
        return {
            device.chain.active.node.name
            for device in graph.devices
            if device.chain is not None and device.qom_path in self.devices
        }

    def as_json(self) -> dict[str, Any]:
        """Return what `qmpblock.changes.operations.read_record` reads."""
        said = {"run": self.run, "operation": self.operation, **plain(self)}
        return said | {"pivot": True} if self.pivot else said

    def check(self) -> None:
        """See that whatever it names that we would have made has our name in it.

        :raise UnreadableError: another version wrote it, or somebody forged it.
        """
        if not is_run(self.run):
            raise UnreadableError("its run is none")
        ours = [*self.nodes, *self.helpers, *([self.job] if self.job else [])]
        ours += [node for node, _ in self.wires]
        if not all(is_of_run(name, self.run) for name in ours):
            raise UnreadableError("it names jobs or nodes that are not of its run")
        if not all(lock_kind(name) is LockKind.DISK for name in self.locks):
            raise UnreadableError("it names locks that are none")
        if self.job and is_pivot(self.job) != self.pivot:
            raise UnreadableError("whether its job pivots is contradicted by the job's name")

    def check_journaled(self) -> None:
        """See that it says what is needed once QEMU is gone.

        :raise UnreadableError: it does not.
        """
        for name in self.needed:
            if not getattr(self, name):
                raise UnreadableError(f"its field {name} is absent or empty")

    def describe(self) -> str:
        """Say what it is, for people."""
        return f"{self.operation} of {', '.join(map(printable, self.names))} (run {self.run})"


def lies_on_something(graph: BlockGraph, node: str) -> bool:
    """Whether a node has a backing image."""
    return graph.nodes[node].child("backing") is not None


def is_in(graph: BlockGraph, node: str, file: str) -> bool:
    """Whether an image is in a file, by what QEMU opened it by."""
    nodes = graph.nodes
    opened = (node, nodes[node].child("file"))
    return any(name in nodes and nodes[name].filename == file for name in opened if name)


def asked(entries: Iterable[Mapping[str, Any]]) -> bool:
    """Whether these entries say that a manager may have the guest go over."""
    return any(ASKED in entry for entry in entries)


def pivoted(entries: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the last word of these entries is that the base is the image to trust."""
    words = [entry[PIVOTED] for entry in entries if PIVOTED in entry]
    return bool(words) and words[-1] is True


def worth_keeping(entries: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the files of which the last word of these entries is that another copy can go on."""
    words = {e["file"]: e[WORTH] for e in entries if WORTH in e and isinstance(e.get("file"), str)}
    return {file for file, word in words.items() if word is True}


def without_bitmaps(graph: BlockGraph, added: Iterable[tuple[str, str]]) -> list[Step]:
    """Return what removes dirty bitmaps that are there."""
    return [
        Step("delete-bitmap", f"{node}/{name}", "we added it, and it is not needed any more")
        for node, name in added
        if node in graph.nodes and any(one.name == name for one in graph.nodes[node].bitmaps)
    ]
