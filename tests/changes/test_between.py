"""An overlay of ours on another layer than its header names: it is to name that, and only then."""

import logging

import pytest
from drawing import RUN, chain, record
from fake_objects import fake_vm

from qmpblock.changes.between import astray, name_below
from qmpblock.changes.nodes import name_below as perform
from qmpblock.changes.step import Choice
from qmpblock.changes.unfinished import steps

OVERLAY, IMAGE, NAME = "/i/d0.t", "/i/d0", "d0"
THEIRS, VIEW = "libvirt-2-format", f"qmpblock-{RUN}-view"
MADE = ((OVERLAY, "d0", IMAGE, NAME),)


def drawn(over="theirs", recorded=NAME, fmt="qcow2"):
    """Draw d0, a snapshot of somebody's over it, and our overlay on one of the two."""
    drawing = chain("d0", "d1").image("theirs", fmt, backing="d0")
    drawing.image(THEIRS, file=OVERLAY, backing=over, recorded=recorded)
    return drawing.device(THEIRS)


def left(drawing, its=None):
    """Return what is to be done of a snapshot by its manager."""
    its = its or record("snapshot by its manager", files=(OVERLAY,), overlays=MADE)
    return [(one.verb, one.what) for one in steps(its, drawing.graph(), Choice.UNDO, [OVERLAY])]


def staging():
    """Return the record of host space for d0, by its manager."""
    said = {"top_file": OVERLAY, "base": "d0", "base_file": IMAGE, "base_format": "qcow2"}
    said |= {"nodes": (VIEW,), "files": (OVERLAY,), "known_as": "vda"}
    return record("allocate by its manager", pivot=True, **said)


WANTED = [("name-below", THEIRS)]


def test_one_that_was_put_on_somebodys_snapshot():
    assert left(drawn()) == WANTED
    [one] = astray(drawn().graph(), MADE)
    assert (one.root, one.over.file, one.under.file) == (THEIRS, OVERLAY, "/i/theirs")
    assert one.can_be_named


def test_also_below_what_was_taken_over_it_since():
    assert left(drawn().image("later", backing=THEIRS).device("later")) == WANTED


@pytest.mark.parametrize(
    "drawing",
    [
        drawn("d0"),
        drawn(recorded="/i/theirs"),  # done before
        drawn(recorded="/i/d1"),  # by somebody else, since
        drawn().device("d0"),  # the guest is back, and it in no chain
        chain("d0", "d1")
        .image("new", file=IMAGE)
        .image(THEIRS, file=OVERLAY, backing="new", recorded=NAME)
        .device(THEIRS),  # the very image, opened anew
        chain("d0", "d1"),
    ],
)
def test_what_is_right_stays(drawing):
    assert list(name_below(drawing.graph(), MADE)) == []
    assert [verb for verb, _ in left(drawing) if verb == "name-below"] == []


def test_an_older_record_says_nothing_of_it():
    assert left(drawn(), record("snapshot by its manager", files=(OVERLAY,))) == []


def test_one_of_an_allocation_that_cannot_come_home():
    """But never while it lies on what of ours was put between for a while."""
    assert left(drawn(), staging()) == WANTED
    over_ours = drawn().image(VIEW).image(THEIRS, file=OVERLAY, backing=VIEW, recorded=NAME)
    assert "name-below" not in {verb for verb, _ in left(over_ours, staging())}


async def sent(tmp_path, drawing):
    """Return what QEMU is asked for."""
    answers = {"change-backing-file": {"return": {}}}
    async with fake_vm(tmp_path / "q", drawing, **answers) as (vm, qemu):
        for one in astray(await vm.graph(), MADE):
            await perform(vm, one)
        return [one["arguments"] for one in qemu.fake.seen if one["execute"] in answers]


async def test_qemu_is_asked_to_name_it(tmp_path):
    [asked] = await sent(tmp_path, drawn())
    assert asked == {
        "device": THEIRS,
        "image-node-name": THEIRS,
        "backing-file": "/i/theirs",
    }


async def test_where_qemu_would_record_another_format_it_is_said_what_to_do(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    assert await sent(tmp_path, drawn(fmt="qed")) == []
    assert "without what was written there" in caplog.text
    assert "qmpblock commit ADDRESS DISK --base @1" in caplog.text
