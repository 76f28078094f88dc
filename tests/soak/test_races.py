"""Eve swaps what root goes by, thousands of times: `make soak`."""

import os

import pytest
from racing import RACES, race
from rounds import rounds

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else's deputy"),
]

_TRIES = 40  # a round; of what runs a program each time, 4


@pytest.mark.parametrize("name", RACES)
def test_eve_wins_no_race(name):
    count, chance = rounds(500)
    run = RACES[name]
    tries = count * (_TRIES // 10 if run.slow else _TRIES)
    score = race(run, tries, chance.getrandbits(32))
    print(name, score)
    assert (score.tries, score.lost) == (tries, 0), score
    if tries >= 400 and name != "listen in hers":
        assert score.refused < tries, "she lets nothing be done"
