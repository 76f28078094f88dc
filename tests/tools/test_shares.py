"""The shares of the live tests that a run takes: each is of something that is there."""

import runpy
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


@pytest.mark.parametrize("module", EITHER)
def test_what_is_dealt_out_is_there(module):
    assert (LIVE / f"{module}.py").exists()


class Item(NamedTuple):
    nodeid: str
    path: Path


def test_two_qemus_together_run_each_function(monkeypatch):
    monkeypatch.setenv("QMPBLOCK_SEED", "11")
    items = [
        Item(f"{module}.py::test_{number}[{case}]", LIVE / f"{module}.py")
        for module in ("test_wheel", "test_copy_kills", "test_joint")
        for number in range(20)
        for case in range(9)
    ]
    runs = []
    for turn in ("0/2", "1/2"):
        monkeypatch.setenv("QMPBLOCK_TURN", turn)
        left = CONFTEST["_not_sampled"](items)
        runs.append({item.nodeid for item in items if item not in left})

    def functions(run, module):
        return {node.partition("[")[0] for node in run if node.startswith(module)}

    one, other = ({*functions(run, "test_wheel")} for run in runs)
    assert one
    assert other
    assert not one & other
    assert len(one | other) == 20
    for module in ("test_copy_kills", "test_joint"):
        assert [len(functions(run, module)) for run in runs] == [20, 20]
    # A sample is another one on each; what is no sample is whole on each.
    samples = [{node for node in run if node.startswith("test_copy_kills")} for run in runs]
    assert samples[0] != samples[1]
    assert [sum(node.startswith("test_joint") for node in run) for run in runs] == [180, 180]
