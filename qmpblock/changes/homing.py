"""What changes say of themselves at whose end the guest moves to the image below: an overlay goes.

Of two of them the overlay is ours, and there for a while only: it comes home, whatever fails. See
`qmpblock.changes.operations`. Pure.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from qmpblock.changes.between import name_below
from qmpblock.changes.record import Record, lies_on_something, pivoted, without_bitmaps
from qmpblock.changes.settings import check_settings, zeroes_of
from qmpblock.changes.step import Choice, Step
from qmpblock.changes.verdict import ImageVerdict
from qmpblock.errors import printable, shell_words
from qmpblock.graph.model import BlockGraph, JobInfo
from qmpblock.names import is_ours, paused_node
from qmpblock.qemu.jobstate import ACTIVE

__all__ = ["FrozenCopy", "ManagersStaging", "Pivoting", "StagedCommit"]


class Pivoting(Record):
    """Its job ends in a pivot: the guest moves from `top` on to `base`."""

    @property
    def pivot(self) -> bool:
        """It does."""
        return True

    def took_effect(self, graph: BlockGraph) -> bool | None:
        """Tell by where the guest is; of a disk that was unplugged meanwhile it cannot be told."""
        for device in graph.devices:
            if device.chain is not None and device.qom_path in self.devices:
                layers = [layer.node.name for layer in device.chain.layers]
                return self.top not in layers and self.base in layers
        return None


def _are_layers(graph: BlockGraph, *nodes: str) -> bool:
    """Whether a disk of the VM has one of them as a layer."""
    return any(
        layer.node.name in nodes
        for device in graph.devices
        if device.chain is not None
        for layer in device.chain.layers
    )


@dataclass(frozen=True)
class StagedCommit(Pivoting):
    """Host space for ranges of an image that is frozen below an overlay for a moment.

    :ivar top: the overlay of ours; `base`: the guest's image.
    :ivar base_format: its format.
    :ivar base_opened: as of an `ActiveCommit`.
    :ivar written: the files that bringing the overlay home writes to, each with its inode; none
        where an older version wrote this.
    :ivar detect_zeroes: that the base is to have at the end, and is off for a while; empty if not.
    """

    operation: ClassVar[str] = "allocate"
    needed: ClassVar[tuple[str, ...]] = (
        *("images", "top_file", "base_file", "pivot", "files", "base_format"),
    )
    #: Why nodes of ours besides the overlay go before it comes home.
    served: ClassVar[str] = "it served to bring zeros there, and holds none"

    top: str = ""
    base: str = ""
    top_file: str = ""
    base_file: str = ""
    base_format: str = ""
    base_opened: str = ""
    written: tuple[tuple[str, int], ...] = ()
    detect_zeroes: str = ""

    @property
    def home(self) -> str:
        """The image, not the overlay of ours, which goes."""
        return self.base_file

    def of_job(
        self, job: JobInfo, choice: Choice, graph: BlockGraph, *, stale: bool | None
    ) -> Step:
        """Never give its job up: all that it does is to bring the overlay home."""
        if job.id == self.job and job.status in ACTIVE:
            return Step("bring-home", self.top, "it holds what the guest wrote last")
        return super().of_job(job, choice, graph, stale=stale)

    def way_home(self, graph: BlockGraph, *, stale: bool | None) -> tuple[Step, ...]:
        """Bring it home without the zeros that were to get there first: there may be no room.

        Where its disk was unplugged, or has another medium, only the journal tells whether the
        overlay holds the newest data; without one it is left alone.
        """
        if self.top not in graph.nodes:
            return ()
        active = self.top in self.active_nodes(graph)
        apart = not _are_layers(graph, self.top, self.base)
        if not active and not (apart and stale is False and lies_on_something(graph, self.top)):
            return ()
        return (
            *self._without_others(graph),
            *self._zeroes(graph),
            Step("bring-home", self.top, "it holds what the guest wrote last"),
        )

    def gives_back(self, graph: BlockGraph, *, done: bool | None) -> Iterable[Step]:
        """Leave the overlay under somebody's snapshot, but not what it was put on for a while."""
        yield from self._zeroes(graph)
        yield from self._without_others(graph)

    def _zeroes(self, graph: BlockGraph) -> Iterable[Step]:
        why = "its detect-zeroes was off while it was frozen"
        return zeroes_of(graph, self.base, self.detect_zeroes, why)

    def _without_others(self, graph: BlockGraph) -> Iterable[Step]:
        """Have an overlay of ours lie on its image itself, and remove what else we made there.

        While that lies on the image, the image cannot be written to by anybody else; and while it
        may write there, nobody may lie on the image who has to see it as it was.
        """
        overlay = graph.nodes.get(self.top)
        between = overlay.child("backing") if overlay is not None else None
        gone: set[str] = set()
        for node in self.nodes:  # each before those that it lies on
            if node == between:
                why = "it is to lie on the image itself again"
                yield Step("relink", self.top, why, self.base)
                gone.add(f"node {self.top}")
            if node in graph.nodes and node != self.top and gone.issuperset(graph.users(node)):
                gone.add(f"node {node}")
                yield Step("delete-node", node, self.served)

    def may_hold_writes(self, graph: BlockGraph, node: str, *, stale: bool | None) -> bool:
        """Tell by the overlay, until the guest is back on the image."""
        if node != self.top or not lies_on_something(graph, node):
            return False
        return self.base not in self.active_nodes(graph) and stale is not True

    def verdict(
        self, entries: Iterable[Mapping[str, object]], empty: Mapping[str, bool]
    ) -> ImageVerdict:
        """Name the image, into which the overlay is committed first, unless that is stale."""
        others = tuple(file for file in empty if file != self.top_file)
        if self.top_file not in empty:
            return ImageVerdict((self.base_file,), (), others, "no overlay of ours is left")
        if pivoted(entries):
            why = "the guest was back on the image; the overlay is stale"
            return ImageVerdict((self.base_file,), (), (*others, self.top_file), why)
        if empty[self.top_file]:
            why = "nothing was written to the overlay"
            return ImageVerdict((self.base_file,), (), (*others, self.top_file), why)
        return ImageVerdict(
            (self.base_file,),
            (),
            others,
            "the overlay held what the guest wrote last",
            commit=((self.top_file, self.base_file),),
        )

    def check(self) -> None:
        """Look at what goes into a command line, too."""
        super().check()
        check_settings(self.detect_zeroes, "", self.base_opened)


