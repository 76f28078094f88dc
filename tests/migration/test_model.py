"""Whatever happens, in whatever order: one owner, or a person is asked; never two, never none."""

from dataclasses import replace

import pytest
from migrationmodel import BOTH, Found, Model, Recoverer, Rules, World

from qmpblock.migration.states import ORDER, Move

FAILURES = 3

BEFORE_COMPLETED = tuple(one for one in ORDER if one.move is not Move.AWAIT_LANDED)
UNWRITTEN = tuple(replace(one, enters=None) for one in ORDER)
SERVED = tuple(one for one in ORDER if one.move is not Move.UNEXPORT)
UNMIRRORED = tuple(one for one in ORDER if one.move is not Move.END_MIRRORS)


def test_every_way_ends_with_one_owner_or_with_a_question():
    explored = Model(Rules(), FAILURES).explore()
    print(f"{explored.states} states, {explored.ends} ends, in {explored.asked} a person is asked")
    assert explored.states > 100_000  # or most of it was never seen
    assert 0 < explored.asked < explored.ends


def test_a_storage_daemon_is_one_more_that_dies_or_hangs():
    explored = Model(Rules(daemon=True), FAILURES - 1).explore()
    assert explored.states > 20_000
    assert 0 < explored.asked < explored.ends


def test_a_guest_that_the_migration_paused_goes_on():
    explored = Model(Rules(pause=True), FAILURES - 1).explore()
    print(explored)
    assert explored.states > 20_000
    assert 0 < explored.asked < explored.ends


@pytest.mark.parametrize("itself", [False, True], ids=["somebody", "itself"])
def test_a_guest_that_had_stopped_stays_so(itself):
    """Somebody else had stopped it, or it had stopped itself."""
    explored = Model(Rules(halts=True, itself=itself), FAILURES - 1).explore()
    print(explored)
    assert explored.states > 20_000
    assert 0 < explored.asked < explored.ends


def test_without_a_failure_no_person_is_asked_who_reaches_both_sides():
    """Nor after the death of a controller, or of what it had sent."""
    asked = []

    class Controllers(Model):
        def failing(self, world):
            for what, after in super().failing(world):
                if "killed" in what or "cut" in what or "silent" in what:
                    yield what, after

        def wrong(self, world):
            if "asked" in (world.with_journal.at, world.without.at):
                asked.append(world)
            return super().wrong(world)

        def _recovery(self, world, name):
            for what, after in super()._recovery(world, name):
                one = getattr(after, name)
                if one.reaches in ("", BOTH):
                    yield what, after

    Controllers(Rules(), 2).explore()
    # The destination ended, as a QEMU does whose migration fails, once it had been decided for.
    assert all(world.destination == "gone" and world.arbiter == "destination" for world in asked)


@pytest.mark.parametrize(
    ("without", "failures", "words"),
    [
        ({"minus_s": False}, 1, "the guest runs twice"),
        ({"return_path": False}, 1, "has not got the guest"),
        ({"arbiter": False}, 2, "the guest runs"),
        ({"order": BEFORE_COMPLETED}, 0, "nobody runs"),
        ({"wait_for_source": False}, 1, "the guest runs"),
        ({"order": UNMIRRORED}, 0, "images that are not whole"),
        ({"order": SERVED, "daemon": True}, 0, "images that another process writes to"),
        ({"order": UNWRITTEN}, 3, "it is said to be the source's"),
        ({"pause": True, "marked": False}, 1, "nobody runs"),
        ({"halts": True, "says": False}, 1, "somebody had stopped"),
        ({"halts": True, "writes": False}, 2, "somebody had stopped"),
        ({"halts": True, "marks": False}, 2, "somebody had stopped"),
        ({"halts": True, "claims": False}, 1, "somebody had stopped"),
        ({"halts": True, "itself": True, "says": False}, 0, "asked what can be told"),
    ],
    ids=str,
)
def test_whatever_is_left_out_is_missed(without, failures, words):
    """The exploration finds what each rule is for, so it would find that one is broken."""
    with pytest.raises(Found) as found:
        Model(replace(Rules(), **without), failures).explore()
    print(found.value)
    assert words in str(found.value).splitlines()[0]


def test_what_the_model_says_of_a_world():
    model = Model(Rules(), 0)
    fine = World(source="away", destination="runs", whole=True, loaded=True, ran=True)
    assert model.wrong(fine) == ""
    assert "twice" in model.wrong(fine._replace(source="failed"))
    assert "after" in model.wrong(fine._replace(source="failed", destination="gone"))
    assert "another process" in model.wrong(fine._replace(daemon="alive"))
    assert "whole" in model.wrong(fine._replace(whole=False))
    assert "asked" in model.wrong(fine._replace(without=Recoverer("needless")))
    held = World(source="held", destination="gone", with_journal=Recoverer("done", BOTH))
    assert "nobody runs" in model.wrong_at_the_end(held)
    assert model.wrong_at_the_end(held._replace(with_journal=Recoverer("asked"))) == ""
