"""A copy of a disk that is frozen below an overlay of ours: how it ends, whoever ends it."""

import pytest
from drawing import bitmap, chain
from journaling import RUN, record

from qmpblock.changes.homing import FrozenCopy, ManagersStaging, StagedCommit
from qmpblock.changes.step import Choice
from qmpblock.changes.unfinished import steps
from qmpblock.names import (
    copy_job,
    export_name,
    left_bitmap,
    overlay_node,
    paused_node,
    pivot_job,
    storage_node,
    target_node,
)

T, TO = overlay_node(RUN, 0), target_node(RUN, 0)
OVERLAY, IMAGE = "/i/d0.t", "/i/d0"


def frozen(**more):
    """Return the record of a copy of d0, frozen below T, into TO."""
    return record(
        operation="copy",
        pivot=True,
        job=pivot_job(RUN),
        helpers=(copy_job(RUN, 0),),
        top=T,
        top_file=OVERLAY,
        base="d0",
        base_file=IMAGE,
        base_format="raw",
        nodes=(TO, storage_node(TO), T, storage_node(T)),
        files=(OVERLAY,),
        images=(IMAGE,),
        **more,
    )


def drawn(over, active):
    """Draw d0 with T and TO; T lies on `over`."""
    drawing = chain("d0", "d1").image(T, file=OVERLAY, backing=over).image(TO, file="/i/to.partial")
    for name in (T, TO):
        drawing.nodes[storage_node(name)] = drawing.nodes.pop(f"{name}-f") | {
            "node-name": storage_node(name)
        }
        for edge in drawing.nodes[name]["children"]:
            if edge["child"] == "file":
                edge["node-name"] = storage_node(name)
    return drawing.device(active)


def test_it_is_a_copy_and_a_staged_commit():
    its = frozen()
    assert isinstance(its, FrozenCopy)
    assert isinstance(its, StagedCommit)  # whoever recovers images brings its overlay home
    assert its.describe().startswith("copy of ")
    its.check_journaled()


@pytest.mark.parametrize("choice", Choice)
def test_the_target_is_closed_before_the_overlay_comes_home(choice):
    found = steps(frozen(), drawn("d0", T).graph(), choice, (OVERLAY,), stale=False)
    assert [(step.verb, step.what) for step in found] == [
        ("delete-node", TO),
        ("delete-node", storage_node(TO)),
        ("bring-home", T),
    ]
    assert "zeros" not in found[0].why


@pytest.mark.parametrize("choice", Choice)
def test_before_the_instant_all_just_goes(choice):
    found = steps(frozen(), drawn(None, "d0").graph(), choice, (OVERLAY,), stale=False)
    assert {step.verb for step in found} == {"delete-node"}
    assert [step.what for step in found][::2] == [TO, T]


def test_its_backup_is_cancelled_and_nothing_else_before():
    drawing = drawn("d0", T).job(copy_job(RUN, 0), "backup", "running")
    for choice in Choice:
        [step] = steps(frozen(), drawing.graph(), choice, (OVERLAY,), stale=False)
        assert (step.verb, step.what) == ("cancel", copy_job(RUN, 0))


def test_which_image_is_to_be_trusted():
    its = frozen()
    written = its.verdict([{"pivoted": False}], {OVERLAY: False})
    assert (written.start, written.commit) == ((IMAGE,), ((OVERLAY, IMAGE),))
    home = its.verdict([{"pivoted": True}], {OVERLAY: False})
    assert (home.start, home.commit, home.unused) == ((IMAGE,), (), (OVERLAY,))


@pytest.mark.parametrize("over", ["d0", None])
def test_neither_bitmap_nor_export_of_a_resumed_one_stays(over):
    """Be the overlay of use already or not; the bitmap is of the guest's image, which stays."""
    left = left_bitmap(TO)
    drawing = drawn(over, T if over else "d0")
    drawing.nodes["d0"]["dirty-bitmaps"] = [bitmap(left), bitmap("theirs")]
    drawing.export(export_name(RUN, 1), TO).export("theirs", "d1")
    graph = drawing.graph()
    found = steps(frozen(drawn=(("d0", left),)), graph, Choice.UNDO, (OVERLAY,), stale=False)
    assert [(step.verb, step.what) for step in found[:2]] == [
        ("end-export", export_name(RUN, 1)),
        ("delete-bitmap", f"d0/{left}"),
    ]
    assert "theirs" not in " ".join(step.what for step in found)
    assert (found[-1].verb == "bring-home") is (over is not None)


