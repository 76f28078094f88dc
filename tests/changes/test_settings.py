"""What gives nodes back what they had, and in which order QEMU takes it."""

import pytest
from drawing import chain

from qmpblock.changes.settings import check_settings, discard_and_zeroes_of, zeroes_of
from qmpblock.versioned import UnreadableError


def given(discard, zeroes, node="d0"):
    found = chain("d0").device("d0").graph()
    steps = discard_and_zeroes_of(found, node, discard, zeroes, "why")
    return [(step.verb, step.what, step.to) for step in steps]


def test_unmapped_zeros_are_taken_beside_discard_only():
    discard, zeroes = ("restore-discard", "d0", "unmap"), ("restore-zeroes", "d0", "unmap")
    assert given("unmap", "unmap") == [discard, zeroes]
    assert given("ignore", "on") == [
        ("restore-zeroes", "d0", "on"),
        ("restore-discard", "d0", "ignore"),
    ]


def test_what_is_so_or_gone_or_not_wanted_is_left():
    assert given("", "off") == []
    assert given("unmap", "on", "gone") == []
    assert given("unmap", "") == [("restore-discard", "d0", "unmap")]
    assert list(zeroes_of(chain("d0").device("d0").graph(), "d0", "", "why")) == []


@pytest.mark.parametrize(
    "words", [("all", "", ""), ("", "most", ""), ("", "", '{"filename": "x"}'), ("on;quit", "", "")]
)
def test_no_other_word_comes_to_a_command_line(words):
    with pytest.raises(UnreadableError):
        check_settings(*words)


def test_what_may_stand_there():
    for zeroes in ("", "off", "on", "unmap"):
        for discard in ("", "ignore", "unmap"):
            check_settings(zeroes, discard, "")
