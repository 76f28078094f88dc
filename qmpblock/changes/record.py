"""Record: what a change intends, for whoever undoes it or carries it on (`qmpblock.versioned`).

It is kept in the data of the change's locks and in its journal (`qmpblock.changes.journal`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qmpblock.errors import printable
from qmpblock.graph.jsonname import from_text
from qmpblock.versioned import UnreadableError, plain, read

__all__ = ["OPERATIONS", "PIVOTED", "Record", "VMIdentity", "pivoted"]

#: What a change of a disk can be.
OPERATIONS = ("snapshot", "stream", "commit", "allocate")

_RUN = re.compile(r"[0-9a-f]{8}")


#: The key of the entry that says whether the base is the image to trust now.
PIVOTED = "pivoted"


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
class Record:
    """What one change intends: all that undoing it, or carrying it on, needs to know.

    :ivar run: in the names of all that it makes.
    :ivar operation: `snapshot`, `stream`, `commit` or `allocate`.
    :ivar devices: QOM paths of the disks; `names`: what people call them.
    :ivar locks: the ids of the locks that it holds.
    :ivar job: the id of its job, or empty; `helpers`: of those that only prepare.
    :ivar pivot: whether the job ends in a pivot: an active commit.
    :ivar flush: the node that must be flushed before the job is finalized, or empty.
    :ivar keeper: the node whose backing link will change; empty where the job pivots.
    :ivar top: the node that is streamed into, or the upper end of a commit; `base` the lower.
    :ivar top_file: its image file; also `base_file`, and `base_format` where that matters.
    :ivar base_opened: the options that open the base as QEMU had it (`qmpblock.graph.opened`), as
        text; empty where its name and format suffice, or an older version wrote this.
    :ivar written: the files that bringing an overlay home writes to, each with its inode; none
        where an older version wrote this.
    :ivar backing_name: that `keeper` will record for `base`, or empty.
    :ivar leaving: the nodes that leave the chain, each with its file name.
    :ivar nodes: nodes that it adds, in the order in which they can be removed.
    :ivar files: image files that it makes.
    :ivar bitmaps: dirty bitmaps that it adds to nodes that were there: (node, name).
    :ivar promotions: those of them that are to become persistent once their node is writable:
        (node, name of the transient one, name, granularity).
    :ivar merges: dirty bitmaps to be taken over before the job is finalized:
        (target node, source node, name).
    :ivar throttle: the guest's I/O limits, as they were, where it lowers them; empty if not.
        Its `group` is in `throttle_group`.
    :ivar detect_zeroes: that the base is to have at the end, where it has another one, or has
        for a while; empty if not. Likewise `discard`, of a commit.
    :ivar images: every image file of the disks, the active ones first.
    :ivar more: what another version wrote that this one does not know.
    """

    run: str
    operation: str
    vm: VMIdentity
    devices: tuple[str, ...]
    names: tuple[str, ...]
    locks: tuple[str, ...]
    job: str = ""
    helpers: tuple[str, ...] = ()
    pivot: bool = False
    flush: str = ""
    keeper: str = ""
    top: str = ""
    base: str = ""
    top_file: str = ""
    base_file: str = ""
    base_format: str = ""
    base_opened: str = ""
    written: tuple[tuple[str, int], ...] = ()
    backing_name: str = ""
    leaving: tuple[tuple[str, str], ...] = ()
    nodes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    bitmaps: tuple[tuple[str, str], ...] = ()
    promotions: tuple[tuple[str, str, str, int], ...] = ()
    merges: tuple[tuple[str, str, str], ...] = ()
    throttle: tuple[tuple[str, int], ...] = ()
    throttle_group: str = ""
    detect_zeroes: str = ""
    discard: str = ""
    images: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def home(self) -> str:
        """The image beside which its journal is kept too; empty where it pivots nothing."""
        if not self.pivot:
            return ""
        return self.base_file if self.operation == "allocate" else self.top_file

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return plain(self)

    @classmethod
    def from_json(cls, data: Any, run: str | None = None) -> Record:
        """Read a record that another version may have written, or somebody forged.

        Whatever it names that we would have made has our name in it.

        :param run: whose it must be; None: of any.
        :raise UnreadableError: it is no record, or not one that this version understands.
        """
        record = read(cls, data)
        if not _RUN.fullmatch(record.run) or run not in (None, record.run):
            raise UnreadableError("its run is none")
        if record.operation not in OPERATIONS:
            raise UnreadableError(f"its operation is {printable(record.operation, 40)!r}")
        prefix = f"qmpblock-{record.run}-"
        ours = [*record.nodes, *record.helpers, *([record.job] if record.job else [])]
        if not all(name.startswith(prefix) for name in ours):
            raise UnreadableError("it names jobs or nodes that are not of its run")
        if not all(name.startswith("qmpblock-disk-") for name in record.locks):
            raise UnreadableError("it names locks that are none")
        # What goes into a command line.
        if record.detect_zeroes not in ("", "off", "on", "unmap"):
            raise UnreadableError("its detect_zeroes is none")
        if record.discard not in ("", "ignore", "unmap"):
            raise UnreadableError("its discard is none")
        if record.base_opened and not from_text(record.base_opened).get("driver"):
            raise UnreadableError("its base_opened opens nothing")
        if record.job and record.job.endswith("-pivot") != record.pivot:
            raise UnreadableError("whether its job pivots is contradicted by the job's name")
        return record

    def check_journaled(self) -> None:
        """See that it says what is needed once QEMU is gone.

        :raise UnreadableError: it does not.
        """
        needed = ["images"]
        if self.pivot:
            needed += ["top_file", "base_file"]
        if self.operation == "snapshot":
            needed += ["files"]
        if self.operation == "allocate":
            needed += ["pivot", "files", "base_format"]
        for name in needed:
            if not getattr(self, name):
                raise UnreadableError(f"its field {name} is absent or empty")

    def describe(self) -> str:
        """Say what it is, for people."""
        return f"{self.operation} of {', '.join(map(printable, self.names))} (run {self.run})"


def pivoted(entries: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the last word of these entries is that the base is the image to trust."""
    words = [entry[PIVOTED] for entry in entries if PIVOTED in entry]
    return bool(words) and words[-1] is True
