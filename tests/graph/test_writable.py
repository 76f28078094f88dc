"""What speaks against writing to an image, and the remedy that fits why QEMU does not."""

import json

import pytest
from drawing import Drawing, chain

from qmpblock.chains.plan import plan_commit, plan_snapshot, plan_stream
from qmpblock.errors import CommandError, UnsupportedError
from qmpblock.graph.writable import check_disk, check_sound, refusal

READ_ONLY = "Block node is read-only"
FILE = {"driver": "file", "filename": "/i/d1"}


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


@pytest.mark.parametrize(
    ("said", "command", "remedy"),
    [
        (READ_ONLY, [], "its storage node d1-f was given read-only=on"),
        (
            READ_ONLY,
            ["-blockdev", json.dumps({**FILE, "node-name": "d1-f", "read-only": True})],
            "the VM was started with read-only=on for its storage node d1-f",
        ),
        (
            READ_ONLY,
            ["-blockdev", "driver=file,node-name=d1-f,filename=/i/d1,read-only=on"],
            "the VM was started with read-only=on",
        ),
        (
            READ_ONLY,
            ["-blockdev", "driver=file,node-name=d1-f,filename=/i/d1,read-only=off"],
            "was given read-only=on",
        ),
        ("Could not open '/i/d1': Permission denied", [], "give whom QEMU runs as the right"),
        ("Could not open '/i/d1': Operation not permitted", [], "chattr"),
        ("Could not open '/i/d1': Read-only file system", [], "mount it for writing"),
    ],
)
def test_the_remedy_fits_the_cause(said, command, remedy):
    error = refusal(
        CommandError("block-commit", {}, "x", said), layer(chain("d0", "d1"), 1), command
    )
    assert isinstance(error, UnsupportedError)
    assert remedy in error.remedy
    assert said in str(error)
    assert error.standing == "nothing was changed"


@pytest.mark.parametrize(
    ("driver", "remedy"),
    [
        ("nbd", r"NBD client, and the server \(nbd://host/x\) exports it read-only"),
        ("https", "QEMU cannot write by https"),
        ("host_device", "blockdev --getro nbd://host/x"),
    ],
)
def test_the_remedy_fits_the_storage(driver, remedy):
    drawing = chain("d0", "d1")
    drawing.nodes["d1-f"] |= {"drv": driver, "file": "nbd://host/x"}
    error = refusal(CommandError("block-commit", {}, "x", READ_ONLY), layer(drawing, 1), [])
    with pytest.raises(UnsupportedError, match=remedy):
        raise error


def test_another_refusal_keeps_qemus_words():
    said = CommandError("block-commit", {}, "x", "Something else")
    assert refusal(said, layer(chain("d0", "d1"), 1), []) is said
    assert said.standing == "nothing was changed"
