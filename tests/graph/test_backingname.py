"""By which name a header records the image below: unseen, and where the files can be seen."""

import json
import posixpath

import pytest
from drawing import Drawing
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.errors import UnsupportedError
from qmpblock.graph.backingname import check_found, name_of_base, name_of_frozen
from qmpblock.graph.places import FileId, Missing, Place

# nothing can be seen of the files: by their names


def placed(*files, recorded, base_driver="qcow2"):
    """Draw images at these paths, the active one first; the last but one records `recorded`."""
    drawing = Drawing()
    last = len(files) - 1
    for depth in reversed(range(last + 1)):
        below = f"d{depth + 1}" if depth < last else None
        drawing.image(f"d{depth}", backing=below, file=files[depth])
        if depth == last - 1:
            if recorded is None:
                del drawing.nodes[f"d{depth}"]["image"]["backing-filename"]
            else:
                drawing.nodes[f"d{depth}"]["image"]["backing-filename"] = recorded
    graph = drawing.device("d0").graph()
    chain = graph.device("vd0").chain
    return chain, chain.layers[0], chain.layers[last]


@pytest.mark.parametrize(
    ("files", "recorded", "wanted"),
    [
        # As it was, whatever that was.
        (("/i/top", "/i/mid", "/i/base"), "base", "base"),
        (("/i/top", "/i/mid", "/i/base"), "./base", "./base"),
        (("/i/top", "/i/mid", "/i/base"), "/i/base", "/i/base"),
        (("/i/top", "/i/mid", "/b/base"), "../b/base", "../b/base"),
        (("top", "mid", "base"), "base", "base"),
        # A relative name counts from the directory of whoever records it.
        (("/i/top", "/m/mid", "/m/base"), "base", "/m/base"),
        (("/i/top", "/m/mid", "/b/base"), "../b/base", "/b/base"),
        (("/i/top", "/m/mid", "/b/base"), "/b/base", "/b/base"),
        (("top", "sub/mid", "sub/base"), "base", "sub/base"),
        (("x/top", "sub/mid", "sub/base"), "base", "../sub/base"),
        (("/i/top", "/m/mid", "/m/deep/base"), "deep/base", "/m/deep/base"),
        # Never QEMU's own text.
        (("/i/top", "/i/mid", "/i/base"), 'json:{"driver":"qcow2"}', "/i/base"),
        (("/i/top", "/i/mid", "/i/base"), None, "/i/base"),
        (("/i/top", "/i/mid", "/i/base"), "", "/i/base"),
        # Other protocols have no directories.
        (("/i/top", "/m/mid", "nbd://h/e"), "nbd://h/e", "nbd://h/e"),
        (
            ("/i/top", "/m/mid", "nbd://h:10809/e"),
            "nbd:h:10809:exportname=e",
            "nbd:h:10809:exportname=e",
        ),
        (("/i/top", "/i/mid", "nbd://h/e"), None, "nbd://h/e"),
        (("nbd://h/top", "/i/mid", "/i/base"), "base", "/i/base"),
        # A header that names another image than the one in use: a name given by hand since.
        (("/i/top", "/i/mid", "/new/base"), "base", "/new/base"),
        (("/i/top", "/i/mid", "/new/base"), "/old/base", "/new/base"),
        (("/i/top", "/m/mid", "/new/base"), "base", "/new/base"),
        (("top", "mid", "new/base"), "base", "new/base"),
        (("/i/top", "/i/mid", "nbd://h/e"), "base", "nbd://h/e"),
        (("/i/top", "/i/mid", 'json:{"driver":"x"}'), "base", "base"),  # it cannot be told
        (("/i/top", "/i/mid", "i/base"), "base", "base"),
        (("/i/top", "/i/mid", "/i/./base"), "base", "base"),
    ],
)
def test_the_name_that_is_recorded(files, recorded, wanted):
    assert name_of_base(*placed(*files, recorded=recorded), {}) == wanted


@pytest.mark.parametrize(
    ("files", "recorded"),
    [
        (("/i/top", "/i/mid", 'json:{"driver":"x"}'), None),
        (("/i/top", "/m/mid", 'json:{"driver":"x"}'), 'json:{"driver":"x"}'),
        (("/i/top", "mid", "base"), None),  # relative to where QEMU was started: unknown
        (("/i/top", "mid", "base"), "base"),
    ],
)
def test_without_a_plain_name_nothing_is_recorded(files, recorded):
    with pytest.raises(UnsupportedError, match="no plain file name"):
        name_of_base(*placed(*files, recorded=recorded), {})


paths = st.lists(st.sampled_from(["a", "b", ".."]), max_size=3).map("/".join)


@given(paths, paths, paths)
def test_what_is_recorded_leads_to_the_base(above, via, below):
    """As QEMU looks it up: from the directory of whoever records it."""
    files = [
        posixpath.normpath(f"/i/{place}/{name}")
        for place, name in ((above, "top"), (via, "mid"), (below, "base"))
    ]
    recorded = posixpath.relpath(files[2], posixpath.dirname(files[1]))
    name = name_of_base(*placed(*files, recorded=recorded), {})
    assert posixpath.normpath(posixpath.join(posixpath.dirname(files[0]), name)) == files[2]


# the files can be seen


def place(path, number=0, *, real=None, linked=False, device=False):
    file = FileId(7, None) if device else FileId(1, number)
    return Place(file, path, real or path, path, linked)


def seen(*files, recorded):
    """Draw a chain whose files are where their names say; or where a `Place` does."""
    names = [one if isinstance(one, str) else one.path for one in files]
    found = placed(*names, recorded=recorded)
    places = {
        f"d{n}-f": place(one, n) if isinstance(one, str) else one for n, one in enumerate(files)
    }
    return *found, places


