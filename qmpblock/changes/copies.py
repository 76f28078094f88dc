"""What copies of disks say of themselves: see `qmpblock.changes.operations`. Pure.

A copy's jobs are among its `helpers`: whoever undoes it cancels them, and never carries one on. A
mirror that is pending holds the guest's I/O (K5), and cancelled then it leaves the guest where it
is; so nothing of a copy needs to survive, but for one thing: where several disks go over to their
copies, all do or none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from qmpblock.changes.record import (
    Passage,
    Record,
    asked,
    pivoted,
    without_bitmaps,
    worth_keeping,
)
from qmpblock.changes.settings import check_settings, discard_and_zeroes_of
from qmpblock.changes.step import Choice, Step
from qmpblock.changes.verdict import ImageVerdict
from qmpblock.errors import printable
from qmpblock.graph.model import BlockGraph, JobInfo
from qmpblock.names import is_of_run, paused_node
from qmpblock.versioned import UnreadableError

__all__ = ["Copy", "ManagersMove", "Migration", "Move"]


@dataclass(frozen=True)
class Copy(Record):
    """The content of disks goes into targets; the guest stays where it is.

    What is written is no image of the VM: a target on this host bears a name that says that it is
    not whole, until it is.

    :ivar wires: see `Record.wires`.
    :ivar noted: dirty bitmaps, as (node, name), of what the guest writes while targets catch up.
    """

    operation: ClassVar[str] = "copy"
    needed: ClassVar[tuple[str, ...]] = ("images", "pivot")  # it has no journal

    wires: tuple[tuple[str, str], ...] = ()
    noted: tuple[tuple[str, str], ...] = ()

    def check(self) -> None:
        """Look at what is removed from nodes that are not ours, too."""
        super().check()
        if not all(is_of_run(name, self.run) for _, name in self.noted):
            raise UnreadableError("it names dirty bitmaps that are not of its run")

    def gives_back(self, graph: BlockGraph, *, done: bool | None) -> Iterable[Step]:
        """Have the disks be without what took note of writes to them."""
        return without_bitmaps(graph, self.noted)

    def of_job(
        self, job: JobInfo, choice: Choice, graph: BlockGraph, *, stale: bool | None
    ) -> Step:
        """Never keep one that holds the guest's I/O."""
        if job.status == "pending":
            return Step("cancel", job.id, "it holds the guest's I/O; its target is not whole")
        return super().of_job(job, choice, graph, stale=stale)

    def holding(self, graph: BlockGraph, *, stale: bool | None) -> Iterable[Step]:
        """Let go of every disk."""
        for name in self.helpers:
            job = graph.job(name)
            if job is not None and job.status == "pending":
                yield self.of_job(job, Choice.UNDO, graph, stale=stale)

    def may_hold_writes(self, graph: BlockGraph, node: str, *, stale: bool | None) -> bool:
        """Say no: the guest never writes to a target."""
        return False


@dataclass(frozen=True)
class Migration(Copy):
    """The content of disks goes to the VM to which this one migrates, or they are shared with it.

    What is written there is worth nothing before the guest has gone over, and that it has, both VMs
    say (`qmpblock.migration`): here it is undone only while the images are this QEMU's.

    :ivar kept: of each disk that was mirrored, how its image at the destination was left, where the
        mirrors stay, paused, for another attempt; else empty. Who makes none undoes them as ever.
    """

    operation: ClassVar[str] = "migrate"

    kept: tuple[str, ...] = ()

    def describe(self) -> str:
        """Say what it is, for people."""
        return f"migration of a VM with {', '.join(map(printable, self.names))} (run {self.run})"


@dataclass(frozen=True)
class Move(Copy):
    """Disks go over to copies of them: the guest goes on there.

    :ivar sources: the nodes of the active layers; `targets`: of those that take their places.
    :ivar leaving: the nodes that leave the chains, each with its file name.
    :ivar settings: what targets are to have once the guest is there: (node, discard,
        detect-zeroes); empty where it has it.
    """

    operation: ClassVar[str] = "move"
    needed: ClassVar[tuple[str, ...]] = ("images", "files")

    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    leaving: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, str, str], ...] = ()

    def check(self) -> None:
        """Look at what goes into a command line, too."""
        super().check()
        for _, discard, zeroes in self.settings:
            check_settings(zeroes, discard, "")

    def gives_back(self, graph: BlockGraph, *, done: bool | None) -> Iterable[Step]:
        """Have the copies be what the guest's disks were, once it is there."""
        yield from super().gives_back(graph, done=done)
        why = "the guest's disk had it before it went over"
        for node, discard, zeroes in self.settings if done else ():
            yield from discard_and_zeroes_of(graph, node, discard, zeroes, why)

    @property
    def home(self) -> str:
        """The first image that is active before."""
        return self.images[0]

    @property
    def top_file(self) -> str:
        """The image that is active before, of the first disk."""
        return self.images[0]

    @property
    def base_file(self) -> str:
        """The image that is active afterwards, of the first disk."""
        return self.files[0]

    def took_effect(self, graph: BlockGraph) -> bool | None:
        """Tell by where the guest is: all disks go over, or none does."""
        active = self.active_nodes(graph)
        if active and active <= set(self.targets):
            return True
        return False if active and not active & set(self.targets) else None

    def of_job(
        self, job: JobInfo, choice: Choice, graph: BlockGraph, *, stale: bool | None
    ) -> Step:
        """Finish what has begun to go over, on any disk; else leave the guest where it is."""
        if job.status == "pending" and self._goes_over(graph, stale=stale):
            return Step("pivot", job.id, "it holds the guest's I/O, and disks have gone over")
        return super().of_job(job, choice, graph, stale=stale)

    def _goes_over(self, graph: BlockGraph, *, stale: bool | None) -> bool:
        return stale is True or bool(self.active_nodes(graph) & set(self.targets))

    def may_hold_writes(self, graph: BlockGraph, node: str, *, stale: bool | None) -> bool:
        """Tell by the journal, of a disk that was unplugged since it went over."""
        return stale is True and node in self.targets and self.took_effect(graph) is None

    def verdict(
        self, entries: Iterable[Mapping[str, object]], empty: Mapping[str, bool]
    ) -> ImageVerdict:
        """Name the copies, once they were declared the images to trust."""
        if not pivoted(entries):
            why = "the guest had not gone over to the copies, which are not whole"
            kept = tuple(file for file in empty if file in worth_keeping(entries))
            unused = tuple(file for file in empty if file not in kept)
            return ImageVerdict(self.active_files, (), unused, why, uncertain=True, kept=kept)
        why = "the copies were whole, and the guest had gone over to them: they may hold newer data"
        return ImageVerdict(self.files, self.active_files, (), why)

    def describe(self) -> str:
        """Say what it is, for people."""
        names = ", ".join(map(printable, self.names))
        return f"copy with pivot of {names} (run {self.run})"