@dataclass(frozen=True)
class ManagersStaging(StagedCommit):
    """The same where a manager owns the chain: it takes the overlay, and brings it home.

    So it knows of the overlay from before the guest writes to that, and whoever starts the VM
    starts it from there, with nothing lost and nothing to be recovered first. What it calls the
    overlay's node is seen in the graph alone.

    :ivar known_as: what the manager calls the disk.
    """

    operation: ClassVar[str] = "allocate by its manager"
    needed: ClassVar[tuple[str, ...]] = (*StagedCommit.needed, "known_as")

    known_as: str = ""

    def seen_in(self, graph: BlockGraph) -> ManagersStaging:
        """Return it with the node of the overlay, where that is open."""
        files = {name for name, node in graph.nodes.items() if node.filename == self.top_file}
        on_them = (name for name, node in graph.nodes.items() if node.child("file") in files)
        return replace(self, top=next(on_them, ""))

    def took_effect(self, graph: BlockGraph) -> bool | None:
        """Tell by where the guest is, as any that pivots."""
        return super(ManagersStaging, self.seen_in(graph)).took_effect(graph)

    def of_manager(self, graph: BlockGraph) -> tuple[Step, ...]:
        """Have it end what it has begun for us, and then say where the guest is."""
        active = self.active_nodes(graph)
        disks = (device for device in graph.disks() if device.qom_path in self.devices)
        jobs = (job for device in disks for job in device.jobs)
        if self.top in active and any(job.type == "commit" and not job.ours for job in jobs):
            return (Step("bring-home", self.top, "the manager is at it, as it was asked to"),)
        if paused_node(self.run) in graph.nodes:
            why = "the manager and QEMU are to name the same image, before the guest goes on"
            return (Step("agree", self.known_as, why),)
        return ()

    def way_home(self, graph: BlockGraph, *, stale: bool | None) -> tuple[Step, ...]:
        """Bring it home, unless somebody else has put something between it and its image."""
        overlay = graph.nodes.get(self.top)
        below = None if overlay is None else overlay.child("backing")
        if below not in (self.base, *self.nodes):
            return ()
        return super().way_home(graph, stale=stale)

    def gives_back(self, graph: BlockGraph, *, done: bool | None) -> Iterable[Step]:
        """Close an overlay that the manager opened, and forgot when its daemon was ended.

        Where somebody has put something below it, it stays: then its header is to name that.
        """
        yield from super().gives_back(graph, done=done)
        overlay = graph.nodes.get(self.top)
        if overlay is not None and overlay.child("backing") not in self.nodes:
            name = posixpath.basename(self.base_file)
            yield from name_below(graph, [(self.top_file, self.base, self.base_file, name)])
        if done and self.top in graph.nodes and not graph.users(self.top):
            for node in (self.top, graph.nodes[self.top].child("file")):
                if node is not None:
                    yield Step("delete-node", node, "it is of an overlay of ours that is not used")

    def may_start(
        self, graph: BlockGraph, entries: Iterable[Mapping[str, object]]
    ) -> tuple[str, ...]:
        """Keep the overlay where the guest was not seen to be back on the image."""
        return () if pivoted(entries) or self.took_effect(graph) else (self.top_file,)

    def verdict(
        self, entries: Iterable[Mapping[str, object]], empty: Mapping[str, bool]
    ) -> ImageVerdict:
        """Leave it to the manager, which starts the VM from the overlay if it was there."""
        said = tuple(entries)
        if self.top_file not in empty:
            return super().verdict(said, empty)
        if pivoted(said):
            why = "the guest was back on the image, and its manager knew; the overlay is stale"
            return replace(super().verdict(said, empty), why=why)
        held = "may hold" if empty[self.top_file] else "holds"
        return ImageVerdict(
            (self.top_file,) if held == "holds" else (self.base_file,),
            (),
            tuple(file for file in empty if file != self.top_file),
            f"{printable(self.top_file)} {held} what the guest wrote last, and the manager starts "
            "the VM from what it knows (virsh domblklist DOMAIN, virsh start DOMAIN). While that "
            f"runs, qmpblock recover {shell_words([self.vm.monitor])} brings it home",
            waits=True,
        )


