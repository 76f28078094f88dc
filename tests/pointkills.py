"""Kill matrices of points in time: the operations, for `killing.Matrix`."""

import pytest
from killing import CHAIN, IOTHREAD, TWO, Operation


class Point(Operation):
    """One way of `VM.point_in_time`, or of what is made of it; it changes nothing."""

    @property
    def runs_a_job(self):
        return False

    @property
    def moves(self):
        """Never: all that it makes is in nobody's way."""
        return False


_CHAIN = (("d0-3.qcow2", "d0-2.qcow2", "d0-1.qcow2", "d0-0.raw"),)
_ONE = {"do": "point", "disks": ["vd0"]}
_TRUE = {"do": "export", "words": ["true"]}
_CAT = {"do": "export", "words": ["sh", "-c", "cat > /dev/null"]}
_THROTTLED = CHAIN.format(attach="attach: {filters: [throttle]}\n")
_NEEDS = pytest.mark.needs_qemu(">= 10.0", reason="K1: one that goes away would end QEMU")

POINTS = [
    Point("point", CHAIN.format(attach=""), _ONE, _CHAIN),
    Point("point-throttled", _THROTTLED, _ONE, _CHAIN),
    Point(
        "point-of-two",
        TWO.format(),
        {"do": "point", "disks": ["vd0", "vd1"]},
        (("d0-1.qcow2", "d0-0.raw"), ("d1-0.qcow2",)),
    ),
    Point("export", CHAIN.format(attach=""), {**_ONE, **_TRUE, "stdin": False}, _CHAIN),
    Point("export-stdin", CHAIN.format(attach=""), {**_ONE, **_CAT, "stdin": True}, _CHAIN),
    pytest.param(
        Point("point-iothread", CHAIN.format(attach=IOTHREAD), _ONE, _CHAIN), marks=_NEEDS
    ),
]
