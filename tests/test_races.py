"""Eve swaps what root goes by, a sample: `make soak` runs thousands of tries of each."""

import os
import shutil

import pytest
from racing import RACES, race, race_naively
from rounds import rounds

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else's deputy"),
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not here"),
]


@pytest.mark.parametrize("name", RACES)
def test_eve_wins_no_race(name):
    run = RACES[name]
    tries, chance = rounds(3 if run.slow else 150)
    score = race(run, tries, chance.getrandbits(32))
    assert (score.tries, score.lost) == (tries, 0), score


@pytest.mark.parametrize("name", RACES)
def test_she_would_win_it_against_a_naive_program(name):
    """Else it shows nothing. Mostly that takes her less than a second."""
    _, chance = rounds(1)
    score = race_naively(RACES[name], chance.getrandbits(32), seconds=60)
    assert score.lost == 1, score