@dataclass(frozen=True)
class FrozenCopy(StagedCommit):
    """One disk of a copy: its image is frozen below an overlay while it is copied.

    Its nodes are, besides those of the overlay, those of the target: QEMU closes, and so flushes,
    that before the overlay comes home. The target's file is no image of the VM's, and not among
    `files`: by its name it is not whole, until it is.

    :ivar wires: as of a `Copy`.
    :ivar drawn: the dirty bitmap, as (node, name), of what is left to copy: of the image that is
        frozen, which stays.
    """

    operation: ClassVar[str] = "copy"
    served: ClassVar[str] = "it was copied to, and QEMU has to close it"

    wires: tuple[tuple[str, str], ...] = ()
    drawn: tuple[tuple[str, str], ...] = ()

    def way_home(self, graph: BlockGraph, *, stale: bool | None) -> tuple[Step, ...]:
        """Bring the overlay home, before it what was read of the target, and the bitmap."""
        home = super().way_home(graph, stale=stale)
        return (*self._serving(graph), *home) if home else ()

    def gives_back(self, graph: BlockGraph, *, done: bool | None) -> Iterable[Step]:
        """Leave neither export nor bitmap."""
        yield from self._serving(graph)
        yield from super().gives_back(graph, done=done)

    def _serving(self, graph: BlockGraph) -> Iterable[Step]:
        for export, node in graph.exports.items():
            if node in self.nodes and is_ours(export):
                yield Step("end-export", export, "what was copied was compared by it")
        yield from without_bitmaps(graph, self.drawn)
