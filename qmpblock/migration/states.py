"""The states of a migration, as data: who owns the guest, what each side shows, the way back. Pure.

The engine goes through `ORDER`, one move after the other; whoever finds a migration whose
controller is gone sees what `STATES` says that the two sides show, and asks
`qmpblock.migration.decision.decide` what is to be done. The exploration of all that can happen
(`tests/migration/`) takes its moves from here, too, and the pages in `docs/` their table.

What makes it one owner, whatever dies::

    the destination is started with -S      QEMU alone never has the guest run there
    capability return-path                  the source says `completed` only once the destination
                                            has the guest; else it goes on by itself
    the arbiter, an object at the source    is added once, by whoever decides: before `cont` at the
                                            destination, and before `cont` at a source that has
                                            completed. QEMU refuses it to the second one
    the mark, an object at the destination  says there that the arbiter decided for it, so that this
                                            can be told when the source is gone

A guest that somebody else stops on the way, or that stops itself, stays so, wherever it ends: a
node at the source says it before the rest is sent, then the journal, the arbiter, and the mark.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = [
    "ACTIVE",
    "ORDER",
    "SETTLING",
    "STATES",
    "Move",
    "Phase",
    "Planned",
    "Reach",
    "Seen",
    "Side",
    "State",
]


class Side(Enum):
    """One of the two QEMUs; also what the arbiter says, and who owns the guest."""

    SOURCE = "source"
    DESTINATION = "destination"


class Phase(Enum):
    """How far a migration is: the names of the states, as the journal has them."""

    CHECKED = "checked"
    MIRRORING = "mirroring"
    READY = "ready"
    MEMORY = "memory"
    HELD = "held"
    ENDED = "ended"
    SENT = "sent"
    LANDED = "landed"
    HANDED = "handed"

    def before(self, other: Phase) -> bool:
        """Whether it comes before another one."""
        order = tuple(Phase)
        return order.index(self) < order.index(other)


#: What query-migrate says of one that is under way, and that the source can still call back.
ACTIVE = frozenset({"setup", "wait-unplug", "active", "pre-switchover"})
#: What it says where QEMU itself is about to decide how it ends.
SETTLING = frozenset({"cancelling", "failing", "device"})


@dataclass(frozen=True)
class State:
    """One state of a migration.

    :ivar owner: whose guest it is, and whose images count.
    :ivar source: what the source shows (query-status, query-migrate), as it gets there and stays
        when its controller dies; `destination`: the destination.
    :ivar back: how it comes to be again as before; for people.
    """

    phase: Phase
    owner: Side
    source: frozenset[tuple[str, str]]
    destination: frozenset[tuple[str, str]]
    back: str


def _shows(*pairs: str) -> frozenset[tuple[str, str]]:
    return frozenset((run, migration) for run, _, migration in (p.partition("/") for p in pairs))


_HOME = _shows("running/none", "running/failed", "running/cancelled", "running/completed")
#: The same, where the migration has paused it.
_STANDS = _shows("paused/none", "paused/failed", "paused/cancelled", "paused/completed")
_WAITS = _shows("inmigrate/none", "inmigrate/setup")
_GOES = _shows("running/setup", "running/active", "paused/setup", "paused/active")
#: The wires end with their controller: so does what was on its way.
_FAILS = _shows("running/failed", "paused/failed", "postmigrate/failed")
_COMES = _shows("inmigrate/active")
_HELD = _shows("finish-migrate/pre-switchover")
_AWAY = _shows("postmigrate/completed")
_THERE = _shows("paused/completed")

_MIRRORS_BACK = (
    "the mirrors' connections are cut (yank: nothing is told to a source that may wait for a "
    "silent wire), the mirrors and all that was added removed; the destination quits"
)
_CANCEL = "migration and mirrors are cut (yank), then migrate_cancel; the rest as above"

#: Every state, in the order in which a migration goes through them.
STATES: tuple[State, ...] = (
    State(Phase.CHECKED, Side.SOURCE, _HOME, _WAITS, "there is nothing to be undone"),
    State(Phase.MIRRORING, Side.SOURCE, _HOME | _STANDS, _WAITS, _MIRRORS_BACK),
    State(Phase.READY, Side.SOURCE, _HOME | _STANDS, _WAITS, _MIRRORS_BACK),
    State(Phase.MEMORY, Side.SOURCE, _GOES | _FAILS, _COMES, _CANCEL),
    State(Phase.HELD, Side.SOURCE, _HELD, _COMES, f"{_CANCEL}. The guest stands until then"),
    State(Phase.ENDED, Side.SOURCE, _HELD, _COMES, "the same; the images of both are equal now"),
    State(
        Phase.SENT,
        Side.SOURCE,
        _shows("finish-migrate/device") | _FAILS | _AWAY,
        _COMES | _THERE,
        "the source itself decides: it completes, or fails and goes on. Where it does neither "
        "within the stall limit the migration's connection is cut, and then it does",
    ),
    State(
        Phase.LANDED,
        Side.SOURCE,
        _AWAY,
        _THERE,
        "the arbiter is taken for the source, the destination quits, the source is continued",
    ),
    State(
        Phase.HANDED,
        Side.DESTINATION,
        _AWAY,
        _THERE | _shows("running/completed"),
        "none: the destination is continued, the source quits",
    ),
)


class Move(Enum):
    """What a controller does, in words."""

    CHECK = "compare the two sides"
    MIRROR = "serve the target images at the destination, and mirror the disks there"
    AWAIT_READY = "wait until every mirror is ready"
    MIGRATE = "migrate, with return-path and pause-before-switchover"
    AWAIT_HELD = "wait until the source holds the guest"
    SAY_STOPPED = "say at the source that the guest had stopped, where that is so"
    END_MIRRORS = "end every mirror, without an error"
    UNEXPORT = "remove the exports at the destination, or end its storage daemon"
    CONTINUE = "let the source send the rest (migrate-continue)"
    AWAIT_LANDED = "wait until the source has completed and the destination has it all"
    CLAIM_DESTINATION = "take the arbiter at the source, for the destination"
    MARK = "say at the destination that the arbiter decided for it"
    CONT_DESTINATION = "continue the destination (cont), unless the guest was stopped before"
    FINISH_DESTINATION = "quit the source, and remove what is left of ours at the destination"
    # Only on request, before the source holds the guest.
    PAUSE = "say at the source that the migration pauses the guest, then pause it (stop)"
    # Only on the way back.
    CANCEL = "cut migration and mirrors at the source from outside (yank), then migrate_cancel"
    SETTLE = "wait for the source's own decision; cut the migration where it does not come"
    CLAIM_SOURCE = "take the arbiter at the source, for the source"
    CONT_SOURCE = "continue the source (cont)"
    QUIT_DESTINATION = "quit the destination"
    FINISH_SOURCE = "remove what is left of ours at the source"
    END_IMAGES = "end the storage daemon that has the destination's images"


@dataclass(frozen=True)
class Planned:
    """One move of a migration in which nothing fails.

    :ivar enters: the phase that begins with it: the journal says so, on stable storage, before
        the move is made.
    :ivar reaches: the phase that begins once it is made; of that the two sides tell themselves.
    :ivar beside: whether the journal may be written while the move is made: before the next one.
    """

    move: Move
    enters: Phase | None = None
    reaches: Phase | None = None
    beside: bool = False


#: What the engine does when all goes well.
ORDER: tuple[Planned, ...] = (
    Planned(Move.CHECK),
    Planned(Move.MIRROR, enters=Phase.MIRRORING),
    Planned(Move.AWAIT_READY, reaches=Phase.READY),
    Planned(Move.MIGRATE, enters=Phase.MEMORY),
    Planned(Move.AWAIT_HELD, reaches=Phase.HELD),
    Planned(Move.SAY_STOPPED),
    Planned(Move.END_MIRRORS, reaches=Phase.ENDED),
    Planned(Move.UNEXPORT, enters=Phase.SENT, beside=True),  # the guest stands
    Planned(Move.CONTINUE),
    Planned(Move.AWAIT_LANDED, reaches=Phase.LANDED),
    Planned(Move.CLAIM_DESTINATION),
    Planned(Move.MARK, enters=Phase.HANDED, beside=True),  # likewise
    Planned(Move.CONT_DESTINATION),
    Planned(Move.FINISH_DESTINATION),
)


class Reach(Enum):
    """What can be known of one side."""

    ANSWERS = "its monitor answers"
    UNREACHABLE = "its monitor does not answer, and whether it lives cannot be told"
    GONE = "its process has certainly ended"


@dataclass(frozen=True)
class Seen:
    """What one side shows.

    :ivar run: query-status; `migration`: query-migrate, `none` where it has none.
    :ivar decided: what the arbiter says, at the source; what the mark says, at the destination.
        None where there is none.
    :ivar paused: whether it says, at the source, that the migration has paused the guest.
    :ivar stopped: whether it says that the guest had stopped, which is to stay so.
    """

    reach: Reach
    run: str = ""
    migration: str = "none"
    decided: Side | None = None
    paused: bool = False
    stopped: bool = False

    @property
    def answers(self) -> bool:
        """Whether it can be asked, and told to do something."""
        return self.reach is Reach.ANSWERS

    def __str__(self) -> str:
        if not self.answers:
            return self.reach.value
        said = f"{self.run}/{self.migration}"
        said += ", paused by us" * self.paused + ", stopped before" * self.stopped
        return said if self.decided is None else f"{said}, decided for the {self.decided.value}"
