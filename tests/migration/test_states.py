"""The table of a migration's states holds together, and every state that it tells is decided."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import migrationoutcomes
import pytest
from migrationmodel import DESTINATION, SOURCE, Model, Rules, World
from migrationmodel import GONE as ENDED
from migrationsights import Sights, in_states, possible

from qmpblock.changes.step import Choice
from qmpblock.migration.decision import decide
from qmpblock.migration.states import ORDER, STATES, Move, Phase, Reach, Seen, Side
from qmpblock.qemu.runstate import STOPPED_ITSELF

PAGE = Path(__file__).resolve().parents[2] / "docs/migration.md"
GONE = Seen(Reach.GONE)
SILENT = Seen(Reach.UNREACHABLE)


def seen(shown, decided=None):
    run, migration = shown
    return Seen(Reach.ANSWERS, run, migration, decided)


def shown(states=STATES):
    """Yield each pair of what the two sides show in a state, with the state."""
    for state in states:
        for source in sorted(state.source):
            for destination in sorted(state.destination):
                yield state, seen(source), seen(destination)


def test_there_is_a_state_for_each_phase_in_their_order():
    assert [state.phase for state in STATES] == list(Phase)
    owners = [state.owner for state in STATES]
    assert owners == [Side.SOURCE] * 8 + [Side.DESTINATION]  # it changes once


def test_the_journal_is_ahead_of_what_cannot_be_taken_back():
    moves = [one.move for one in ORDER]
    sending = moves.index(Move.CONTINUE)
    written = [one.enters for one in ORDER[: sending + 1] if one.enters]
    assert written[-1] is Phase.SENT
    assert not ORDER[sending].beside  # what is written beside a move is so before the next one
    assert moves.index(Move.AWAIT_LANDED) < moves.index(Move.CLAIM_DESTINATION)
    # Whoever continues the destination has said before that it was decided so.
    claimed, continued = moves.index(Move.CLAIM_DESTINATION), moves.index(Move.CONT_DESTINATION)
    assert claimed < continued
    assert Phase.HANDED in [one.enters for one in ORDER[claimed + 1 : continued + 1]]
    phases = [one.enters for one in ORDER if one.enters]
    assert phases == [phase for phase in Phase if phase in phases]


def test_the_order_comes_to_every_phase_in_turn():
    begin = [phase for one in ORDER for phase in (one.enters, one.reaches) if phase is not None]
    assert [Phase.CHECKED, *begin] == list(Phase)


def begun(pc):
    """Return the phase that has begun by then; at the last move all is over."""
    done = ORDER if pc < 0 else ORDER[:pc]
    phases = [phase for one in done for phase in (one.enters, one.reaches) if phase is not None]
    return phases[-1] if phases else Phase.CHECKED


def explored():
    """Yield each world that an engine comes to, until it dies and after, with its phase.

    Nothing else fails but what comes with its death, and nobody recovers it.
    """
    model = Model(Rules(pause=True), 0)
    moves = [one.move.name for one in ORDER]
    seen = {(World(), Phase.CHECKED)}
    todo = list(seen)
    while todo:
        world, phase = todo.pop()
        yield model, world, phase
        came = []
        for what, after in model.steps(world):
            kind, _, move = what.partition(": ")
            if kind == "late":
                then = begun(moves.index(move) + 1)
                came.append((after, then if phase.before(then) else phase))
            elif kind == "engine" and not after.finished:
                came.append((after, begun(after.pc) if after.pc != world.pc else phase))
            elif kind in ("lost", what) and not what.startswith(("with", "engine gives up")):
                came.append((after, phase))
        for what, after in model.failing(world):
            if "engine killed" in what or ("cut" in what and world.pc < 0):
                came.append((after, phase))
        todo += set(came) - seen
        seen.update(came)


#: What a phase begins with, of what the source shows: it is so before the engine hears of it, or
#: once what it says by then has been done.
BEGINS = {(Phase.MEMORY, "held"): Phase.HELD, (Phase.SENT, "held"): Phase.ENDED}


#: What a side shows for a moment, or of an earlier migration: the model has no word of its own.
ALSO = {
    "home": {("running", how) for how in ("failed", "cancelled", "completed")},
    "home, stands": {("paused", how) for how in ("failed", "cancelled", "completed")},
    "active": {("running", "setup")},
    "active, stands": {("paused", "setup")},
    "waits": {("inmigrate", "setup")},
}


def reached():
    """Return what the two sides show in each phase, by the model."""
    found = defaultdict(set)
    for model, world, phase in explored():
        state = BEGINS.get((phase, world.source), phase)
        there = world.destination
        if there == "comes" and world.source == "home":  # it was told to, and is sent nothing
            there = "waits"
        for side, shows, shown in (
            (Side.SOURCE, SOURCE, model._shown(world)),
            (Side.DESTINATION, DESTINATION, (there,)),
        ):
            for one in shown:
                if one != ENDED:
                    found[state, side] |= {shows[one], *ALSO.get(one, ())}
    return found


@pytest.mark.parametrize("side", Side)
def test_the_table_says_what_the_model_comes_to_and_no_more(side):
    """As an engine goes on, and stays where it dies: phase by phase."""
    found = reached()
    for state in STATES:
        assert found[state.phase, side] == getattr(state, side.value), state.phase


def test_what_the_model_comes_to_a_kill_matrix_may_see():
    """When a controller dies, or anybody with it, and before anybody has seen it."""
    for struck in ("controller", "controller, source", "controller, destination", "all"):
        for one in possible(struck, recovered=False):
            here, there = (
                GONE if what == ENDED else seen(shows[what])
                for shows, what in ((SOURCE, one.source), (DESTINATION, one.destination))
            )
            assert in_states(Phase(one.phase), here, there), one


def test_what_a_side_that_hangs_was_sent_may_be_done_late():
    """The mark, say, of which the journal tells: whoever comes next may look before."""
    away = seen(("postmigrate", "completed"), Side.DESTINATION)
    there = seen(("paused", "completed"))
    Sights().hold("destination hangs", {Phase.HANDED}, away, there, begun=True)


def test_a_source_may_go_on_before_it_says_that_it_failed():
    going = seen(("running", "device"))
    Sights().hold("destination", {Phase.SENT}, going, GONE, begun=True)
    assert decide(Phase.SENT, going, GONE).move is Move.SETTLE


@pytest.mark.parametrize(
    ("phase", "here", "there", "words"),
    [
        (Phase.MEMORY, "running/none", "paused/completed", "STATES"),
        (Phase.MEMORY, "running/active", "inmigrate/none", "no world"),
        (Phase.MIRRORING, "running/none", "inmigrate/active", "STATES"),
        (Phase.HANDED, "postmigrate/completed", "running/completed", "no world"),  # no arbiter
    ],
    ids=str,
)
def test_what_the_sides_of_a_kill_matrix_must_not_show(phase, here, there, words):
    sides = [seen(tuple(one.split("/"))) for one in (here, there)]
    with pytest.raises(AssertionError, match=words):
        Sights().hold("controller", {phase}, *sides, begun=False)


@pytest.mark.parametrize("choice", Choice)
def test_who_owns_in_a_state_is_who_the_table_says(choice):
    for state, source, destination in shown():
        if state.phase is Phase.HANDED:
            source = seen((source.run, source.migration), Side.DESTINATION)
        decision = decide(state.phase, source, destination, choice=choice)
        assert not decision.ask, (state.phase, decision)
        assert decision.owner is state.owner, (state.phase, source, destination, decision)


def test_without_a_journal_the_two_sides_tell_the_same():
    for state, source, destination in shown():
        if state.phase is Phase.HANDED:
            continue  # of which the arbiter tells
        assert (
            decide(None, source, destination).move is decide(state.phase, source, destination).move
        )


@pytest.mark.parametrize("lost", [GONE, SILENT])
def test_a_source_that_is_lost(lost):
    """Until the rest was sent it owns the guest; then only what was written down tells."""
    for state in STATES:
        for there in state.destination:
            decision = decide(state.phase, lost, seen(there))
            if state.phase is Phase.HANDED or there == ("running", "completed"):
                assert decision.owner is Side.DESTINATION
            elif there == ("paused", "completed"):
                assert decision.ask
                assert decision.owner is None
            else:
                assert (decision.owner, decision.move) == (Side.SOURCE, Move.QUIT_DESTINATION)


def test_a_mark_tells_where_the_source_is_lost():
    waiting = ("paused", "completed")
    assert decide(None, SILENT, seen(waiting)).ask
    marked = decide(None, SILENT, seen(waiting, Side.DESTINATION))
    assert marked.move is Move.CONT_DESTINATION


def test_a_completed_source_is_not_continued_where_the_destination_cannot_be_seen():
    away = seen(("postmigrate", "completed"))
    for phase in (None, *Phase):
        assert decide(phase, away, SILENT).ask
        assert decide(phase, away, SILENT, force=Side.SOURCE).move is Move.CLAIM_SOURCE
        assert decide(phase, away, GONE).move is Move.CLAIM_SOURCE
        # Nor one that was handed over, whatever became of the destination.
        handed = seen(("postmigrate", "completed"), Side.DESTINATION)
        assert decide(phase, handed, SILENT, force=Side.SOURCE).ask
        assert decide(phase, handed, GONE).ask
        assert decide(phase, handed, GONE, force=Side.SOURCE).move is Move.CONT_SOURCE


@pytest.mark.parametrize(
    "shown", ["paused/none", "paused/failed", "paused/cancelled", "postmigrate/failed"]
)
def test_a_guest_that_the_migration_paused_goes_on(shown):
    """When the destination has ended, which goes first; one that somebody else stopped does not."""
    run, _, migration = shown.partition("/")
    ours = Seen(Reach.ANSWERS, run, migration, paused=True)
    waits = seen(("inmigrate", "active"))
    assert decide(None, ours, waits).move is Move.QUIT_DESTINATION
    for lost in (GONE, SILENT):
        decision = decide(None, ours, lost)
        assert (decision.owner, decision.move) == (Side.SOURCE, Move.CONT_SOURCE)
        assert not decision.last
        assert decide(None, replace(ours, run="running"), lost).last
        assert decide(None, replace(ours, paused=False), lost).move is Move.FINISH_SOURCE
    assert decide(None, ours, seen(("running", "completed"))).ask
    assert decide(None, replace(ours, migration="cancelling"), waits).move is Move.SETTLE
    assert str(ours) == f"{shown}, paused by us"


STOPPED = "stopped as it was"


@pytest.mark.parametrize("known", ["source", "destination", "journal"])
def test_a_guest_that_somebody_else_stopped_is_continued_nowhere(known):
    """Whoever says so: all that is left is to be cleaned up."""

    def decided(source, destination, **more):
        if known == "journal":
            more["stopped"] = True
        elif known == "source":
            source = replace(source, stopped=True)
        else:
            destination = replace(destination, stopped=True)
        return decide(Phase.HANDED, source, destination, **more)

    away, there = seen(("postmigrate", "completed")), seen(("paused", "completed"))
    marked = replace(there, decided=Side.DESTINATION)
    over = decided(replace(away, decided=Side.DESTINATION), marked)
    assert (over.owner, over.move) == (Side.DESTINATION, Move.FINISH_DESTINATION)
    assert over.last
    assert STOPPED in over.why
    unmarked = decided(replace(away, decided=Side.DESTINATION), there)
    assert (unmarked.move, unmarked.last) == (Move.MARK, False)
    assert decided(replace(away, decided=Side.SOURCE), there).move is Move.QUIT_DESTINATION
    for side, force in ((Side.SOURCE, None), (Side.DESTINATION, Side.SOURCE)):
        home = decided(replace(away, decided=side), GONE, force=force)
        assert (home.owner, home.move, home.last) == (Side.SOURCE, Move.FINISH_SOURCE, True)
    assert decided(GONE, marked).move is Move.FINISH_DESTINATION
    assert str(replace(away, stopped=True)) == "postmigrate/completed, stopped before"


@pytest.mark.parametrize("state", sorted(STOPPED_ITSELF))
def test_a_guest_that_stopped_itself_is_no_guest_that_was_continued(state):
    """As what it stands at the destination it came, where it is known that it had stopped (F42)."""
    away, there = Seen(Reach.ANSWERS, "postmigrate", "completed"), seen((state, "completed"))
    knows = replace(away, stopped=True)
    assert decide(Phase.SENT, knows, there).move is Move.CLAIM_SOURCE
    onward = decide(Phase.SENT, knows, there, choice=Choice.CONTINUE)
    assert onward.move is Move.CLAIM_DESTINATION
    for source in (
        seen((state, "failed")),
        replace(seen(("postmigrate", "failed")), stopped=True),
    ):
        assert decide(Phase.SENT, source, there).move is Move.QUIT_DESTINATION
        assert decide(Phase.SENT, source, GONE).move is Move.FINISH_SOURCE
    # Else somebody may have continued it there, before it stopped.
    assert decide(Phase.SENT, away, there).move is Move.CLAIM_DESTINATION
    over = decide(Phase.SENT, replace(away, decided=Side.DESTINATION), there)
    assert (over.owner, over.move) == (Side.DESTINATION, Move.FINISH_DESTINATION)


def test_a_storage_daemon_ends_when_the_guest_is_home_and_before_anything_else():
    """Whatever else is to be done; and the guest does not wait for one that cannot be ended."""
    homeward = {
        *(Move.CANCEL, Move.SETTLE, Move.CLAIM_SOURCE, Move.QUIT_DESTINATION, Move.CONT_SOURCE)
    }
    for state, source, destination in shown():
        for one in (source, GONE, SILENT):
            plain = decide(state.phase, one, destination)
            served = decide(state.phase, one, destination, images=Reach.ANSWERS)
            stays = plain.move in homeward and not plain.last
            assert served.move is (plain.move if stays else Move.END_IMAGES)
            assert served.owner is plain.owner
    held = seen(("finish-migrate", "pre-switchover")), seen(("inmigrate", "active"))
    assert decide(Phase.HELD, *held, images=Reach.ANSWERS).move is Move.CANCEL


def test_what_a_person_says_ends_it_where_both_are_gone():
    for side in Side:
        decision = decide(Phase.SENT, GONE, GONE, force=side)
        assert (decision.owner, decision.last) == (side, True)
    assert decide(Phase.HANDED, GONE, GONE, force=Side.SOURCE).ask
    assert decide(Phase.HANDED, GONE, GONE, force=Side.DESTINATION).last


def test_the_two_choices_where_both_are_safe():
    landed = seen(("postmigrate", "completed")), seen(("paused", "completed"))
    assert decide(Phase.SENT, *landed).move is Move.CLAIM_SOURCE
    forward = decide(Phase.SENT, *landed, choice=Choice.CONTINUE)
    assert forward.move is Move.CLAIM_DESTINATION
    # Somebody else had the source go on before the mirrors had ended: the images are not whole.
    early = decide(Phase.MEMORY, *landed, choice=Choice.CONTINUE)
    assert early.move is Move.CLAIM_SOURCE


def test_two_that_run_are_nobodys_to_decide():
    for arbiter in (None, *Side):
        for force in (None, *Side):
            decision = decide(
                None,
                seen(("running", "failed"), arbiter),
                seen(("running", "completed")),
                force=force,
            )
            assert decision.move is None
            assert "stop" in decision.ask


@pytest.mark.parametrize(
    "strange", [("inmigrate", "none"), ("running", "postcopy-active"), ("colo", "colo"), ("", "")]
)
def test_a_source_that_is_none_is_not_touched(strange):
    decision = decide(None, seen(strange), seen(("paused", "completed")))
    assert decision.move is None
    assert decision.ask


def shows(pairs):
    """Say what a side shows, as the page does."""
    return "<br>".join(f"`{run}/{migration}`" for run, migration in sorted(pairs))


def table_of_states():
    head = "| state | owner | the source shows | the destination shows | the way back |\n"
    rows = [
        f"| `{state.phase.value}` | {state.owner.value} | {shows(state.source)} | "
        f"{shows(state.destination)} | {state.back} |\n"
        for state in STATES
    ]
    return head + "|---|---|---|---|---|\n" + "".join(rows)


AWAY, THERE = ("postmigrate", "completed"), ("paused", "completed")
ASKED = [
    (Phase.SENT, seen(AWAY), SILENT),
    (Phase.HANDED, seen(AWAY, Side.DESTINATION), GONE),
    (Phase.HANDED, seen(AWAY, Side.DESTINATION), SILENT),
    (Phase.SENT, GONE, seen(THERE)),
    (Phase.SENT, SILENT, seen(THERE)),
    (Phase.SENT, GONE, GONE),
    (Phase.HANDED, GONE, GONE),
    (Phase.SENT, seen(("running", "failed")), seen(("running", "completed"))),
]


def table_of_questions():
    rows = []
    for phase, source, destination in ASKED:
        decision = decide(phase, source, destination)
        assert decision.move is None
        rows.append(
            f"| `{phase.value}` | {source} | {destination} | {decision.why} | {decision.ask} |\n"
        )
    head = "| journal | source | destination | so | find out, and do |\n|---|---|---|---|---|\n"
    return head + "".join(rows)


@pytest.mark.parametrize(
    "table",
    [
        table_of_states,
        table_of_questions,
        migrationoutcomes.table,
        migrationoutcomes.table_of_interrupted,
    ],
)
def test_the_page_has_what_the_code_has(table):
    """Prints what belongs into the page where it does not stand there."""
    assert table() in PAGE.read_text(encoding="utf-8"), table()
