"""What speaks against writing to an image."""

import pytest
from drawing import Drawing, chain

from qmpblock.chains.plan import plan_commit, plan_snapshot, plan_stream
from qmpblock.errors import UnsupportedError
from qmpblock.graph.writable import check_disk, check_sound


def mark(drawing, node, *, corrupt=False, unclean=False, read_only=True):
    info = drawing.nodes[node]
    info["ro"] = read_only
    info["image"]["dirty-flag"] = unclean
    info["image"]["format-specific"] = {"type": "qcow2", "data": {"corrupt": corrupt}}
    return drawing


def layer(drawing, depth):
    return drawing.graph().device("vd0").chain.layers[depth]


def operations():
    def commit(graph, device):
        plan_commit(graph, device, None, "@1")

    def commit_of_the_middle(graph, device):
        plan_commit(graph, device, "@1", "@2")

    def stream(graph, device):
        plan_stream(graph, device)

    def snapshot(graph, device):
        plan_snapshot(graph, device, "qcow2")

    return [commit, commit_of_the_middle, stream, snapshot]


@pytest.mark.parametrize("plan", operations())
def test_a_disk_for_reading_only_is_not_changed(plan):
    drawing = chain("d0", "d1", "d2")
    graph = drawing.graph()
    plan(graph, graph.device("vd0"))
    drawing.nodes["d0"]["ro"] = True
    graph = drawing.graph()
    with pytest.raises(UnsupportedError, match=r"has vd0 \(/i/d0\) for reading only") as caught:
        plan(graph, graph.device("vd0"))
    assert caught.value.standing == "nothing was touched"
    assert "read-only=off" in caught.value.remedy


def test_a_filter_above_may_be_what_is_read_only():
    drawing = Drawing().image("d0").filter("thr", "throttle", "d0").device("thr")
    check_disk(drawing.graph().device("vd0"))
    drawing.nodes["thr"]["ro"] = True
    with pytest.raises(UnsupportedError, match="for reading only"):
        check_disk(drawing.graph().device("vd0"))


def test_a_corrupt_image_is_not_written():
    drawing = mark(chain("d0", "d1"), "d1", corrupt=True)
    with pytest.raises(UnsupportedError, match=r"@1 /i/d1 .* marked it as corrupt") as caught:
        check_sound(layer(drawing, 1))
    assert "qmpblock stream" in caught.value.remedy
    check_sound(layer(drawing, 0))


def test_an_image_that_was_not_closed_is_not_written_unless_it_is_in_use():
    drawing = mark(chain("d0", "d1"), "d1", unclean=True)
    with pytest.raises(UnsupportedError, match="was not closed") as caught:
        check_sound(layer(drawing, 1))
    assert "qemu-img check -f qcow2 -r all /i/d1" in caught.value.remedy
    check_sound(layer(mark(drawing, "d1", unclean=True, read_only=False), 1))


def test_the_header_of_a_corrupt_image_gets_no_other_backing_file():
    graph = mark(chain("d0", "d1", "d2", "d3"), "d1", corrupt=True).graph()
    with pytest.raises(UnsupportedError, match="@1 /i/d1 must not"):
        plan_commit(graph, graph.device("vd0"), "@2", "@3")
