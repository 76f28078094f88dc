"""What is checked at a job's end. The rest is done to a real QEMU: live/test_streams.py."""

import pytest
from drawing import bitmap, chain, record

from qmpblock.changes.finalize import check_unused
from qmpblock.changes.nodes import check_copy_on_read
from qmpblock.errors import BusyError, UnsupportedError
from qmpblock.qemu.capabilities import Capabilities

LEAVING = record(leaving=(("d1", "/i/d1"), ("d1-f", "/i/d1"), ("gone", "/i/gone")))


def test_a_layer_goes_only_when_nobody_uses_a_bitmap_of_it():
    """QEMU aborts otherwise; an export may have begun to while the job ran."""
    drawing = chain("d0", "d1", "d2")
    check_unused(LEAVING, drawing.graph())
    drawing.nodes["d1"]["dirty-bitmaps"] = [bitmap("a")]
    drawing.nodes["d2"]["dirty-bitmaps"] = [bitmap("stays", busy=True)]
    check_unused(LEAVING, drawing.graph())
    drawing.nodes["d1"]["dirty-bitmaps"].append(bitmap("b\x1b", busy=True))
    with pytest.raises(BusyError, match=r"b\\x1b of d1 .* QEMU aborts"):
        check_unused(LEAVING, drawing.graph())


@pytest.mark.parametrize("version", [(7, 2, 22), (11, 1, 2)])
@pytest.mark.parametrize("subclusters", [True, False])
def test_copy_on_read_into_subclusters(version, subclusters):
    drawing = chain("d0", "d1")
    drawing.nodes["d0"]["image"]["format-specific"] = {
        "type": "qcow2",
        "data": {"extended-l2": subclusters},
    }
    active = drawing.graph().device("vd0").chain.active
    if subclusters and version < (10,):
        with pytest.raises(UnsupportedError, match="subclusters") as caught:
            check_copy_on_read(Capabilities(version), active)
        assert caught.value.standing == "nothing was touched"
    else:
        check_copy_on_read(Capabilities(version), active)
