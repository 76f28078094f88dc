"""What thin allocation refuses by the image's format, and how it tells how far it is.

What it does is shown on a living QEMU: live/test_thin.py, live/test_allocate.py.
"""

from types import SimpleNamespace

import pytest
from drawing import Drawing

from qmpblock.allocation.thin import Report, check_thin
from qmpblock.errors import UnsupportedError
from qmpblock.qemu.capabilities import Capabilities


def disk(fmt, version=(7, 2, 22)):
    """Return as much of a disk as is looked at: an image of a format over another one."""
    graph = Drawing().image("d1").image("d0", fmt, backing="d1").device("d0").graph()
    vm = SimpleNamespace(capabilities=Capabilities(version))
    return SimpleNamespace(vm=vm, chain=graph.device("vd0").chain)


@pytest.mark.parametrize("fmt", ["parallels", "raw", "vdi", "vhdx", "vpc"])
def test_formats_for_which_qemu_does_nothing_are_refused_by_name(fmt):
    with pytest.raises(UnsupportedError, match=f"of a {fmt} image cannot") as caught:
        check_thin(disk(fmt))
    assert caught.value.standing == "nothing was touched"


@pytest.mark.parametrize("fmt", ["qcow", "qcow2", "qed", "vmdk"])
def test_the_others_are_not(fmt):
    check_thin(disk(fmt))


def told(total, done=0, **more):
    """Return a report and what it told."""
    found = []
    return Report(total, done, found.append, **more), found


def test_a_report_adds_up_and_ends_at_its_total():
    """Whatever is added: what the guest discards comes up twice."""
    report, found = told(100, 10)
    for length in (20, 60, 60):
        report.add(length)
    assert [(one.done, one.total) for one in found] == [(30, 100), (90, 100), (100, 100)]
    assert {(one.status, one.phase) for one in found} == {("running", "allocating")}


def test_what_is_left_takes_as_long_as_the_rate_says(monkeypatch):
    clock = iter([100.0, 102.0])
    monkeypatch.setattr("qmpblock.allocation.thin.time.monotonic", lambda: next(clock))
    report, found = told(1000, phase="reserving")
    report.set(0, 1000)
    report.set(400, 1000)
    assert (found[0].rate, found[0].eta, found[0].phase) == (0, None, "reserving")
    assert (found[1].rate, found[1].eta) == (200, 3)


def test_a_total_that_grows_is_told():
    report, found = told(100)
    report.set(50, 100)
    report.set(50, 200)
    assert [one.total for one in found] == [100, 200]


def test_where_nobody_asks_nothing_is_measured(monkeypatch):
    monkeypatch.setattr("qmpblock.allocation.thin.time.monotonic", lambda: 1 / 0)
    Report(100, 0, None).add(10)