@dataclass(frozen=True)
class ManagersMove(Record):
    """Disks go over to copies of them by the manager that owns their chains.

    Its jobs are the manager's. While it pivots, and takes note, the VM is paused, so that old image
    and copy hold the same: whatever dies then, the VM can be started from either.

    :ivar managed_as: what the manager calls the disks.
    :ivar sources: the nodes of the active layers; `source_files`: what the manager calls these.
    """

    operation: ClassVar[str] = "copy by its manager"
    needed: ClassVar[tuple[str, ...]] = ("images", "files", "managed_as", "source_files")

    managed_as: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    source_files: tuple[str, ...] = ()

    @property
    def _passages(self) -> dict[str, Passage]:
        every = zip(
            *(self.managed_as, self.devices, self.sources, self.source_files, self.files),
            strict=False,
        )
        return {
            name: Passage(device, (node, ""), (before, after))
            for name, device, node, before, after in every
        }

    def passage(self, name: str) -> Passage:
        """Return how a disk goes over that the manager calls so."""
        return self._passages[name]

    def took_effect(self, graph: BlockGraph) -> bool | None:
        """Tell by where the guest is, on all disks that there are."""
        there = {disk.qom_path for disk in graph.disks()}
        over = {one.is_over(graph) for one in self._passages.values() if one.device in there}
        return over.pop() if len(over) == 1 else None

    def of_manager(self, graph: BlockGraph) -> tuple[Step, ...]:
        """Have it give its jobs up; or say where the guest is, before that goes on."""
        passages = self._passages
        works = {
            disk.qom_path
            for disk in graph.disks()
            for job in disk.jobs
            if job.type == "mirror" and not job.ours
        }
        why = "the manager began it for us; the guest has not moved"
        given_up = [name for name, one in passages.items() if one.device in works]
        if given_up:
            return tuple(Step("give-up", name, why) for name in given_up)
        # Whose manager has noted that the guest moved on, of that it has closed the old image.
        moved = any(one.is_over(graph) and one.nodes[0] in graph.nodes for one in passages.values())
        if moved or paused_node(self.run) in graph.nodes:
            why = "the manager and QEMU are to name the same images, before the guest goes on"
            return (Step("agree", ", ".join(passages), why, tuple(passages)),)
        return ()

    def may_start(
        self, graph: BlockGraph, entries: Iterable[Mapping[str, object]]
    ) -> Collection[str]:
        """Keep a copy from when the manager was asked on, unless its disk is where it was."""
        if not asked(entries):
            return ()
        there = {disk.qom_path for disk in graph.disks()}
        return [
            one.files[1]
            for one in self._passages.values()
            if one.device not in there or not one.stays(graph)
        ]

    def verdict(
        self, entries: Iterable[Mapping[str, object]], empty: Mapping[str, bool]
    ) -> ImageVerdict:
        """Name the copies once the manager knew that the guest is there; else either is right.

        The guest wrote nothing between.
        """
        said = tuple(entries)
        how = "the manager starts the VM from what it knows (virsh domblklist DOMAIN)"
        if pivoted(said):
            why = f"the copies were whole, and their manager knew; {how}"
            return ImageVerdict(self.files, self.active_files, (), why)
        if asked(said):
            left = ", ".join(printable(file) for file in empty)
            why = f"copies and old images held the same; {how}, and what that does not name of "
            return ImageVerdict(self.active_files, (), (), f"{why}{left} can be removed")
        why = f"the guest had not gone over to the copies, which are not whole; {how}"
        return ImageVerdict(self.active_files, (), tuple(empty), why)

    def describe(self) -> str:
        """Say what it is, for people."""
        names = ", ".join(map(printable, self.names))
        return f"copy with pivot of {names} by its manager (run {self.run})"
