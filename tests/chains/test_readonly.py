"""A job that QEMU does not start, since its storage is read-only: the remedy fits the cause."""

import json

import pytest
from drawing import chain

from qmpblock.chains.readonly import refusal
from qmpblock.errors import CommandError, UnsupportedError

READ_ONLY = "Block node is read-only"
FILE = {"driver": "file", "filename": "/i/d1"}


def layer(drawing, depth):
    return drawing.graph().device("vd0").chain.layers[depth]


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