# -- the same where a manager owns the chain: its node is seen in the graph alone

THEIRS, VIEW, PAUSED = "libvirt-2-format", "qmpblock-cafe0123-view", paused_node(RUN)


def staging(**more):
    """Return the record of host space for d0, whose manager calls its disk vda."""
    said = {
        "operation": "allocate by its manager",
        "top_file": OVERLAY,
        "base": "d0",
        "base_file": IMAGE,
        "base_format": "qcow2",
        "nodes": (VIEW, PAUSED),
        "files": (OVERLAY,),
        "images": (IMAGE,),
        "known_as": "vda",
    }
    return record(pivot=True, **said | more)


def taken(over="d0", active=THEIRS):
    """Draw d0 below the manager's overlay."""
    return chain("d0", "d1").image(VIEW).image(THEIRS, file=OVERLAY, backing=over).device(active)


def left(drawing, *, stale=False):
    its, graph = staging(), drawing.graph()
    made = {OVERLAY}.difference(its.may_start(graph, [{"pivoted": stale}]))
    found = steps(its, graph, Choice.UNDO, made, stale=stale)
    return [(step.verb, step.what) for step in found]


def test_its_overlay_is_known_by_its_file():
    its = staging()
    assert isinstance(its, ManagersStaging)
    its.check_journaled()
    assert its.seen_in(taken().graph()).top == THEIRS
    assert its.seen_in(chain("d0", "d1").graph()).top == ""
    assert its.took_effect(taken().graph()) is False
    assert its.took_effect(chain("d0", "d1").graph()) is True


def test_it_comes_home_without_what_was_put_below_it():
    assert left(taken())[-1] == ("bring-home", THEIRS)
    assert left(taken(VIEW)) == [
        ("relink", THEIRS),
        ("delete-node", VIEW),
        ("bring-home", THEIRS),
    ]


def test_what_the_manager_has_begun_comes_first():
    working = taken().job("commit-vda-x", "commit", "ready", THEIRS, "d0")
    assert left(working) == [("bring-home", THEIRS)]
    assert left(working.image(PAUSED)) == [("bring-home", THEIRS)]
    assert left(taken().image(PAUSED)) == [("agree", "vda")]


def test_one_that_somebody_lies_upon_or_has_pulled_stays():
    """It is a layer that the manager knows; nor is its file removed."""
    over = taken().image("theirs", backing=THEIRS).device("theirs")
    for drawing in (over, taken(None), taken("d1")):
        assert [one for one in left(drawing) if one != ("delete-node", VIEW)] == []


def test_one_that_was_never_taken_or_is_home_is_closed_and_goes():
    assert ("delete-node", THEIRS) in left(taken(active="d0"))
    assert left(chain("d0", "d1")) == [("delete-file", OVERLAY)]


def test_of_a_disk_that_was_detached_the_overlay_stays_unless_it_is_stale():
    drawing = chain("d0", "d1")
    drawing.devices.clear()
    assert left(drawing) == []
    assert left(drawing, stale=True) == [("delete-file", OVERLAY)]


def test_its_manager_starts_the_vm():
    its = staging()
    written = its.verdict([{"pivoted": False}], {OVERLAY: False, "/i/z": True})
    assert (written.start, written.unused, written.commit) == ((OVERLAY,), ("/i/z",), ())
    assert written.waits
    assert "virsh start" in written.why
    assert its.verdict([{"pivoted": False}], {OVERLAY: True}).start == (IMAGE,)
    home = its.verdict([{"pivoted": True}], {OVERLAY: False})
    assert (home.start, home.unused, home.waits) == ((IMAGE,), (OVERLAY,), False)
    assert its.verdict([], {}).start == (IMAGE,)
