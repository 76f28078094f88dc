"""What is to be done about a migration whose controller gave up or died. Pure.

It follows from what both sides show, the arbiter, and the journal, where there is one; nothing is
remembered. One move at a time: after each, both sides are looked at again, so that whoever is
killed on the way can be followed by anybody, and two may do it at once.

Both are to be seen as they were at one moment: the destination, the source, and the destination
again, until that is as before. It goes one way only (it waits, has the guest, runs, is gone), so it
was like that when the source was seen. What is true of the two at different moments was never true,
and would have the guest quit at the destination just after somebody continued it there.

What it rests on (`qmpblock.migration.states`):

- a source whose guest runs there owns it: nobody continues the destination without the arbiter,
  which is taken only from a source that has completed;
- a source that has completed stays so until somebody who has taken the arbiter continues it;
- without the arbiter no controller of ours has continued the destination.

A storage daemon that has the destination's images is a third process; it decides nothing. It has
ended before the source is told to send the rest (K36), so where one is left the guest is the
source's; that goes on there first, also where the daemon cannot be ended. Before anything else is
done it has ended.

What does not follow from these, a person decides (`Decision.ask`); what he says is `force`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qmpblock.changes.step import Choice
from qmpblock.migration.states import ACTIVE, SETTLING, Move, Phase, Reach, Seen, Side
from qmpblock.qemu.runstate import MIGRATION_OVER, OF_ITS_OWN, STANDS, STOPPED_ITSELF

__all__ = ["Decision", "decide"]


#: What has the guest go on at the source.
_HOMEWARD = frozenset(
    {Move.CANCEL, Move.SETTLE, Move.CLAIM_SOURCE, Move.QUIT_DESTINATION, Move.CONT_SOURCE}
)
#: What a source shows that has its guest again, which was paused before (F40).
_PAUSED = frozenset({"paused", "postmigrate"})
#: What is done instead where the guest is to stay stopped.
_STANDING = {
    Move.CONT_SOURCE: (Side.SOURCE, Move.FINISH_SOURCE),
    Move.CONT_DESTINATION: (Side.DESTINATION, Move.FINISH_DESTINATION),
}


@dataclass(frozen=True)
class Decision:
    """Who owns the guest, and what is to be done next.

    :ivar owner: None where it cannot be told.
    :ivar move: None where nothing can be done from here: `ask` says so.
    :ivar why: in words.
    :ivar ask: what a person has to find out or to do; empty where he has not.
    :ivar last: whether nothing can be done, or is left, after that move.
    """

    owner: Side | None
    move: Move | None
    why: str
    ask: str = ""
    last: bool = False


def decide(
    phase: Phase | None,
    source: Seen,
    destination: Seen,
    *,
    stopped: bool = False,
    images: Reach = Reach.GONE,
    choice: Choice = Choice.UNDO,
    force: Side | None = None,
) -> Decision:
    """Return what is to be done next.

    :param phase: what the journal says; None where there is none.
    :param stopped: whether it says that the guest had stopped, by itself or somebody else: it stays
        so then.
    :param images: what can be known of the storage daemon that has the destination's images.
    :param choice: which way it is to go where both are safe: UNDO, back to the source.
    :param force: the side on which a person says that the guest is to go on. Used where it cannot
        be told, and never against what can be seen.
    """
    stopped = stopped or source.stopped or destination.stopped or source.run in STOPPED_ITSELF
    if stopped and destination.run in STANDS:  # it came so, and nobody has continued it (F42)
        destination = replace(destination, run="paused")
    decision = _of_both(phase, source, destination, choice, force)
    if decision.move in _STANDING and stopped:
        owner, move = _STANDING[decision.move]
        why = f"{decision.why}, stopped as it was"
        decision = replace(decision, owner=owner, move=move, why=why, last=True)
    if images is Reach.GONE or (decision.move in _HOMEWARD and not decision.last):
        return decision
    return Decision(
        decision.owner, Move.END_IMAGES, "the storage daemon has the destination's images"
    )


def _of_both(
    phase: Phase | None, source: Seen, destination: Seen, choice: Choice, force: Side | None
) -> Decision:
    if source.answers:
        if source.run in OF_ITS_OWN:
            return _at_home(source, destination)
        if source.run == "finish-migrate":
            return _held(source)
        if source.run == "postmigrate" and source.migration == "completed":
            return _away(phase, source, destination, choice, force)
        if source.run == "postmigrate" and source.migration in MIGRATION_OVER | SETTLING:
            return _at_home(source, destination)  # it had been paused before (F40)
        return _strange("source", source)
    return _without_source(phase, source, destination, force)


def _at_home(source: Seen, destination: Seen) -> Decision:
    """Decide where the guest is at the source."""
    if source.migration in ACTIVE:
        return _call_back(source)
    if source.migration in SETTLING:
        return Decision(Side.SOURCE, Move.SETTLE, f"the source is {source.migration}")
    if source.migration not in MIGRATION_OVER:
        return _strange("source", source)
    if _has_run(destination):
        return _two(source, destination)
    if destination.answers:
        why = "the guest is at the source, so that what came to the destination is of no use"
        return Decision(Side.SOURCE, Move.QUIT_DESTINATION, why)
    if source.paused and source.run in _PAUSED:
        why = "the guest is at the source, where the migration had paused it"
        return Decision(Side.SOURCE, Move.CONT_SOURCE, why)
    return Decision(Side.SOURCE, Move.FINISH_SOURCE, "the guest is at the source", last=True)


def _call_back(source: Seen) -> Decision:
    return Decision(Side.SOURCE, Move.CANCEL, f"the source is {source.migration}")


def _held(source: Seen) -> Decision:
    """Decide where the source holds the guest, and migrates."""
    if source.migration in ACTIVE:
        return _call_back(source)
    if source.migration in SETTLING | MIGRATION_OVER:  # a moment before it shows
        return Decision(Side.SOURCE, Move.SETTLE, f"the source is {source.migration}")
    return _strange("source", source)


def _away(
    phase: Phase | None, source: Seen, destination: Seen, choice: Choice, force: Side | None
) -> Decision:
    """Decide where the source has completed."""
    if source.decided is Side.SOURCE:
        if _has_run(destination):
            return _two(source, destination)
        why = "the arbiter says that the source goes on"
        # First the one that must not run: where they share their images, it has them locked.
        move = Move.QUIT_DESTINATION if destination.answers else Move.CONT_SOURCE
        return Decision(Side.SOURCE, move, why)
    if source.decided is Side.DESTINATION:
        return _decided(source, destination, force)
    if _has_run(destination):
        return Decision(
            Side.DESTINATION,
            Move.CLAIM_DESTINATION,
            "the guest runs at the destination, though no arbiter says so",
        )
    if _waits(destination):
        wanted = force or (Side.DESTINATION if choice is Choice.CONTINUE else Side.SOURCE)
        if wanted is Side.DESTINATION and _may_be_whole(phase):
            return Decision(
                Side.SOURCE, Move.CLAIM_DESTINATION, "the destination has it all, and waits"
            )
        why = "nobody has continued the destination, so that the guest can go on at the source"
        return Decision(Side.SOURCE, Move.CLAIM_SOURCE, why)
    if destination.answers or destination.reach is Reach.GONE:
        return Decision(
            Side.SOURCE, Move.CLAIM_SOURCE, "the destination has not got it, and was not continued"
        )
    if force is Side.SOURCE:
        return Decision(Side.SOURCE, Move.CLAIM_SOURCE, "a person decided so")
    return Decision(
        None,
        None,
        "the source has completed and nobody has decided where the guest goes on; the destination "
        "does not answer",
        ask="see that the destination's QEMU has ended, or have it answer, then run this again; "
        "the guest may run there only if somebody continued it by hand",
    )


def _decided(source: Seen, destination: Seen, force: Side | None) -> Decision:
    """Decide where the arbiter says that the guest goes on at the destination."""
    if _waits(destination):
        if destination.decided is None:
            return Decision(Side.DESTINATION, Move.MARK, "the arbiter says that it goes on there")
        return Decision(
            Side.DESTINATION, Move.CONT_DESTINATION, "the arbiter says that it goes on there"
        )
    if _has_run(destination):
        return Decision(Side.DESTINATION, Move.FINISH_DESTINATION, "the guest is there", last=True)
    if destination.answers:
        return _strange("destination", destination)
    if destination.reach is Reach.GONE:
        if force is Side.SOURCE:
            return Decision(Side.DESTINATION, Move.CONT_SOURCE, "a person decided so")
        return Decision(
            Side.DESTINATION,
            None,
            "the guest was handed to the destination, and that has ended",
            ask="start the VM again from the images at the destination: they hold the newest data. "
            "The source holds what the guest was before; to continue it there loses what it wrote "
            "at the destination",
        )
    return Decision(
        Side.DESTINATION,
        None,
        "the guest was handed to the destination, which does not answer",
        ask="do not continue the source. Have the destination answer, then run this again",
    )


def _without_source(
    phase: Phase | None, source: Seen, destination: Seen, force: Side | None
) -> Decision:
    """Decide where the source is gone, or does not answer."""
    if phase is Phase.HANDED or destination.decided is Side.DESTINATION:
        return _handed_over(destination, force)
    if _has_run(destination):
        why = "the guest runs at the destination"
        return Decision(Side.DESTINATION, Move.FINISH_DESTINATION, why, last=True)
    if destination.answers and not _waits(destination):
        if destination.run != "inmigrate":
            return _strange("destination", destination)
        why = "the destination has not got the guest, and can get it no more"
        return Decision(Side.SOURCE, Move.QUIT_DESTINATION, why, last=True)
    if phase is not None and phase.before(Phase.SENT):
        why = "the source had not sent everything"
        if destination.answers:
            return Decision(Side.SOURCE, Move.QUIT_DESTINATION, why, last=True)
        return Decision(Side.SOURCE, Move.FINISH_SOURCE, why, last=True)
    if destination.answers and force is Side.DESTINATION:
        return Decision(None, Move.MARK, "a person decided so")
    if destination.answers and force is Side.SOURCE:
        return Decision(None, Move.QUIT_DESTINATION, "a person decided so", last=True)
    if destination.reach is Reach.GONE and force is not None:
        move = Move.FINISH_SOURCE if force is Side.SOURCE else Move.FINISH_DESTINATION
        return Decision(force, move, "a person decided so", last=True)
    return _ask_without_source(source, destination)


def _handed_over(destination: Seen, force: Side | None) -> Decision:
    if destination.reach is Reach.GONE and force is Side.DESTINATION:
        why = "a person decided so"
        return Decision(Side.DESTINATION, Move.FINISH_DESTINATION, why, last=True)
    if _has_run(destination):
        return Decision(Side.DESTINATION, Move.FINISH_DESTINATION, "the guest is there", last=True)
    if not _waits(destination):
        return Decision(
            Side.DESTINATION,
            None,
            "the guest was handed to the destination",
            ask="have the destination answer and run this again; if its QEMU has ended, start the "
            "VM again from the images there: they hold the newest data",
        )
    if destination.decided is None:
        return Decision(Side.DESTINATION, Move.MARK, "the journal says that it was handed over")
    return Decision(Side.DESTINATION, Move.CONT_DESTINATION, "it was decided for the destination")


def _ask_without_source(source: Seen, destination: Seen) -> Decision:
    what = "has ended" if source.reach is Reach.GONE else "does not answer"
    if destination.answers:
        return Decision(
            None,
            None,
            f"the destination has the whole guest and waits; the source {what}, so that whether "
            "the guest went on there cannot be told",
            ask="if it did, or if that is not certain: end the destination, and start the VM again "
            "from the images at the source, which lost nothing. If it certainly did not: continue "
            "the destination",
        )
    there = "has ended, too" if destination.reach is Reach.GONE else "does not answer either"
    return Decision(
        None,
        None,
        f"the source {what}; the destination {there}",
        ask="find out whether the guest ever ran at the destination. If it did, the images there "
        "hold the newest data, else those at the source do",
    )


def _may_be_whole(phase: Phase | None) -> bool:
    """Whether the destination's images may be equal to the source's: the mirrors ended before."""
    return phase is None or not phase.before(Phase.SENT)


def _waits(destination: Seen) -> bool:
    """Whether the destination has the whole guest, and waits to be continued."""
    return destination.answers and (destination.run, destination.migration) == (
        "paused",
        "completed",
    )


def _has_run(destination: Seen) -> bool:
    """Whether the destination has the guest, and was continued."""
    return destination.answers and destination.run in OF_ITS_OWN and not _waits(destination)


def _two(source: Seen, destination: Seen) -> Decision:
    return Decision(
        None,
        None,
        "both sides have a guest that was continued",
        ask="stop both at once (stop), and find out which of them was written to last. Nothing of "
        "ours does that: somebody continued one of them by hand",
    )


def _strange(side: str, seen: Seen) -> Decision:
    return Decision(
        None,
        None,
        f"the {side} is in a state that is none of a migration of ours: {seen}",
        ask="see whether this is the address that was meant, and what was done there by hand",
    )