@pytest.mark.parametrize(
    ("files", "recorded", "wanted"),
    [
        # As it was, in one directory.
        (("/i/top", "/i/mid", "/i/base"), "base", "base"),
        (("/i/top", "/i/mid", "/i/base"), "./base", "./base"),
        (("/i/top", "/i/mid", "/b/base"), "../b/base", "../b/base"),
        (("/i/top", "/i/mid", "/i/base"), "/i/base", "/i/base"),
        (("/i/top", "/i/mid", "/i/base"), None, "/i/base"),
        (("/i/top", "/i/mid", "/i/base"), 'json:{"driver":"qcow2"}', "/i/base"),
        # Relative stays relative, from wherever it is recorded.
        (("/i/top", "/m/mid", "/m/base"), "base", "../m/base"),
        (("/i/top", "/i/sub/mid", "/i/sub/base"), "base", "sub/base"),
        (("/i/top", "/m/mid", "/b/base"), "../b/base", "../b/base"),
        (("/i/top", "/m/mid", "/b/base"), "/b/base", "/b/base"),
        # Between real directories: a link's parent is not the name's.
        (
            (place("/l/top", real="/deep/down/top"), "/m/mid", place("/m/base", 2)),
            "base",
            "../../m/base",
        ),
        # Opened by a link into another directory, it has two that a name could count from.
        ((place("/l/top", linked=True), "/m/mid", place("/m/base", 2)), "base", "/m/base"),
        ((place("/m/top", linked=True), "/m/mid", place("/m/base", 2)), "base", "base"),
        # A device is where it is.
        (("/i/top", "/i/mid", place("/dev/x", device=True)), "../dev/x", "/dev/x"),
        (("/i/top", "/i/mid", place("/dev/x", device=True)), "/dev/x", "/dev/x"),
        # Another image than the header names: a name given by hand since.
        (("/i/top", "/i/mid", "/new/base"), "base", "/new/base"),
        (("/i/top", "/i/mid", "/new/base"), "/old/base", "/new/base"),
        # QEMU takes what stands before a colon for a protocol.
        (("/i/top", "/m/mid", "/i/a:b"), "../i/a:b", "./a:b"),
    ],
)
def test_relative_stays_relative(files, recorded, wanted):
    assert name_of_base(*seen(*files, recorded=recorded)) == wanted


@pytest.mark.parametrize(
    ("file", "directory", "relative", "wanted"),
    [
        ("/i/d", "/i", True, "d"),
        ("/i/d", "/o", True, "../i/d"),
        ("/i/d", "/i", False, "/i/d"),
        ("/i/d", None, True, "/i/d"),
        (place("/l/d", real="/i/d"), "/i", True, "d"),
        (place("/l/d", real="/i/d"), "/i", False, "/l/d"),
        (place("/dev/x", device=True), "/dev", True, "/dev/x"),
    ],
)
def test_what_an_overlay_records(file, directory, relative, wanted):
    place_ = place(file) if isinstance(file, str) else file
    graph = Drawing().image("d0", file=place_.path).device("d0").graph()
    active = graph.device("vd0").chain.active
    found = name_of_frozen(active, {"d0-f": place_}, directory, relative=relative)
    assert found == wanted


def test_what_cannot_be_seen_goes_by_its_name():
    unseen = {"d0-f": Missing("cannot be found")}
    for file, wanted in (("/i/d", "../i/d"), ("nbd://h/e", "nbd://h/e")):
        graph = Drawing().image("d0", file=file).device("d0").graph()
        active = graph.device("vd0").chain.active
        assert name_of_frozen(active, unseen, "/o", relative=True) == wanted
    graph = Drawing().image("d0", file="d").device("d0").graph()
    with pytest.raises(UnsupportedError, match="cannot be told"):
        name_of_frozen(graph.device("vd0").chain.active, unseen, "/o", relative=True)


def part(offset, size, file="/i/disk"):
    return "json:" + json.dumps(
        {"driver": "raw", "offset": offset, "size": size, "file": {"filename": file}}
    )


def test_a_part_is_described():
    drawing = Drawing().image("d1", "raw", file="/i/disk", filename=part(512, 1024))
    graph = drawing.image("d0", backing="d1").device("d0").graph()
    chain = graph.device("vd0").chain
    places = {"d1-f": place("/i/disk")}
    wanted = {
        "driver": "raw",
        "offset": 512,
        "size": 1024,
        "file": {"driver": "file", "filename": "/i/disk"},
    }
    for name in (
        name_of_frozen(chain.layers[1], places, "/i", relative=True),
        name_of_base(chain, chain.layers[0], chain.layers[1], places),
    ):
        assert json.loads(name.removeprefix("json:")) == wanted
    with pytest.raises(UnsupportedError, match="no name could be recorded"):
        name_of_base(chain, chain.layers[0], chain.layers[1], {})


def test_a_header_has_no_room_for_more():
    drawing = Drawing().image("d0", "raw", file="/i/disk", filename=part(512, 1024)).device("d0")
    active = drawing.graph().device("vd0").chain.active
    with pytest.raises(UnsupportedError, match="too long"):
        name_of_frozen(active, {"d0-f": place("/i/" + "x" * 1000)}, "/i", relative=True)


def test_what_was_replaced_has_no_name():
    drawing = Drawing().image("d0").image("data", "raw").device("d0")
    drawing.nodes["d0"]["children"].append({"child": "data-file", "node-name": "data-f"})
    active = drawing.graph().device("vd0").chain.active
    gone = Missing("is another file now", certain=True)
    for node in ("d0-f", "data-f"):
        with pytest.raises(UnsupportedError, match="is another file now: who starts the VM"):
            check_found(active, {node: gone})
        check_found(active, {node: Missing("cannot be found")})
    check_found(active, {})
