"""What is to be done of a change that is not finished: one step at a time. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from qmpblock.errors import printable

__all__ = ["Choice", "Step"]


class Choice(Enum):
    """What is wanted of a change that is not finished."""

    UNDO = "undo"
    CONTINUE = "continue"


@dataclass(frozen=True)
class Step:
    """One thing to do, and why, in words.

    :ivar verb: `follow`, `cancel`, `wait`, `pivot`, `finalize`, `dismiss`, `relink`,
        `restore-zeroes`, `restore-discard`, `bring-home`, `restore-limits`, `resume`,
        `end-export`, `take-out`, `give-up`, `agree`, `name-below`, `delete-bitmap`,
        `delete-node`, `delete-file`, `keep-file` or `clear-wire` (`qmpblock.changes.settle`
        performs them).
    :ivar what: the job, node (for a bitmap NODE/NAME), export, disk or file.
    :ivar to: what it is to have, or to lie on, where the verb needs that.
    """

    verb: str
    what: str
    why: str
    to: object = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.verb} {printable(self.what)}: {self.why}"
