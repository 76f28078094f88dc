"""A model of two QEMUs, what lies between them, and controllers that die: explored exhaustively.

It takes the engine's moves (`ORDER`) and the decision (`decide`) from the code; what a QEMU does is
here, as measured. Everything may happen in any order, between any two steps:

- the engine makes its next move, gives up, or is killed; what it had just sent may be carried out
  later than that, or never;
- two recoveries, which look, and act on that later, when it may not be true any more. They wish for
  different ends, one has the journal, each may reach one side alone, none cares for locks, and each
  may be killed and run again;
- either QEMU dies, the wire between them is cut or falls silent, each as often as `failures` says;
  the storage daemon that has the destination's images dies, or cannot be ended;
- somebody else stops the guest, and may continue it, as long as the source does not hold it; or
  it stops itself, which both sides show;
- on request the engine pauses the guest, at any moment until the source holds it. QEMU takes what
  its monitors are sent in turn: the `stop` of one that was killed is carried out before what a
  recovery sees, or never.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from qmpblock.changes.step import Choice
from qmpblock.migration.decision import Decision, decide
from qmpblock.migration.states import ORDER, Move, Phase, Planned, Reach, Seen, Side

# What a source shows, by what it is in here; of the destination, likewise.
SOURCE = {
    "home": ("running", "none"),
    "active": ("running", "active"),
    "held": ("finish-migrate", "pre-switchover"),
    "device": ("finish-migrate", "device"),
    "away": ("postmigrate", "completed"),
    "failed": ("running", "failed"),
    "cancelled": ("running", "cancelled"),
    "reclaimed": ("running", "completed"),
    "home, stands": ("paused", "none"),
    "active, stands": ("paused", "active"),
    "failed, stands": ("paused", "failed"),
    "cancelled, stands": ("paused", "cancelled"),
    "home, stopped": ("io-error", "none"),
    "active, stopped": ("io-error", "active"),
    "failed, stopped": ("io-error", "failed"),
    "cancelled, stopped": ("io-error", "cancelled"),
    "failed, stays": ("postmigrate", "failed"),
    "cancelled, stays": ("postmigrate", "cancelled"),
}
DESTINATION = {
    "waits": ("inmigrate", "none"),
    "comes": ("inmigrate", "active"),
    "there": ("paused", "completed"),
    "there, stopped": ("io-error", "completed"),
    "runs": ("running", "completed"),
}
GONE = "gone"
UNREACHED = "unreached"
RUNNING = frozenset({"home", "active", "failed", "cancelled", "reclaimed"})
MAY_STAND = frozenset({"home", "active", "failed", "cancelled"})
MOST_SLOTS = 2
#: What says, of a guest that somebody else stopped, that it is to stay so.
TELLING = (Move.CLAIM_DESTINATION, Move.MARK)

BOTH, HERE, THERE = "both", "source", "destination"  # what a recovery can reach
Came = dict["World", "tuple[World, str] | None"]


class Recoverer(NamedTuple):
    """One recovery. Of plain words, which Python compares fast.

    :ivar at: `idle`, `look` (at both sides, and decide), `do`, `done`, `asked`; `stuck`, if the
        storage daemon did not end; `needless`, if it
        asked what both sides tell; `wrong`, if what it says is.
    :ivar reaches: which sides it can reach.
    :ivar move: what it is about to do; `last`: whether that is the end of it; `knows`: whether it
        has seen that somebody else stopped the guest.
    """

    at: str = "idle"
    reaches: str = ""
    move: str = ""
    last: bool = False
    knows: bool = False


class World(NamedTuple):
    """All that there is, but how many failures there were.

    :ivar daemon: the storage daemon, while there is one: `alive`, or `stuck`: it does not end.
    :ivar marked: whether it says at the source that the migration pauses the guest; `stands`:
        whether it has.
    :ivar halted: whether somebody else has stopped it; `says`: whether that was said at the source,
        and is known to the engine and its journal; `cleared`: whether the source has it no more.
    :ivar sent: whether the rest of the guest is on its way to the destination, or the answer back.
    :ivar whole: whether the mirrors have ended. `loaded`: whether the destination ever had the
        guest; `ran`: whether it ever ran there.
    :ivar arbiter: which side it says, if any. `mark`: whether there is one; `tells`: whether that
        says that somebody else stopped the guest; `rules`: whether the arbiter does.
    :ivar phase: what the journal says.
    :ivar pc: the engine's next move; -1 where it is dead, or done.
    :ivar slots: what somebody sent who does not wait for it any more.
    """

    source: str = "home"
    destination: str = "waits"
    daemon: str = ""
    wire: str = "ok"
    marked: bool = False
    stands: bool = False
    halted: bool = False
    says: bool = False
    cleared: bool = False
    sent: str = ""
    whole: bool = False
    loaded: bool = False
    ran: bool = False
    arbiter: str = ""
    mark: bool = False
    tells: bool = False
    rules: bool = False
    phase: str = Phase.CHECKED.value
    pc: int = 0
    finished: bool = False
    slots: tuple[str, ...] = ()
    with_journal: Recoverer = Recoverer()
    without: Recoverer = Recoverer()


@dataclass(frozen=True)
class Rules:
    """How things are; each field is what makes it safe, and can be left out."""

    minus_s: bool = True  # the destination's -S
    return_path: bool = True
    arbiter: bool = True
    order: tuple[Planned, ...] = ORDER
    wait_for_source: bool = True  # `completed`, before the destination is continued
    daemon: bool = False  # whether there is a storage daemon
    pause: bool = False  # whether the engine may pause the guest
    marked: bool = True  # whether it says so at the source
    halts: bool = False  # whether somebody else may stop the guest
    itself: bool = False  # whether it stops itself, then
    says: bool = True  # whether the source says so; the journal; the mark; the arbiter
    writes: bool = True
    marks: bool = True
    claims: bool = True


class Found(Exception):  # noqa: N818 - no error: what the exploration is for
    """What must not be, and the way to it."""


@dataclass
class Explored:
    """How far it went: `ends` are the states in which nothing is left to happen but failures."""

    states: int = 0
    ends: int = 0
    asked: int = 0


class Model:
    """One set of rules."""

    def __init__(self, rules: Rules, failures: int) -> None:
        self.rules = rules
        self.failures = failures

    # -- exploration

    def explore(self) -> Explored:
        """Go everywhere, with few failures first: who has more of them left gets everywhere else.

        :raise Found: something that must not be.
        """
        first = World()
        came: Came = {first: None}
        explored = Explored()
        level = deque([first])
        for failures in range(self.failures + 1):
            queue, level = level, deque()
            while queue:
                world = queue.popleft()
                ends = True
                for what, after in self.steps(world):
                    ends = ends and what.endswith("begins")
                    self._came_to(after, world, what, came, queue)
                if ends:
                    explored.ends += 1
                    explored.asked += "asked" in (world.with_journal.at, world.without.at)
                    self._hold(self.wrong_at_the_end(world), world, came)
                if failures < self.failures:
                    level.append(world)
            queue = deque()
            for world in level:
                for what, after in self.failing(world):
                    self._came_to(after, world, what, came, queue)
            level = queue
        explored.states = len(came)
        return explored

    def _came_to(
        self, after: World, world: World, what: str, came: Came, queue: deque[World]
    ) -> None:
        after = _without_what_is_over(after)
        if after not in came:
            came[after] = (world, what)
            self._hold(self.wrong(after), after, came)
            queue.append(after)

    def _hold(self, wrong: str, world: World, came: Came) -> None:
        if not wrong:
            return
        way: list[str] = []
        at: World = world
        while (before := came[at]) is not None:
            at, what = before
            way.append(what)
        raise Found("\n  ".join([wrong, *reversed(way), str(world)]))

    # -- what must not be

    def wrong(self, world: World) -> str:
        """Say what is wrong, at any moment; empty if nothing is."""
        if world.source in RUNNING and world.destination == "runs":
            return "the guest runs twice"
        if world.source in RUNNING and world.ran:
            return "the guest runs at the source after it ran at the destination"
        if world.destination == "runs" and world.daemon:
            return "the guest runs on images that another process writes to"
        if world.destination == "runs" and not world.whole:
            return "the guest runs on images that are not whole"
        if world.halted and (world.destination == "runs" or world.source == "reclaimed"):
            return "a guest that somebody had stopped runs"
        if world.halted and not world.stands:
            return "a guest that somebody had stopped runs"
        if world.source == "away" and not world.loaded:
            return "the source says completed, and the destination has not got the guest"
        for one in (world.with_journal, world.without):
            if one.at == "wrong":
                return "it is said to be the source's after it ran at the destination"
            if one.at == "needless":
                return "a person is asked what can be told"
        return ""

    def wrong_at_the_end(self, world: World) -> str:
        """Say what is wrong where nothing more happens by itself."""
        if "asked" in (world.with_journal.at, world.without.at):
            return ""
        handed = world.arbiter == THERE or world.ran
        owner = world.destination if handed else world.source
        stands = owner not in (*RUNNING, "runs") or (world.stands and not handed)
        if owner != GONE and stands and not world.halted and self._all_reached(world):
            return "nobody runs, and nobody was asked"
        return ""

    def _all_reached(self, world: World) -> bool:
        """Whether whoever came to an end could see and reach both sides."""
        return world.finished or any(
            one.at in ("done", "stuck") and one.reaches == BOTH
            for one in (world.with_journal, world.without)
        )

    # -- what may happen

    def steps(self, world: World) -> Iterator[tuple[str, World]]:
        """Yield all that can happen next."""
        yield from self._qemu(world)
        for number, move in enumerate(world.slots):
            rest = world._replace(slots=world.slots[:number] + world.slots[number + 1 :])
            yield f"late: {move}", self.effect(rest, Move[move], BOTH)
            yield f"lost: {move}", rest
        if world.pc >= 0:
            yield from self._engine(world)
        if self.rules.halts and world.source in ("home", "active") and world.pc >= 0:
            if world.halted:
                yield "somebody continues it", world._replace(halted=False, stands=False)
            elif not world.stands and not world.marked:
                yield "somebody stops it", world._replace(halted=True, stands=True)
        yield from self._recovery(world, "with_journal")
        if world.pc < 0 and not world.finished:
            yield from self._recovery(world, "without")

    def _qemu(self, world: World) -> Iterator[tuple[str, World]]:
        source, destination = world.source, world.destination
        lost = world.wire == "cut" or destination == GONE
        if source in ("active", "device") and lost:
            yield "source fails", world._replace(source="failed")
        if world.wire == "ok" and source == "active" and destination == "comes":
            yield "source holds", world._replace(source="held")
        if world.sent == "rest" and destination == "comes":
            there = "there" if self.rules.minus_s else "runs"
            yield (
                "destination has it",
                world._replace(
                    destination=there, loaded=True, sent="answer", ran=world.ran or there == "runs"
                ),
            )
        answered = world.sent == "answer" or not self.rules.return_path
        if source == "device" and world.wire == "ok" and answered:
            yield "source completes", world._replace(source="away")
        if destination == "comes" and (
            world.wire == "cut" or source in (GONE, "failed", "cancelled")
        ):
            yield "destination exits", world._replace(destination=GONE)

    def effect(self, world: World, move: Move, reaches: str, *, knows: bool | None = None) -> World:
        """Return what a move that arrives does.

        :param knows: whether who makes it knows that somebody else stopped the guest; None: it
            does if that is so.
        """
        knows = world.says if knows is None else knows
        if move is Move.MARK and not world.mark and world.destination != GONE:
            world = world._replace(tells=knows and self.rules.marks)
        if move is Move.CLAIM_DESTINATION and not world.arbiter and world.source != GONE:
            world = world._replace(rules=knows and self.rules.claims)
        if move in (Move.UNEXPORT, Move.END_IMAGES) and world.daemon == "alive":
            return world._replace(daemon="")
        if reaches != THERE and world.source != GONE:
            world = self._at_source(world, move)
        if reaches != HERE and world.destination != GONE:
            world = self._at_destination(world, move)
        return world

    def _at_source(self, world: World, move: Move) -> World:
        source, destination = world.source, world.destination
        if move is Move.MIGRATE and source == "home":
            if world.wire == "cut" or destination == GONE:
                return world._replace(source="failed")
            comes = "comes" if destination == "waits" else destination
            return world._replace(source="active", destination=comes)
        if move is Move.SAY_STOPPED and source == "held":
            return world._replace(says=world.halted)
        if move is Move.END_MIRRORS and source == "held":
            return world._replace(whole=True)
        if move is Move.CONTINUE and source == "held":
            sent = "rest" if world.wire == "ok" and destination == "comes" else ""
            return world._replace(source="device", sent=sent)
        if move is Move.CANCEL and source in ("active", "held", "device"):
            return world._replace(source="cancelled")
        if move is Move.SETTLE and source == "device":
            return world._replace(source="failed")  # cut: its answer does not come any more
        if move in (Move.CLAIM_SOURCE, Move.CLAIM_DESTINATION):
            if not self.rules.arbiter:  # then whoever thinks that he may goes on at once
                cont = Move.CONT_SOURCE if move is Move.CLAIM_SOURCE else Move.CONT_DESTINATION
                return self.effect(world, cont, BOTH)
            side = HERE if move is Move.CLAIM_SOURCE else THERE
            return world._replace(arbiter=world.arbiter or side)
        if move is Move.CONT_SOURCE and source == "away":
            return world._replace(source="reclaimed", stands=False)
        if move is Move.CONT_SOURCE and source in MAY_STAND:
            return world._replace(stands=False)
        if move is Move.FINISH_DESTINATION:
            return world._replace(source=GONE)
        if move is Move.FINISH_SOURCE:
            arbiter = "" if destination == GONE else world.arbiter
            return world._replace(arbiter=arbiter, marked=False)
        return world

    def _at_destination(self, world: World, move: Move) -> World:
        if move is Move.MARK:
            return world._replace(mark=True)
        if move is Move.CONT_DESTINATION and world.destination == "there":
            return world._replace(destination="runs", ran=True)
        if move is Move.QUIT_DESTINATION:
            return world._replace(destination=GONE)
        if move is Move.FINISH_DESTINATION:
            return world._replace(mark=False, tells=False)
        return world

    # -- the engine

    def _engine(self, world: World) -> Iterator[tuple[str, World]]:
        planned = self.rules.order[world.pc]
        entered = world._replace(phase=planned.enters.value if planned.enters else world.phase)
        if planned.enters and not planned.beside and entered != world:
            yield f"engine: says {planned.enters}", entered
        if planned.move is Move.MIGRATE and (world.source, world.destination) == ("home", "waits"):
            yield "engine: tells the destination alone", entered._replace(destination="comes")
        if planned.move is Move.FINISH_DESTINATION and world.mark:
            yield "engine: takes the mark away", world._replace(mark=False, tells=False)
        if planned.move is Move.FINISH_DESTINATION and world.says and not world.cleared:
            yield "engine: clears the source", world._replace(cleared=True)
        if self._may(world, planned.move):
            # It knows of one that was stopped, and leaves it.
            leaves = planned.move is Move.CONT_DESTINATION and world.says
            after = entered if leaves else self.effect(entered, planned.move, BOTH)
            if planned.move is Move.MIRROR and self.rules.daemon:
                after = after._replace(daemon="alive")
            last = world.pc + 1 == len(self.rules.order)
            after = after._replace(pc=-1 if last else world.pc + 1, finished=last)
            yield f"engine: {planned.move.name}", after
        elif planned.beside and self._is_due(world, planned.move) and entered != world:
            yield f"engine: says {planned.enters}, and fails", entered
        if self._may_pause(world):
            if self.rules.marked and not world.marked:
                yield "engine: says that it pauses", world._replace(marked=True)
            else:
                yield "engine: PAUSE", world._replace(stands=True)
        if world.with_journal.at == "idle":  # its own way back is a recovery, too
            back = Recoverer("look", BOTH)
            yield "engine gives up", world._replace(pc=-1, with_journal=back)

    def _may_pause(self, world: World) -> bool:
        """Whether the engine can pause the guest now."""
        moves = [one.move for one in self.rules.order]
        begun = moves.index(Move.MIRROR) < world.pc <= moves.index(Move.AWAIT_HELD)
        return self.rules.pause and begun and not world.stands and world.source in MAY_STAND

    def _is_due(self, world: World, move: Move) -> bool:
        """Whether the engine begins a move of which it cannot be known whether it can be made."""
        return move is not Move.MARK or world.arbiter == THERE

    def _may(self, world: World, move: Move) -> bool:
        """Whether what a move waits for, or relies on, is there."""
        if world.source == GONE or world.destination == GONE:
            return False
        if move is Move.UNEXPORT:
            return world.daemon != "stuck"
        if move is Move.AWAIT_HELD:
            return world.source == "held"
        if move is Move.SAY_STOPPED:
            return world.source == "held"
        if move is Move.END_MIRRORS:
            return world.source == "held" and world.wire == "ok"
        if move is Move.AWAIT_LANDED:
            waits = world.destination == "there" and world.whole
            return waits and (world.source == "away" or not self.rules.wait_for_source)
        if move is Move.MARK and self.rules.arbiter:
            return world.arbiter == THERE  # else the other side was decided for
        return True

    # -- recoveries

    def _recovery(self, world: World, name: str) -> Iterator[tuple[str, World]]:
        one: Recoverer = getattr(world, name)

        def become(after: Recoverer, world: World = world) -> World:
            return world._replace(**{name: after})

        if one.at == "idle" and world.pc < 0 and not world.finished:
            for reaches in (BOTH, HERE if name == "with_journal" else THERE):
                yield f"{name}: begins", become(Recoverer("look", reaches))
        elif one.at == "look":
            for here in self._shown(world) if one.reaches != THERE else (UNREACHED,):
                yield self._look(world, name, here)
        elif one.at == "do":
            move = Move[one.move]
            after = self.effect(world, move, one.reaches, knows=one.knows)
            if name == "with_journal" and move is Move.MARK:
                after = after._replace(phase=Phase.HANDED.value)
            at = "done" if one.last else "look"
            if move is Move.END_IMAGES and after.daemon:
                at = "stuck"
            yield f"{name}: {one.move}", become(Recoverer(at, one.reaches), after)

    def _look(self, world: World, name: str, here: str) -> tuple[str, World]:
        """Look at both sides, of which the source shows `here`, and decide."""
        one: Recoverer = getattr(world, name)
        there = self._shown_there(world) if one.reaches != HERE else UNREACHED
        phase = world.phase if name == "with_journal" else ""
        written = self.rules.writes and not (phase and Phase(phase).before(Phase.SENT))
        stopped = (
            (self.rules.says and world.says and not world.cleared) or world.rules,
            world.tells,
            bool(phase) and written and world.says,
        )
        said = here, world.arbiter, world.marked, there, world.mark
        decision = _decide(phase, *said, bool(world.daemon), stopped)
        seen = (here not in (GONE, UNREACHED), there not in (GONE, UNREACHED), True)
        stopped = tuple(a and b for a, b in zip(stopped, seen, strict=True))
        after = _decided(one.reaches, {here, there}, decision)
        after = after._replace(knows=any(stopped) and decision.move in TELLING)
        if decision.last and decision.owner is Side.SOURCE and world.ran:
            after = Recoverer("wrong")
        return f"{name}: {decision.why}", world._replace(**{name: after})

    def _shown(self, world: World) -> tuple[str, ...]:
        """Return what the source may show: a guest that stood is `postmigrate` on 7.2 alone."""
        source = world.source
        if not world.stands or source not in MAY_STAND:
            return (source,)
        stands = "stopped" if self.rules.itself and world.halted else "stands"
        if source in ("failed", "cancelled"):
            return f"{source}, {stands}", f"{source}, stays"
        return (f"{source}, {stands}",)

    def _shown_there(self, world: World) -> str:
        """Return what the destination shows."""
        stopped = self.rules.itself and world.halted and world.destination == "there"
        return "there, stopped" if stopped else world.destination

    # -- failures

    def failing(self, world: World) -> Iterator[tuple[str, World]]:
        """Yield all that can fail."""
        if world.source != GONE:
            yield "failure: source dies", world._replace(source=GONE)
        if world.destination != GONE:
            yield "failure: destination dies", world._replace(destination=GONE)
        migrates = world.source in ("active", "held", "device") or (
            (world.source, world.destination) == ("home", "comes")
        )
        if world.wire == "ok" and migrates:
            lost = "" if world.sent == "answer" else world.sent
            yield "failure: cut", world._replace(wire="cut", sent=lost)
            yield "failure: cut, and the rest lost", world._replace(wire="cut", sent="")
            yield "failure: silent", world._replace(wire="silent", sent="")
        if world.daemon:
            yield "failure: daemon dies", world._replace(daemon="")
        if world.daemon == "alive":
            yield "failure: daemon does not end", world._replace(daemon="stuck")
        room = len(world.slots) < MOST_SLOTS
        if world.pc >= 0:
            planned = self.rules.order[world.pc]
            entered = planned.enters.value if planned.enters else world.phase
            yield "failure: engine killed", world._replace(pc=-1)
            leaves = planned.move is Move.CONT_DESTINATION and world.says
            if room and not leaves and self._may(world, planned.move):
                sent = world._replace(pc=-1, slots=(*world.slots, planned.move.name), phase=entered)
                if planned.move is Move.MIRROR and self.rules.daemon:
                    sent = sent._replace(daemon="alive")
                yield f"failure: engine killed, had sent {planned.move.name}", sent
                if planned.beside:
                    unsaid = sent._replace(phase=world.phase)
                    yield f"failure: engine killed, had sent {planned.move.name} alone", unsaid
        for name in ("with_journal", "without"):
            one: Recoverer = getattr(world, name)
            if one.at == "do" and room:
                slots = (*world.slots, one.move)
                yield (
                    f"failure: {name} killed",
                    world._replace(**{name: Recoverer(), "slots": slots}),
                )
            if one.at in ("do", "look"):
                yield f"failure: {name} killed", world._replace(**{name: Recoverer()})


def _decided(reaches: str, seen: set[str], decision: Decision) -> Recoverer:
    if decision.ask:
        return Recoverer("asked" if seen & {UNREACHED, GONE} else "needless")
    assert decision.move is not None
    return Recoverer("do", reaches, decision.move.name, decision.last)


def _without_what_is_over(world: World) -> World:
    """Return the world without what makes no difference any more: many are one then."""
    over = world.source not in ("home", "active", "held", "device")
    if over and world.destination != "comes" and (world.wire != "ok" or world.sent):
        world = world._replace(wire="ok", sent="")
    if len(world.slots) > 1 and world.slots[0] > world.slots[1]:
        world = world._replace(slots=world.slots[::-1])
    return world


@cache
def _decide(
    phase: str,
    here: str,
    arbiter: str,
    paused: bool,
    there: str,
    mark: bool,
    daemon: bool,
    stopped: tuple[bool, bool, bool],
) -> Decision:
    says, marks, written = stopped
    return decide(
        Phase(phase) if phase else None,
        _seen(SOURCE, here, Side(arbiter) if arbiter else None, paused=paused, stopped=says),
        _seen(DESTINATION, there, Side.DESTINATION if mark else None, stopped=marks),
        stopped=written,
        images=Reach.ANSWERS if daemon else Reach.GONE,
        choice=Choice.UNDO if phase else Choice.CONTINUE,
    )


def _seen(
    shows: Mapping[str, tuple[str, str]],
    what: str,
    decided: Side | None,
    *,
    paused: bool = False,
    stopped: bool = False,
) -> Seen:
    if what == UNREACHED:
        return Seen(Reach.UNREACHABLE)
    if what == GONE:
        return Seen(Reach.GONE)
    return Seen(Reach.ANSWERS, *shows[what], decided, paused, stopped)
