"""How an image is opened, told by the block graph. With QEMUs: live/test_opened.py."""

import pytest
from drawing import Drawing

from qmpblock.errors import UnsupportedError
from qmpblock.graph.model import BlockGraph, Edge, Layer, Node
from qmpblock.graph.opened import alone, is_nested, name_suffices, opened

PART = 'json:{"driver": "raw", "offset": 1048576, "size": 4096, "file": {}}'


def node(name, driver, filename="", **more):
    children = tuple(Edge(*pair) for pair in more.pop("children", {}).items())
    return Node(name, driver, filename, 1 << 20, False, children=children, **more)


def file(name):
    return node(name, "file", f"/i/{name}")


def graph(*nodes):
    return BlockGraph({one.name: one for one in nodes}, ())


def leaf(name):
    return {"driver": "file", "filename": f"/i/{name}"}


def there(one):
    return one.filename if one.filename.startswith("/i/") else None


def test_a_chain():
    found = graph(
        node("top", "qcow2", children={"file": "t", "backing": "low"}, backing_filename="x"),
        node("low", "raw", children={"file": "l"}),
        file("t"),
        file("l"),
    )
    assert opened(found, "top", there) == {
        "driver": "qcow2",
        "file": leaf("t"),
        "backing": {"driver": "raw", "file": leaf("l")},
    }


def test_a_path_here_comes_before_what_qemu_calls_it():
    found = graph(node("d", "qcow2", children={"file": "f"}), node("f", "file", "relative"))
    assert opened(found, "d", lambda one: f"/here/{one.name}")["file"]["filename"] == "/here/f"
    with pytest.raises(UnsupportedError, match="no name that leads to relative"):
        opened(found, "d", there)


@pytest.mark.parametrize("name", ["/dev/fdset/3", ""])
def test_what_is_not_there_later(name):
    found = graph(node("d", "qcow2", children={"file": "f"}), node("f", "file", name))
    with pytest.raises(UnsupportedError) as caught:
        opened(found, "d", there)
    assert caught.value.exit_code == 2


def test_a_part_of_a_file():
    found = graph(
        node("d", "qcow2", children={"file": "r"}),
        node("r", "raw", PART, children={"file": "f"}),
        file("f"),
    )
    place = {"driver": "raw", "offset": 1 << 20, "size": 4096, "file": leaf("f")}
    assert opened(found, "d", there) == {"driver": "qcow2", "file": place}
    assert is_nested(opened(found, "d", there))
    assert opened(found, "r", there) == place  # raw as the format of the image
    assert not is_nested(place)


def test_a_raw_node_without_options_and_filters_are_left_out():
    found = graph(
        node("d", "qcow2", children={"file": "t"}),
        node("t", "throttle", children={"file": "r"}),
        node("r", "raw", 'json:{"driver": "raw", "file": {}}', children={"file": "f"}),
        file("f"),
    )
    assert opened(found, "d", there) == {"driver": "qcow2", "file": leaf("f")}


def test_a_data_file():
    found = graph(
        node("d", "qcow2", children={"file": "f", "data-file": "x"}), file("f"), file("x")
    )
    assert opened(found, "d", there)["data-file"] == leaf("x")


def test_a_backing_image_that_is_recorded_and_not_opened():
    found = graph(node("d", "qcow2", children={"file": "f"}, backing_filename="b"), file("f"))
    assert opened(found, "d", there)["backing"] is None


@pytest.mark.parametrize("recorded", [None, "part"])
def test_a_backing_image_in_a_part_of_a_file(recorded):
    """Its options would contradict the name in the header."""
    found = graph(
        node("d", "qcow2", children={"file": "f", "backing": "b"}, backing_filename=recorded),
        node("b", "qcow2", children={"file": "r"}),
        node("r", "raw", PART, children={"file": "f2"}),
        file("f"),
        file("f2"),
    )
    if recorded:
        with pytest.raises(UnsupportedError, match="part of a file"):
            opened(found, "d", there)
    else:
        assert is_nested(opened(found, "d", there)["backing"])


def test_what_is_no_file_is_as_qemu_says():
    found = graph(
        node("d", "raw", children={"file": "n"}),
        node("n", "nbd", 'json:{"driver": "nbd", "export": "x"}'),
        node("e", "raw", children={"file": "m"}),
        node("m", "nbd", "nbd://host/x"),
        node("u", "raw", children={"file": "v"}),
        node("v", "null-co", ""),
    )
    assert opened(found, "d", there)["file"] == {"driver": "nbd", "export": "x"}
    assert opened(found, "e", there)["file"] == {"filename": "nbd://host/x"}
    with pytest.raises(UnsupportedError, match="null-co"):
        opened(found, "u", there)


def test_a_part_that_is_told_as_it_was_written():
    """By a legacy -drive."""
    said = 'json:{"driver": "raw", "offset": "1M", "size": "0x1000", "file": {}}'
    found = graph(node("r", "raw", said, children={"file": "f"}), file("f"))
    place = {"driver": "raw", "offset": 1 << 20, "size": 4096, "file": leaf("f")}
    assert opened(found, "r", there) == place


@pytest.mark.parametrize("said", ['{"driver": "raw", "offset": "1.5M"}', '{"driver": "raw", "off'])
def test_a_part_that_cannot_be_read_is_not_taken_for_the_whole(said):
    found = graph(node("r", "raw", f"json:{said}", children={"file": "f"}), file("f"))
    with pytest.raises(UnsupportedError, match="which part of its file it is cannot be read"):
        opened(found, "r", there)


def test_a_graph_that_goes_in_circles():
    found = graph(node("d", "qcow2", children={"file": "d"}))
    with pytest.raises(UnsupportedError):
        opened(found, "d", there)


def test_alone():
    options = {"driver": "qcow2", "file": leaf("f"), "backing": {"driver": "raw"}}
    assert alone(options) == options | {"backing": None}
    assert alone({"driver": "raw"}) == {"driver": "raw"}


@pytest.mark.parametrize(
    ("filename", "data_file", "recorded", "plain"),
    [
        ("/i/d", None, None, True),
        ("json:{}", None, None, False),
        ("/i/d", "/i/x", "/i/x", True),
        ("/i/d", "/i/x", "x", True),
        ("/i/d", "/i/x", "/i/y", False),
        ("/i/d", "/i/x", None, False),
    ],
)
def test_whether_the_name_suffices(filename, data_file, recorded, plain):
    layer = Layer(
        0,
        node("d", "qcow2", filename, data_filename=recorded),
        file("d"),
        None if data_file is None else node("x", "file", data_file),
    )
    assert name_suffices(layer) is plain


def test_the_data_file_that_the_header_records_comes_from_qemu():
    drawing = Drawing().image("d0")
    drawing.nodes["d0"]["image"]["format-specific"] = {"data": {"data-file": "x"}}
    assert drawing.graph().nodes["d0"].data_filename == "x"
