"""What the sides of a migration show where one was struck, held against `STATES` and the model.

Nothing is asked that would not be asked anyhow, where a controller has died: what `decide` is asked
about is what was seen, with what the journal says. The first time nothing has been recovered yet:
then it is what `STATES` says, and what the model (migrationmodel.py) comes to when that dies which
was struck; later, what it comes to by recoveries. Where the controller lives the harness's own
monitors are asked, beside what it does.
"""

import contextlib
from collections import Counter, defaultdict
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from migrationmodel import DESTINATION, GONE, SOURCE, Model, Rules

from qmpblock.errors import StalledError
from qmpblock.migration import recover
from qmpblock.migration.journal import journals
from qmpblock.migration.sights import look_at_both
from qmpblock.migration.states import ORDER, STATES, Phase, Reach, Side

#: What a QEMU shows for a moment, and what it is in the model by then, or still.
PASSING = {
    "running/setup": {"active"},
    "finish-migrate/active": {"active", "held"},
    "finish-migrate/completed": {"device", "away"},
    "finish-migrate/failed": {"failed"},
    "finish-migrate/failing": {"failed"},
    "finish-migrate/cancelling": {"cancelled"},
    "finish-migrate/cancelled": {"cancelled"},
    "running/device": {"device", "failed"},  # it goes on, and says a moment later that it failed
    "running/failing": {"failed"},
    "running/cancelling": {"cancelled"},
}
PASSING_THERE = {
    "inmigrate/setup": {"waits", "comes"},
    "inmigrate/completed": {"comes", "there"},
    "inmigrate/failed": {"comes", GONE},
}
#: What of the model's failures comes with what is struck; the wires end with their controller. Who
#: loses patience with a side that hangs leaves it what he had sent, as one does who is killed.
_FAILURES = {
    "controller": ("engine killed", "cut"),
    "source": ("source dies",),
    "destination": ("destination dies",),
    "hangs": ("silent", "cut", "had sent"),
    "all": ("engine killed", "cut", "source dies", "destination dies"),
    "daemon": ("daemon",),
    "wire": ("cut", "silent"),
}
_MOST = 4  # failures: what one stroke comes to
#: The phases that the journal tells.
WRITTEN = (Phase.CHECKED, *(one.enters for one in ORDER if one.enters is not None))


class Shown(NamedTuple):
    """What the model says that the sides are, by its words; `phase`: what the journal says."""

    phase: str
    source: str
    destination: str
    arbiter: str
    mark: bool


@cache
def possible(struck, *, recovered, daemon=False):
    """Return what the model comes to when that is struck.

    :param recovered: whether somebody is at work on it: a recovery, or an engine that gave up.
    """
    words = [word for word in _FAILURES if word in struck]
    if "hangs" in words:  # that is what befalls a side
        words = [word for word in words if word not in ("source", "destination")]
    failures = {one for word in words for one in _FAILURES[word]}
    found = set()

    class Struck(Model):
        def steps(self, world):
            for what, after in super().steps(world):
                by = what.startswith(("with", "engine gives up"))
                if recovered or not by:
                    yield what, after

        def failing(self, world):
            for what, after in super().failing(world):
                if any(one in what for one in failures):
                    yield what, after

        def wrong(self, world):
            there = self._shown_there(world)
            for here in self._shown(world):
                found.add(Shown(world.phase, here, there, world.arbiter, world.mark))
            return super().wrong(world)

    Struck(Rules(daemon=daemon), _MOST).explore()
    return frozenset(found)


def told_as(phase):
    """Return the states that the journal tells as that phase: it, and those it does not tell."""
    phases = list(Phase)
    first = phases.index(phase)
    after = [phases.index(one) for one in WRITTEN if phase.before(one)]
    return STATES[first : min(after, default=len(phases))]


def in_states(phase, source, destination):
    """Whether `STATES` says that of the sides, in what the journal tells as that phase.

    It is written before the move that enters it is made: so it may be the state before, too.
    """
    before = STATES[max(0, list(Phase).index(phase) - 1)]
    states = {before, *told_as(phase)}
    return all(
        not seen.answers or any(_says(one, side, seen) for one in states)
        for side, seen in zip(Side, (source, destination), strict=True)
    )


