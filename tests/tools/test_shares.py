"""The shares of the live tests that a run takes: each is of something that is there."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

LIVE = Path(__file__).parents[1] / "live"
CONFTEST = runpy.run_path(str(LIVE / "conftest.py"))
SHARES, EITHER = CONFTEST["SHARES"], CONFTEST["EITHER"]


@pytest.mark.parametrize("name", SHARES)
def test_what_is_sampled_is_there(name):
    """A test that is renamed would run whole, and nobody would see it but the clock."""
    module, _, function = name.partition("::")
    assert f"def {function}" in (LIVE / f"{module}.py").read_text()


@pytest.mark.parametrize("name", SHARES)
def test_a_share_is_a_part(name):
    assert 0 < SHARES[name] < 1


@pytest.mark.parametrize("name", EITHER)
def test_what_is_dealt_out_is_there(name):
    module, _, function = name.partition("::")
    assert f"def {function}" in (LIVE / f"{module}.py").read_text()


class Item(NamedTuple):
    """What is asked of a test here.

    :ivar bound: whether it says itself on which QEMUs it runs.
    """

    nodeid: str
    path: Path
    bound: bool = False

    def iter_markers(self, name: str) -> Iterator[str]:
        assert name == "needs_qemu"
        return iter([name] * self.bound)


@pytest.mark.parametrize("seed", ["11", "12"])
def test_two_qemus_together_run_each_function(seed, monkeypatch):
    """Cases, and what is the same on each, on one of them; all else on both."""
    monkeypatch.setenv("QMPBLOCK_SEED", seed)
    monkeypatch.setitem(
        CONFTEST["_not_sampled"].__globals__, "EITHER", (*EITHER, "test_points::test_7")
    )
    cases = {"test_wheel": 1, "test_copy_kills": 15, "test_joint": 3, "test_points": 1}
    items = [
        Item(f"{module}.py::test_{number}[{case}]", LIVE / f"{module}.py")
        for module, count in cases.items()
        for number in range(20)
        for case in range(count)
    ]
    runs = []
    for turn in ("0/2", "1/2"):
        monkeypatch.setenv("QMPBLOCK_TURN", turn)
        left = CONFTEST["_not_sampled"](items)
        runs.append({item for item in items if item not in left})
    one, other = runs
    assert one & other == {
        item for item in items if item.path.stem == "test_points" and "test_7" not in item.nodeid
    }
    functions = {item.nodeid.partition("[")[0] for item in items}
    assert {item.nodeid.partition("[")[0] for item in one | other} == functions
    taken = [item for item in one | other if item.path.stem == "test_copy_kills"]
    assert len(taken) == 20 * round(SHARES["test_copy_kills"] * 15)
    assert {item for item in items if item.path.stem == "test_joint"} <= one | other
    # Neither has all the work.
    assert all(len(run & {i for i in items if i.path.stem == "test_wheel"}) > 3 for run in runs)


def test_what_is_for_some_qemus_alone_is_not_dealt_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would be skipped there, and run nowhere."""
    path = LIVE / "test_wheel.py"
    items = [Item(f"test_wheel.py::test_{number}", path, number % 2 == 0) for number in range(40)]
    items += [Item(f"test_wheel.py::test_it[{case}]", path, case % 2 == 0) for case in range(40)]
    for turn in ("0/2", "1/2"):
        monkeypatch.setenv("QMPBLOCK_TURN", turn)
        monkeypatch.setenv("QMPBLOCK_SEED", "11")
        left = CONFTEST["_not_sampled"](items)
        assert left
        assert not any(item.bound for item in left)
