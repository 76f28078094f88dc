"""A name leads back to what is open, or it does not go into a header."""

import json
import os
from contextlib import ExitStack

import pytest
from drawing import Drawing, record

from qmpblock.changes.backingproof import check_made, check_name, check_record
from qmpblock.errors import Error, UnsupportedError
from qmpblock.graph.places import FileId, Missing, Place
from qmpblock.host.openfiles import OpenFiles


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Have three images open: this process stands for QEMU."""
    monkeypatch.setattr(OpenFiles, "is_qemu", True)
    names = ["d0", "d1", "d2"]
    with ExitStack() as stack:
        for name in names:
            (tmp_path / name).write_bytes(name.encode())
            stack.enter_context((tmp_path / name).open())
        drawing, below = Drawing(), None
        for name in reversed(names):
            drawing.image(name, file=str(tmp_path / name), backing=below)
            below = name
        drawing.device("d0")
        yield drawing


def proven(drawing, name, recorder=None):
    graph = drawing.graph()
    files = OpenFiles(os.getpid())
    places = files.places(graph.nodes.values())
    check_name(files, places, name, recorder, graph.device("vd0").chain.layers[1])


def test_names_that_lead_back(opened, tmp_path):
    over = str(tmp_path / "over")
    (tmp_path / "link").symlink_to(tmp_path)
    described = {"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "d1")}}
    for name in (
        "d1",
        "./d1",
        "link/d1",
        str(tmp_path / "d1"),
        str(tmp_path / "link" / "d1"),
        "json:" + json.dumps(described),
    ):
        proven(opened, name, over)
    proven(opened, "d1")  # from where it counts is not known: nothing is claimed of it
    for name in ("d2", "none", str(tmp_path / "d2"), "sub/d1"):
        with pytest.raises(UnsupportedError, match="does not lead to the file"):
            proven(opened, name, over)
    described["file"]["filename"] = str(tmp_path / "d2")
    with pytest.raises(UnsupportedError, match="does not lead"):
        proven(opened, "json:" + json.dumps(described), over)


def test_the_last_look_before_a_job_ends(opened, tmp_path):
    stream = record(keeper="d0", base="d1", backing_name="d1")
    commit = record(operation="commit", pivot=True, base="d1")
    for one in (stream, commit):
        check_record(one, opened.graph(), os.getpid())
    (tmp_path / "d1").rename(tmp_path / "moved")
    for one in (stream, commit):
        with pytest.raises(UnsupportedError, match="who starts the VM by that name"):
            check_record(one, opened.graph(), os.getpid())
        check_record(one, opened.graph(), None)  # over TCP nothing can be looked up
    # An overlay of ours comes home whatever its image is called by now.
    check_record(record(operation="allocate", pivot=True, base="d1"), opened.graph(), os.getpid())
    check_record(record(base="gone"), opened.graph(), os.getpid())


def test_the_overlay_is_the_file_that_was_made():
    place = Place(FileId(1, 2), "/i/over", "/i/over", "/i/over")
    check_made(place, "/i/over", (1, 2))
    check_made(place, "/i/over", None)  # QEMU made it
    check_made(Missing("cannot be seen"), "/i/over", (1, 3))
    with pytest.raises(Error, match="somebody else"):
        check_made(place, "/i/over", (1, 3))