def _says(state, side, seen):
    says = getattr(state, side.value)
    shows, passing = (SOURCE, PASSING) if side is Side.SOURCE else (DESTINATION, PASSING_THERE)
    soon = passing.get(f"{seen.run}/{seen.migration}", ())
    return (seen.run, seen.migration) in says or any(shows.get(one) in says for one in soon)


class Sights:
    """What was seen in one row of the matrix.

    :param daemon: whether a storage daemon of its own has the destination's images.
    :ivar seen: how often what, before anything was recovered; for people.
    """

    def __init__(self, *, daemon=False):
        self.seen = Counter()
        self._pairs = defaultdict(set)
        self._daemon = daemon

    def __str__(self):
        lines = [f"  {often} {what}\n" for what, often in sorted(self.seen.items())]
        never = [f"  {one}\n" for phase in WRITTEN for one in self._never(phase)]
        return f"the sides showed:\n{''.join(lines)}of STATES never:\n{''.join(never)}"

    def _never(self, phase):
        """Yield what `STATES` says of what the journal tells as that phase, and was not seen."""
        for side in Side:
            says = {"/".join(one) for state in told_as(phase) for one in getattr(state, side.value)}
            if missing := says - self._pairs[phase, side]:
                yield f"{phase.value}, {side.value}: {', '.join(sorted(missing))}"

    @contextlib.contextmanager
    def of_recovery(self, struck, *, living=False):
        """Hold what is seen by recoveries of this process meanwhile against what may be.

        :param living: whether the controller has lived, and done something before.
        """
        looks = []
        decide = recover.decide

        def note(phase, source, destination, **more):
            looks.append((phase, source, destination))
            return decide(phase, source, destination, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recover, "decide", note)
            try:
                yield
            finally:
                for number, look in enumerate(looks):
                    begun = living or number > 0 or "two" in struck
                    self.hold(struck, {look[0]}, *look[1:], begun=begun)

    async def look(self, struck, source, destination):
        """Look at both where the controller lives, and hold it against what may be."""
        before = list(journals())
        if len(before) != 1:
            return
        sides = [SimpleNamespace(monitor=vm.control) for vm in (source, destination)]
        try:
            seen = await look_at_both(before[0].record, *sides)
        except StalledError:
            return
        first = before[0].phase
        after = [one.phase for one in journals()] or WRITTEN  # it is over, in whichever
        phases = {first, *(one for one in after if first.before(one))}
        self.hold(struck, phases, *seen, begun=True)

    def hold(self, struck, phases, source, destination, *, begun):
        """See that what was seen may be.

        :param phases: in one of which it was seen; None of who has no journal.
        :param begun: whether somebody was at work on it by then.
        """
        named = "/".join(sorted("no journal" if one is None else one.value for one in phases))
        said = f"{named}: {_brief(source)}; {_brief(destination)}"
        self.seen[f"{said}{', later' * begun}"] += 1
        for side, one in zip(Side, (source, destination), strict=True):
            for phase in phases - {None}:
                self._pairs[phase, side].add(f"{one.run}/{one.migration}")
        if None in phases:
            phases = set(WRITTEN)
        if not begun:
            assert any(in_states(one, source, destination) for one in phases), f"STATES: {said}"
        model = possible(struck, recovered=begun, daemon=self._daemon)
        assert any(
            one.phase in {phase.value for phase in phases}
            and _is(source, one.source, SOURCE, PASSING)
            and _is(destination, one.destination, DESTINATION, PASSING_THERE)
            and (not source.answers or _decided(source) == one.arbiter)
            and (not destination.answers or (_decided(destination) != "") == one.mark)
            for one in model
        ), f"no world of the model: {said}"


def _brief(seen):
    return {Reach.GONE: "gone", Reach.UNREACHABLE: "unreachable"}.get(seen.reach) or str(seen)


def _decided(seen):
    return "" if seen.decided is None else seen.decided.value


def _is(seen, what, shows, passing):
    """Whether a side that was seen may be what the model says."""
    if not seen.answers:
        return seen.reach is Reach.UNREACHABLE or what == GONE
    pair = (seen.run, seen.migration)
    return shows.get(what) == pair or what in passing.get("/".join(pair), ())
