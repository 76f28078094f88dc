"""Options of nodes, and QEMU's command line, where no command tells them."""

import json

import pytest
from drawing import chain
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.graph.options import aio_of, cache_options, overlay_options

FILE = "/i/d0"


def storage():
    return chain("d0", "d1").graph().nodes["d0-f"]


NESTED = {"driver": "qcow2", "node-name": "d0", "file": {"driver": "file", "filename": FILE}}


def with_file(**options):
    return json.dumps(NESTED | {"file": NESTED["file"] | options})


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("-blockdev", with_file(aio="native"), "native"),
        ("--blockdev", with_file(**{"aio": "io_uring", "node-name": "d0-f"}), "io_uring"),
        ("-blockdev", with_file(), None),
        ("-blockdev", with_file(aio="telepathy"), None),
        ("-blockdev", with_file(aio=["native"]), None),
        ("-blockdev", with_file(**{"aio": "native", "node-name": "other"}), None),
        ("-blockdev", with_file(aio="native", filename="/i/other"), None),
        ("-blockdev", with_file(aio="native", driver="host_device"), None),
        ("-blockdev", "driver=file,node-name=d0-f,filename=/x,aio=native", "native"),
        (
            "-blockdev",
            f"driver=qcow2,file.driver=file,file.filename={FILE},file.aio=native",
            "native",
        ),
        ("-blockdev", "a=b,a.c=d,aio=native", None),
        ("-blockdev", "{no json", None),
        ("-drive", f"file={FILE},if=none,id=x,cache=none,aio=native", "native"),
        ("-drive", f"driver=qcow2,file.filename={FILE},file.aio=threads", "threads"),
        ("-drive", f"file={FILE}", None),
        ("-drive", "file=/i/other,aio=native", None),
        ("-drive", "file=/i/d0,,aio=native", None),
        ("-device", "virtio-blk-pci,aio=native", None),
    ],
)
def test_the_aio_that_a_command_line_tells(option, value, expected):
    words = ["qemu", "-S", option, value, "-nodefaults"]
    assert aio_of(words, storage()) == expected


def test_without_a_command_line_nothing_is_known():
    assert aio_of((), storage()) is None
    assert aio_of(("-blockdev",), storage()) is None


@given(st.lists(st.sampled_from(["-blockdev", "-drive"]) | st.text(alphabet='{}",.=a:[]')))
def test_any_command_line_can_be_read(words):
    assert aio_of(words, storage()) is None


def test_an_overlay_is_like_its_image():
    drawing = chain("d0", "d1")
    drawing.nodes["d0"] |= {
        "detect_zeroes": "unmap",
        "cache": {"writeback": True, "direct": True, "no-flush": False},
    }
    like = drawing.graph().nodes["d0"]
    assert cache_options(like) == {"direct": True, "no-flush": False}
    assert overlay_options("t", "t-f", like, "key0", "d0") == {
        "driver": "qcow2",
        "node-name": "t",
        "file": "t-f",
        "backing": "d0",
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "cache": {"direct": True, "no-flush": False},
        "encrypt": {"format": "luks", "key-secret": "key0"},
    }
    assert "encrypt" not in overlay_options("t", "t-f", like, None, None)
