"""Who else uses a layer: what each operation changes, and for whom."""

import pytest
from drawing import Drawing, bitmap, chain

from qmpblock.errors import BusyError
from qmpblock.graph.layeruse import check_bitmaps, check_readers, may_go, overlays_of, readers_of

LAYERS = ("d0", "d1", "d2", "d3", "d4")


def refused(drawing, operation, top, base=""):
    graph = drawing.graph()
    try:
        check_readers(graph, graph.device("vd0"), operation, top, base)
    except BusyError as error:
        return str(error)
    return None


@pytest.mark.parametrize("node", [*LAYERS, *(f"{layer}-f" for layer in LAYERS)])
@pytest.mark.parametrize("how", ["export", "job"])
def test_whose_content_a_commit_changes(how, node):
    """Of d1 into d3: d2, which lies between, d3, and the file of that."""
    drawing = chain(*LAYERS)
    if how == "export":
        drawing.export("theirs", node)
    else:
        drawing.job("theirs", "backup", "running", node)
    said = refused(drawing, "commit", "d1", "d3")
    if node in ("d2", "d3", "d3-f"):
        assert f"@{node[1]} /i/{node[:2]} is read by the {how} theirs" in said
    else:
        assert said is None


@pytest.mark.parametrize("node", [*LAYERS, *(f"{layer}-f" for layer in LAYERS)])
def test_a_stream_changes_the_file_that_it_goes_into_and_no_content(node):
    drawing = chain(*LAYERS).export("theirs", node)
    assert (refused(drawing, "stream", "d1") is not None) is (node == "d1-f")
    assert refused(drawing, "stream", "d0") is None  # to that file the guest writes anyway


def test_readers_are_found_through_nodes_that_others_put_on_a_layer():
    drawing = chain("d0", "d1", "d2").filter("slow", "throttle", "d2").filter("on", "raw", "slow")
    drawing.filter("cor", "copy-on-read", "d2-f").export("theirs", "cor")
    graph = drawing.graph()
    device = graph.device("vd0")
    base = device.chain.layers[2]
    found = [use.what for use in readers_of(graph, device, base.nodes)]
    assert found == ["the export theirs", "the node on"]
    assert [use.what for use in overlays_of(graph, device, base)] == ["the node on"]
    assert "blockdev-del" in next(overlays_of(graph, device, base)).remedy


def test_a_filter_in_the_chain_is_no_reader_but_what_works_on_it_is():
    drawing = Drawing().image("d2").filter("cbw", "copy-before-write", "d2")
    drawing.image("d1", backing="cbw", recorded="/i/d2").image("d0", backing="d1").device("d0")
    assert refused(drawing, "commit", "d0", "d2") is None
    drawing.job("theirs", "backup", "running", "cbw")
    assert "the job theirs (backup)" in refused(drawing, "commit", "d0", "d2")


def test_what_is_ours_is_no_reader():
    drawing = chain("d0", "d1").export("qmpblock-deadbeef-0", "d1")
    drawing.job("qmpblock-deadbeef-pivot", "commit", "running", "d1", "d0")
    assert refused(drawing, "commit", "d0", "d1") is None


def test_a_disk_that_has_the_layers_no_more_refuses_nothing():
    drawing = chain("d0", "d1").export("theirs", "d1")
    assert refused(drawing, "commit", "gone", "d1") is None
    assert refused(drawing, "commit", "d0", "gone") is None


def test_a_raw_node_between_an_image_and_its_file_is_its_own():
    """qcow2 over a named raw node: d0 -> r -> d0-f."""
    drawing = Drawing().image("d1").image("d0", backing="d1", under="r")
    drawing.filter("r", "raw", "d0-f").device("d0")
    graph = drawing.graph()
    device = graph.device("vd0")
    active = device.chain.active
    assert [node.name for node in active.nodes] == ["d0", "r", "d0-f"]
    assert active.storage.name == "d0-f"
    assert list(overlays_of(graph, device, active)) == []
    assert graph.device("r") == device
    assert device.chain.layer("r") == active
    assert "r" in device.node_names()


def test_a_node_goes_only_without_bitmaps_in_use():
    drawing = chain("d0", "d1")
    drawing.nodes["d1"]["dirty-bitmaps"] = [bitmap("a")]
    drawing.image("alone", bitmaps=[bitmap("a"), bitmap("b", busy=True)]).image("free")
    graph = drawing.graph()
    assert not may_go(graph, "d1")  # d0 lies on it
    assert not may_go(graph, "alone")
    assert may_go(graph, "free")
    check_bitmaps(graph, ["d0", "d1", "free", "nosuch"])
    with pytest.raises(BusyError, match=r"b of alone .* QEMU aborts") as caught:
        check_bitmaps(graph, ["d1", "alone"], standing="as before")
    assert caught.value.standing == "as before"
    assert caught.value.exit_code == 2
    with pytest.raises(BusyError) as caught:  # at the end of a job
        check_bitmaps(graph, ["d1", "alone"])
    assert caught.value.exit_code == 1
