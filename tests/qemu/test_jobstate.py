"""Job statuses and verbs: the rules in the module's docstring, and QEMU's own tables."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.qemu import jobstate
from qmpblock.qemu.jobstate import ACTIVE, ENDED, GONE, TRANSITIONS, VERBS, allows, may_follow

# job.c's tables, a column a status, in its order; the same in 7.2 and in 11.1. Column C of
# row R says whether a job may go from R to C, or whether verb R is accepted in status C.
STATUSES = (
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
)
JOB_STT = {
    "undefined": "01000000000",
    "created": "00100000101",
    "running": "00011010100",
    "paused": "00100000000",
    "ready": "00000110100",
    "standby": "00001000000",
    "waiting": "00000001100",
    "pending": "00000000110",
    "aborting": "00000000110",
    "concluded": "00000000001",
    "null": "00000000000",
}
JOB_VERB_TABLE = {
    "cancel": "01111111000",
    "pause": "01111100000",
    "resume": "01111100000",
    "set-speed": "01111100000",
    "complete": "00001100000",
    "finalize": "00000001000",
    "dismiss": "00000000010",
}
statuses = st.sampled_from(STATUSES)


def named(row):
    return {status for status, bit in zip(STATUSES, row, strict=True) if bit == "1"}


@pytest.mark.parametrize("status", STATUSES)
def test_transitions_are_qemus(status):
    assert TRANSITIONS[status] == named(JOB_STT[status])


@pytest.mark.parametrize("verb", sorted(JOB_VERB_TABLE))
def test_verbs_are_qemus(verb):
    assert {status for status in STATUSES if allows(status, verb)} == named(JOB_VERB_TABLE[verb])


def test_there_are_no_other_statuses_or_verbs():
    assert set(TRANSITIONS) == set(STATUSES)
    assert set(VERBS) == set(JOB_VERB_TABLE)


@pytest.mark.parametrize("status", STATUSES)
def test_every_status_is_reached_and_ends(status):
    assert may_follow("undefined", status)
    assert may_follow(status, GONE)


def test_the_drawing_names_every_status_and_no_other():
    drawing = jobstate.__doc__.partition("::")[2].partition("Two rules")[0]
    known = set(STATUSES) - {"undefined", GONE}
    assert known <= set(re.findall(r"[a-z]+", drawing))


def test_what_may_be_taken_back_is_what_can_be_cancelled_before_the_end_is_prepared():
    assert {status for status in STATUSES if allows(status, "cancel")} == ACTIVE | {
        "waiting",
        "pending",
    }
    assert not ACTIVE & ENDED
    assert not any(allows(status, "cancel") for status in ENDED)


def test_nothing_final_happens_before_pending():
    """The second rule: no way leads from work to success that does not pass `pending`."""
    without = {before: after - {"pending", "aborting"} for before, after in TRANSITIONS.items()}
    todo, seen = ["running"], {"running"}
    while todo:
        for status in without[todo.pop()] - seen:
            seen.add(status)
            todo.append(status)
    assert "concluded" not in seen


@pytest.mark.parametrize("before", sorted(ENDED))
@pytest.mark.parametrize("after", sorted(ACTIVE | {"waiting", "pending"}))
def test_there_is_no_way_back_from_the_end(before, after):
    assert not may_follow(before, after)


@given(statuses)
def test_a_status_may_stay(status):
    assert may_follow(status, status)


@given(statuses, statuses, statuses)
def test_following_is_transitive(first, second, third):
    if may_follow(first, second) and may_follow(second, third):
        assert may_follow(first, third)


@given(st.data(), statuses)
def test_every_walk_is_a_following(data, start):
    """Between two looks a job may go any number of steps."""
    now = start
    for _ in range(data.draw(st.integers(0, 8))):
        if not TRANSITIONS[now]:
            break
        now = data.draw(st.sampled_from(sorted(TRANSITIONS[now])))
    assert may_follow(start, now)


@given(st.text(max_size=12).filter(lambda text: text not in STATUSES))
def test_an_unknown_status_allows_nothing_and_leads_nowhere(status):
    """A newer QEMU may have one."""
    assert not any(allows(status, verb) for verb in VERBS)
    assert may_follow(status, status)
    assert not any(may_follow(status, known) for known in STATUSES)


def test_an_unknown_verb_is_our_mistake():
    with pytest.raises(KeyError):
        allows("running", "explode")
