"""What is left to do of a change, and that doing it comes to an end."""

import pytest
from drawing import RUN, Drawing, bitmap, chain, record
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.changes.step import Choice, Step
from qmpblock.changes.unfinished import steps
from qmpblock.qemu.jobstate import ACTIVE, TRANSITIONS

PREFIX = f"qmpblock-{RUN}-"
JOB = f"{PREFIX}job"
STATUSES = sorted(set(TRANSITIONS) - {"null"})
UNDO, CONTINUE = Choice.UNDO, Choice.CONTINUE
HELPER = f"{PREFIX}bm"  # the transient bitmap that a persistent one begins as


def verbs(found):
    return [step.verb for step in found]


def of_stream(**changes):
    """Return the record of: stream d1 into d0, down to d2."""
    return record(
        **{
            "operation": "stream",
            "job": JOB,
            "keeper": "d0",
            "top": "d0",
            "base": "d2",
            "leaving": (("d1", "/i/d1"), ("d1-f", "/i/d1")),
        }
        | changes
    )


def of_commit(**changes):
    """Return the record of: commit d1 into d2, below d0."""
    return of_stream(
        **{
            "operation": "commit",
            "top": "d1",
            "bitmaps": (("d2", "bm"), ("d2", HELPER)),
            "promotions": (("d2", HELPER, "bm", 65536),),
        }
        | changes
    )


def of_pivot(**changes):
    """Return the record of: commit d0 and d1 into d2, and pivot."""
    return of_commit(
        **{
            "pivot": True,
            "keeper": "",
            "top": "d0",
            "top_file": "/i/d0",
            "base_file": "/i/d2",
            "leaving": (("d0", "/i/d0"), ("d0-f", "/i/d0"), ("d1", "/i/d1"), ("d1-f", "/i/d1")),
        }
        | changes
    )


def of_snapshot(**changes):
    """Return the record of an overlay over d0."""
    return record(
        **{
            "operation": "snapshot",
            "helpers": (f"{PREFIX}create-0",),
            "nodes": (f"{PREFIX}0", f"{PREFIX}0-f"),
            "files": ("/i/new",),
        }
        | changes
    )


T, Z = f"{PREFIX}t", f"{PREFIX}z"


def of_staging(**changes):
    """Return the record of a staged commit of d0."""
    return record(
        **{
            "operation": "allocate",
            "job": JOB,
            "helpers": (f"{PREFIX}create-0", f"{PREFIX}zcommit"),
            "pivot": True,
            "top": T,
            "top_file": "/i/d0.t",
            "base": "d0",
            "base_file": "/i/d0",
            "nodes": (T, f"{T}-f", Z),
            "files": ("/i/d0.t", "/i/d0.z"),
        }
        | changes
    )


RECORDS = {
    "stream": of_stream(),
    "commit": of_commit(),
    "pivot": of_pivot(),
    "snapshot": of_snapshot(job=JOB),
    "staging": of_staging(),
}


# a job comes first


def documented(what, status, choice):
    """Return the verb that the module's docstring gives."""
    if status == "concluded":
        return "dismiss"
    if status == "pending":
        if what in ("pivot", "staging"):
            return "pivot"
        return "cancel" if choice is UNDO else "finalize"
    if status in ACTIVE:
        if what == "staging":
            return "bring-home"  # it is how that is undone, too
        return "cancel" if choice is UNDO else "follow"
    return "wait"


@pytest.mark.parametrize("choice", Choice)
@pytest.mark.parametrize("status", [*STATUSES, "newer"])
@pytest.mark.parametrize("what", RECORDS)
def test_each_status_of_the_job(what, status, choice):
    drawing = chain("d0", "d1", "d2").job(JOB, "x", status, "d0")
    (step,) = steps(RECORDS[what], drawing.graph(), choice, ["/i/new", "/i/d0.t"])
    assert step.verb == documented(what, status, choice)
    assert step.what == (T if step.verb == "bring-home" else JOB)


@pytest.mark.parametrize("choice", Choice)
@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("what", ["snapshot", "staging"])
def test_what_only_prepares_is_never_carried_on(what, status, choice):
    """Nor does its end pivot anything: the overlay would be taken for stale."""
    for helper in RECORDS[what].helpers:
        drawing = chain("d0").job(helper, "x", status)
        (step,) = steps(RECORDS[what], drawing.graph(), choice)
        wanted = "cancel" if status in ACTIVE | {"pending"} else "wait"
        assert (step.verb, step.what) == ("dismiss" if status == "concluded" else wanted, helper)


def test_the_main_job_comes_before_its_helpers():
    drawing = chain("d0").job(f"{PREFIX}zcommit", "commit", "running").job(JOB, "c", "pending")
    assert verbs(steps(of_staging(), drawing.graph(), UNDO)) == ["pivot"]


def test_a_job_of_somebody_else_is_not_dealt_with():
    drawing = chain("d0", "d1", "d2").job(f"qmpblock-cafebabe-{JOB}", "stream", "running", "d0")
    drawing.job("job0", "backup", "concluded")
    assert steps(of_stream(), drawing.graph(), UNDO) == ()


def test_helpers_that_have_ended_are_dismissed_together_and_before_another_is_dealt_with():
    """Of a dozen disks, each look at the VM takes as long as all that is to be done."""
    helpers = tuple(f"{PREFIX}migrate-{number}" for number in range(3))
    made = record(operation="migrate", helpers=helpers, journaled=False)

    def of(*statuses):
        drawing = chain("d0")
        for name, status in zip(helpers, statuses, strict=True):
            drawing = drawing.job(name, "mirror", status, "d0")
        return [(step.verb, step.what) for step in steps(made, drawing.graph(), UNDO, [])]

    assert of(*["concluded"] * 3) == [("dismiss", name) for name in helpers]
    assert of("concluded", "ready", "concluded") == [("dismiss", helpers[0])]
    assert of("ready", "concluded", "concluded") == [("cancel", helpers[0])]


def test_a_verdict_is_told_before_it_is_dismissed():
    drawing = chain("d0", "d1", "d2")
    drawing.job(JOB, "stream", "concluded", error="\x1b[2JNo space left")
    (step,) = steps(of_stream(), drawing.graph(), UNDO)
    assert "No space left" in step.why
    assert "\x1b" not in str(step)
    drawing.job(JOB, "stream", "concluded")
    assert "with success" in steps(of_stream(), drawing.graph(), UNDO)[0].why


def test_bitmaps_go_before_the_job_that_has_their_node_writable():
    """Once the base is read-only again, QEMU cannot remove a persistent one."""
    drawing = chain("d0", "d1", "d2").job(JOB, "commit", "running", "d2")
    drawing.nodes["d2"]["dirty-bitmaps"] = [bitmap("bm", persistent=True), bitmap("theirs")]
    found = steps(of_commit(), drawing.graph(), UNDO)
    assert [(step.verb, step.what) for step in found] == [
        ("delete-bitmap", "d2/bm"),
        ("cancel", JOB),
    ]
    assert verbs(steps(of_commit(), drawing.graph(), CONTINUE)) == ["follow"]


# whether it is done


def test_a_stream_is_done_when_its_layer_lies_on_the_base():
    before, after = chain("d0", "d1", "d2"), chain("d0", "d1", "d2")
    after.rebase("d0", "d2")
    assert of_stream().took_effect(before.graph()) is False
    assert of_stream().took_effect(after.graph()) is True


def test_a_stream_of_everything_is_done_when_nothing_lies_below():
    drawing = chain("d0", "d1")
    assert of_stream(base="").took_effect(drawing.graph()) is False
    drawing.rebase("d0", None)
    assert of_stream(base="").took_effect(drawing.graph()) is True


def test_filters_between_layers_do_not_count():
    drawing = chain("d0", "d1", "d2").filter("f", "throttle", "d2").filter("g", "blkdebug", "f")
    drawing.filter("g", "blkdebug", "f", "image")
    drawing.rebase("d0", "g")
    assert of_stream().took_effect(drawing.graph()) is True


def test_of_a_layer_that_is_gone_nothing_can_be_told():
    assert of_stream(keeper="gone").took_effect(chain("d0").graph()) is None


def test_a_pivot_is_done_when_the_guest_is_on_the_base():
    drawing = chain("d0", "d1", "d2")
    assert of_pivot().took_effect(drawing.graph()) is False
    drawing.device("d2")
    assert of_pivot().took_effect(drawing.graph()) is True
    drawing.image("d3", backing="d2").device("d3")
    assert of_pivot().took_effect(drawing.graph()) is True  # somebody's snapshot since


@pytest.mark.parametrize("root", [None, "other"])
def test_of_an_unplugged_disk_a_pivot_cannot_be_told(root):
    drawing = chain("d0", "d1", "d2")
    drawing.devices.clear()
    if root:
        drawing.image("other").device("other", "vd1")
    assert of_pivot().took_effect(drawing.graph()) is None


def test_a_disk_in_which_neither_is_did_not_pivot():
    drawing = chain("d0", "d1", "d2").image("other").device("other")
    assert of_pivot().took_effect(drawing.graph()) is False


def test_a_snapshot_is_done_when_an_overlay_lies_on_its_image():
    drawing = chain("d0").image(f"{PREFIX}0", file="/i/new")
    assert of_snapshot().took_effect(drawing.graph()) is False
    drawing.rebase(f"{PREFIX}0", "d0")
    drawing.device(f"{PREFIX}0")
    assert of_snapshot().took_effect(drawing.graph()) is True
    drawing.devices.clear()
    assert of_snapshot().took_effect(drawing.graph()) is True  # unplugged since


def test_a_managers_snapshot_is_done_when_an_overlay_lies_on_something():
    """Its manager may have ended when QEMU had opened it, and no more."""
    its = record("snapshot by its manager", files=("/i/new",))
    drawing = chain("d0").image("theirs", file="/i/new")
    assert its.took_effect(drawing.graph()) is False
    assert not steps(its, drawing.graph(), UNDO, ["/i/new"])  # QEMU has it open: it stays
    drawing.rebase("theirs", "d0")
    drawing.device("theirs")
    assert its.took_effect(drawing.graph()) is True
    assert not steps(its, drawing.graph(), UNDO, ["/i/new"])
    left = steps(its, chain("d0").graph(), UNDO, ["/i/new"])
    assert [(step.verb, step.what) for step in left] == [("delete-file", "/i/new")]


@pytest.mark.parametrize("nothing", [True, False])
def test_a_managers_overlay_stays_when_qemu_dies(nothing):
    """It may start the VM from one that holds nothing yet."""
    its = record("snapshot by its manager", files=("/i/new",))
    verdict = its.verdict((), {"/i/new": nothing})
    assert verdict.unused == ()
    assert verdict.start == (("/i/d0",) if nothing else ("/i/new",))
    assert "virsh domblklist" in verdict.why
    assert ("does not name of /i/new can be removed" in verdict.why) is nothing


# what is left over


def test_nodes_of_layers_that_left_go_when_nothing_uses_them():
    drawing = chain("d0", "d1", "d2")
    assert steps(of_stream(), drawing.graph(), UNDO) == ()  # not done: they are the chain
    drawing.rebase("d0", "d2")
    found = steps(of_stream(), drawing.graph(), UNDO)
    assert [step.what for step in found] == ["d1", "d1-f"]  # each before what it lies on
    drawing.export("theirs", "d1")
    assert steps(of_stream(), drawing.graph(), UNDO) == ()
    drawing.exports.clear()
    drawing.device("d1", "vd1")
    assert steps(of_stream(), drawing.graph(), UNDO) == ()


def test_a_node_of_the_same_name_and_another_file_is_another():
    drawing = chain("d0", "d1", "d2")
    drawing.rebase("d0", "d2")
    drawing.nodes["d1"]["file"] = "/i/new"
    assert steps(of_stream(), drawing.graph(), UNDO) == ()


def test_after_an_unknown_end_nothing_of_the_chain_is_removed():
    drawing = chain("d0", "d1", "d2")
    drawing.devices.clear()
    drawing.nodes["d2"]["dirty-bitmaps"] = [bitmap("bm"), bitmap(HELPER)]
    found = steps(of_pivot(), drawing.graph(), UNDO)
    assert [step.what for step in found] == [f"d2/{HELPER}"]


def test_bitmaps_end_with_a_commit_that_did_not_happen_and_stay_after_one_that_did():
    drawing = chain("d0", "d1", "d2")
    drawing.nodes["d2"]["dirty-bitmaps"] = [bitmap("bm"), bitmap(HELPER), bitmap("theirs")]
    found = steps(of_commit(), drawing.graph(), UNDO)
    assert [step.what for step in found] == ["d2/bm", f"d2/{HELPER}"]
    drawing.rebase("d0", "d2")
    found = steps(of_commit(), drawing.graph(), UNDO)
    assert [step.what for step in found] == [f"d2/{HELPER}", "d1", "d1-f"]


def test_an_overlay_that_was_never_used_goes_with_its_file():
    drawing = chain("d0").image(f"{PREFIX}0", file="/i/new")
    found = steps(of_snapshot(), drawing.graph(), UNDO, ["/i/new"])
    assert [(step.verb, step.what) for step in found] == [
        ("delete-node", f"{PREFIX}0"),
        ("delete-node", f"{PREFIX}0-f"),  # its protocol node
    ]
    drawing.nodes.pop(f"{PREFIX}0")
    found = steps(of_snapshot(), drawing.graph(), UNDO, ["/i/new"])
    assert verbs(found) == ["delete-node"]
    drawing.nodes.pop(f"{PREFIX}0-f")
    found = steps(of_snapshot(), drawing.graph(), UNDO, ["/i/new"])
    assert [(step.verb, step.what) for step in found] == [("delete-file", "/i/new")]
    assert steps(of_snapshot(), drawing.graph(), UNDO, []) == ()


@pytest.mark.parametrize("plugged", [True, False])
@pytest.mark.parametrize("choice", Choice)
def test_an_overlay_that_lies_on_an_image_is_never_removed(choice, plugged):
    """The guest may have written to it."""
    drawing = chain("d0").image(f"{PREFIX}0", file="/i/new", backing="d0").device(f"{PREFIX}0")
    if not plugged:
        drawing.devices.clear()
    assert steps(of_snapshot(), drawing.graph(), choice, ["/i/new"]) == ()


def test_a_file_in_use_under_another_node_stays():
    drawing = chain("d0").image("theirs", file="/i/new")
    assert steps(of_snapshot(), drawing.graph(), UNDO, ["/i/new"]) == ()


def test_the_guests_limits_come_back_first():
    found = steps(of_pivot(throttle=(("bps", 0),)), chain("d0", "d1", "d2").graph(), UNDO)
    assert [(step.verb, step.what) for step in found] == [
        ("restore-limits", "/machine/peripheral/vd0")
    ]


# a staged commit


def staged(over=None, active=T, made=(T,)):
    """Draw d0 with overlay T; Z too, if it is in `made`."""
    drawing = chain("d0", "d1")
    if Z in made:
        drawing.image(Z, file="/i/d0.z", backing="d0")
    if T in made:
        drawing.image(T, file="/i/d0.t", backing=over)
    return drawing.device(active)


MADE = ("/i/d0.t", "/i/d0.z")


@pytest.mark.parametrize("choice", Choice)
def test_an_overlay_on_top_comes_home(choice):
    found = steps(of_staging(), staged("d0").graph(), choice, MADE, stale=False)
    assert verbs(found) == ["bring-home"]
    found = steps(of_staging(), staged(Z, made=(T, Z)).graph(), choice, MADE, stale=False)
    assert [(step.verb, step.what) for step in found] == [
        ("relink", T),
        ("delete-node", Z),
        ("bring-home", T),
    ]
    found = steps(of_staging(), staged("d0", made=(T, Z)).graph(), choice, MADE, stale=False)
    assert verbs(found) == ["delete-node", "bring-home"]


@pytest.mark.parametrize("choice", Choice)
def test_detect_zeroes_comes_back_before_the_overlay(choice):
    """Or, where the guest was back already, at once; and only where it is another one now."""
    wanted = of_staging(detect_zeroes="unmap")
    drawing = staged("d0")
    found = steps(wanted, drawing.graph(), choice, MADE, stale=False)
    assert [(step.verb, step.what) for step in found] == [
        ("restore-zeroes", "d0"),
        ("bring-home", T),
    ]
    drawing.nodes["d0"]["detect_zeroes"] = "unmap"
    assert verbs(steps(wanted, drawing.graph(), choice, MADE, stale=False)) == ["bring-home"]
    back = chain("d0", "d1")
    assert verbs(steps(wanted, back.graph(), choice, stale=True)) == ["restore-zeroes"]
    assert steps(of_staging(), back.graph(), choice, stale=True) == ()
    del back.nodes["d0"]
    assert steps(wanted, back.device("d1").graph(), choice, stale=True) == ()


def filled(over=True, active=T, more=()):
    """Draw d0 with overlay T, and what fills d0: T lies on the view, or on d0 still."""
    names = [f"{PREFIX}{name}" for name in ("z", "window", "view", "filter", "kept", "joint", "n")]
    z, window, view, filter_, kept, joint, nothing = names
    drawing = chain("d0", "d1").image(kept, file="/i/d0.k").image(nothing, file="null-co://")
    drawing.filter(joint, "raw", "d0").filter(filter_, "copy-before-write", joint)
    drawing.nodes[filter_]["children"].append({"child": "target", "node-name": kept})
    drawing.filter(view, "snapshot-access", filter_).filter(window, "raw", filter_)
    drawing.image(z, file="/i/d0.z", backing=window)
    drawing.image(T, file="/i/d0.t", backing=view if over else "d0").device(active)
    for name in (z, kept, nothing, T):  # QEMU deletes the file nodes with them
        edges = drawing.nodes[name]["children"]
        drawing.nodes[name]["children"] = [edge for edge in edges if edge["child"] != "file"]
        del drawing.nodes[f"{name}-f"]
    wanted = of_staging(nodes=(T, f"{T}-f", *names), files=(*MADE, "/i/d0.k"))
    return drawing, wanted


@pytest.mark.parametrize("over", [True, False])
@pytest.mark.parametrize("choice", Choice)
def test_what_fills_the_image_goes_before_the_overlay_comes_home(over, choice):
    """Each node before what it lies on; what may write there before the overlay lies there."""
    drawing, wanted = filled(over)
    found = steps(wanted, drawing.graph(), choice, stale=False)
    said = [step.what.removeprefix(PREFIX) for step in found]
    between = ["t"] if over else []
    assert said == ["z", "window", *between, "view", "filter", "kept", "joint", "n", "t"]
    assert verbs(found)[-1] == "bring-home"
    world = World(drawing, wanted, wanted.files)
    assert world.settle(choice) is False
    assert set(world.drawing.nodes) == {"d0", "d0-f", "d1", "d1-f"}
    assert world.made == []


def test_under_somebodys_snapshot_only_the_overlay_stays():
    drawing, wanted = filled()
    drawing.image("theirs", backing=T).device("theirs")
    world = World(drawing, wanted, wanted.files)
    world.settle(UNDO)
    assert set(world.drawing.nodes) == {"d0", "d0-f", "d1", "d1-f", T, "theirs", "theirs-f"}


def test_zeros_that_somebody_uses_stay():
    drawing = staged("d0", made=(T, Z)).export("theirs", Z)
    assert verbs(steps(of_staging(), drawing.graph(), UNDO)) == ["bring-home"]


def test_an_overlay_that_was_not_put_on_top_goes():
    found = steps(of_staging(), staged(None, active="d0").graph(), UNDO, MADE)
    assert [step.what for step in found] == [T, f"{T}-f"]


def test_an_overlay_whose_disk_has_another_medium_comes_home():
    """As of a disk that was unplugged: by the journal, which knows what it holds."""
    drawing = staged("d0").image("other", file="/i/other").device("other")
    found = {
        stale: verbs(steps(of_staging(), drawing.graph(), UNDO, MADE, stale=stale))
        for stale in (False, True, None)
    }
    assert found[False] == ["bring-home"]
    assert "bring-home" not in found[True] + found[None]


@pytest.mark.parametrize("stale", [None, True, False])
def test_an_overlay_that_came_home_goes(stale):
    """The guest is on the image, whatever the journal says."""
    found = steps(of_staging(), staged("d0", active="d0").graph(), UNDO, MADE, stale=stale)
    assert [step.what for step in found] == [T, f"{T}-f"]


@pytest.mark.parametrize("choice", Choice)
def test_of_an_unplugged_disk_only_the_journal_tells(choice):
    """Without one the overlay is left alone, and with it its files."""
    drawing = staged("d0")
    drawing.devices.clear()

    def found(stale):
        return verbs(steps(of_staging(), drawing.graph(), choice, MADE, stale=stale))

    assert found(False) == ["bring-home"]
    assert found(True) == ["delete-node", "delete-node"]
    assert found(None) == []


def test_an_overlay_under_somebodys_snapshot_is_not_removed():
    """A foreign snapshot while it was on top: it is a layer of the chain now."""
    drawing = staged("d0").image("theirs", backing=T).device("theirs")
    for stale in (None, True, False):
        found = steps(of_staging(), drawing.graph(), UNDO, MADE, stale=stale)
        assert not any(step.what in (T, f"{T}-f", "/i/d0.t") for step in found)


# it comes to an end


class World:
    """A drawing in which steps are performed as QEMU, or the files, would."""

    def __init__(self, drawing, wanted, made=()):
        self.drawing, self.record, self.made = drawing, wanted, list(made)
        self.stale = False if wanted.operation == "allocate" else None
        self.told = []

    def perform(self, step):
        """Perform one; fail where the real thing would be harmed."""
        drawing, wanted = self.drawing, self.record
        self.told.append(step)
        if step.verb in ("cancel", "wait"):
            drawing.job(step.what, "x", "concluded", error="cancelled")
        elif step.verb == "dismiss":
            assert drawing.jobs.pop(step.what)[1] == "concluded"
        elif step.verb == "pivot":
            assert drawing.jobs[step.what][1] == "pending"
            drawing.job(step.what, "x", "concluded")
            self.stale = True
            if step.what == wanted.job:
                drawing.device(wanted.base)
        elif step.verb == "finalize":
            assert drawing.jobs[step.what][1] == "pending"
            drawing.job(step.what, "x", "concluded").rebase(wanted.keeper, wanted.base or None)
        elif step.verb == "restore-zeroes":
            drawing.nodes[step.what]["detect_zeroes"] = wanted.detect_zeroes
        elif step.verb == "relink":
            drawing.rebase(step.what, wanted.base)
        elif step.verb == "bring-home":
            drawing.job(wanted.job, "commit", "concluded").device(wanted.base)
            self.stale = True
        elif step.verb == "delete-node":
            assert drawing.graph().users(step.what) == ()
            del drawing.nodes[step.what]
        elif step.verb == "delete-bitmap":
            node, _, name = step.what.partition("/")
            known = drawing.nodes[node]["dirty-bitmaps"]
            known.remove(next(one for one in known if one["name"] == name))
        elif step.verb == "delete-file":
            assert all(node["file"] != step.what for node in drawing.nodes.values())
            self.made.remove(step.what)
        else:
            assert step.verb == "restore-limits"

    def settle(self, choice):
        """Do as `qmpblock.changes.settle.settle` does; return whether it was carried on."""
        limited = False
        for _ in range(50):
            found = steps(self.record, self.drawing.graph(), choice, self.made, stale=self.stale)
            todo = [step for step in found if not (step.verb == "restore-limits" and limited)]
            if not todo:
                return False
            if todo[0].verb == "follow":
                return True
            for step in todo:
                limited = limited or step.verb == "restore-limits"
                self.perform(step)
        raise AssertionError(f"no end: {self.told}")


def streaming(status, done):
    drawing = chain("d0", "d1", "d2")
    if status:
        drawing.job(JOB, "stream", status, "d0", "d1", "d2")
    if done:
        drawing.rebase("d0", "d2")
    return World(drawing, of_stream())


def committing(status, done):
    drawing = chain("d0", "d1", "d2")
    drawing.nodes["d2"]["dirty-bitmaps"] = [bitmap(HELPER), bitmap("theirs")]
    if status:
        drawing.job(JOB, "commit", status, "d1", "d2")
    if done:
        drawing.rebase("d0", "d2")
        drawing.nodes["d2"]["dirty-bitmaps"].append(bitmap("bm"))
    return World(drawing, of_commit())


def pivoting(status, done):
    drawing = chain("d0", "d1", "d2")
    drawing.nodes["d2"]["dirty-bitmaps"] = [bitmap(HELPER), bitmap("theirs")]
    if status:
        drawing.job(JOB, "commit", status, "d0", "d1", "d2")
    if done:
        drawing.device("d2")
    return World(drawing, of_pivot(throttle=(("bps", 0),)))


def snapping(status, done):
    drawing = chain("d0", "d1")
    if status or done:
        drawing.image(f"{PREFIX}0", file="/i/new", backing="d0" if done else None)
    if status:
        drawing.job(f"{PREFIX}create-0", "create", status)
    if done:
        drawing.device(f"{PREFIX}0")
    return World(drawing, of_snapshot(), ["/i/new"])


def staging(status, done):
    drawing = staged("d0" if done else Z, made=(T, Z), active="d0" if done else T)
    if status:
        drawing.job(JOB, "commit", status, T, "d0")
    world = World(drawing, of_staging(), MADE)
    world.stale = done
    return world


def preparing(status, done):
    """Bring zeros into the frozen image, the overlay on top of both."""
    drawing = staged("d0" if done else Z, made=(T, Z))
    if status:
        drawing.job(f"{PREFIX}zcommit", "commit", status, Z, "d0")
    return World(drawing, of_staging(detect_zeroes="unmap"), MADE)


SCENES = (streaming, committing, pivoting, snapping, staging, preparing)


@given(
    st.sampled_from(SCENES),
    st.sampled_from([None, *STATUSES]),
    st.booleans(),
    st.sampled_from(list(Choice)),
)
def test_it_comes_to_an_end_and_nothing_of_ours_is_left(scene, status, done, choice):
    if done and status != "concluded":
        status = None  # what is final is done at the very end
    world = scene(status, done)
    active = world.drawing.graph().device("vd0").chain.active.node.name
    if world.settle(choice):
        assert choice is CONTINUE
        assert status in ACTIVE
        world.drawing.jobs.clear()
        return
    left = steps(world.record, world.drawing.graph(), choice, world.made, stale=world.stale)
    assert [step for step in left if step.verb != "restore-limits"] == []
    drawing = world.drawing
    assert drawing.jobs == {}
    # The guest has a whole chain; it went on where it was unless that was what was wanted.
    now = drawing.graph().device("vd0").chain
    assert now.layers[-1].node.name in ("d1", "d2")
    if world.record.pivot:
        assert now.active.node.name in (active, world.record.base)
    else:
        assert now.active.node.name == active
    ours = [name for name in drawing.nodes if name.startswith(PREFIX) and not name.endswith("-f")]
    assert ours == ([f"{PREFIX}0"] if scene is snapping and done else [])
    names = {one["name"] for one in drawing.nodes.get("d2", {}).get("dirty-bitmaps", [])}
    assert HELPER not in names
    if scene in (committing, pivoting):
        assert "theirs" in names
    if scene is preparing:
        assert drawing.nodes["d0"]["detect_zeroes"] == "unmap"


@given(
    st.sampled_from([preparing, staging]),
    st.sampled_from([None, *STATUSES]),
    st.sampled_from(list(Choice)),
)
def test_the_overlay_is_stale_only_once_the_guest_left_it(scene, status, choice):
    """Were QEMU killed after any step: what the journal says then must be true."""
    world = scene(status, False)
    world.stale = False
    for _ in range(20):
        found = steps(world.record, world.drawing.graph(), choice, world.made, stale=world.stale)
        if not found:
            break
        world.perform(found[0])
        device = world.drawing.graph().device("vd0")
        if device.chain.active.node.name == T:
            assert not world.stale
            assert T in world.drawing.nodes
            assert "/i/d0.t" in world.made
    else:
        raise AssertionError("no end")


def test_a_step_reads_as_a_sentence():
    assert str(Step("cancel", "a\x1b[2J", "it is running")) == "cancel a\\x1b[2J: it is running"


# QEMU is gone


IMAGES = ("/i/d0", "/i/d1", "/i/d2")
PIVOTED = [{"pivoted": True}]


@pytest.mark.parametrize("entries", [[], [{"pivoted": False}], PIVOTED])
def test_a_stream_changes_no_content(entries):
    verdict = of_stream(images=IMAGES).verdict(entries, {})
    assert verdict.start == ("/i/d0",)
    assert (verdict.stale, verdict.unused, verdict.commit) == ((), (), ())


def test_a_commit_of_middle_layers_leaves_the_active_one():
    """Also if the word of a pivot got there: it has none."""
    for entries in ([], PIVOTED):
        verdict = of_commit(images=IMAGES).verdict(entries, {})
        assert verdict.start == ("/i/d0",)
        assert verdict.stale == ()


@pytest.mark.parametrize(
    ("entries", "start", "stale"),
    [
        ([], "/i/d0", ()),
        ([{"pivoted": False}], "/i/d0", ()),
        (PIVOTED, "/i/d2", ("/i/d0",)),
        ([*PIVOTED, {"pivoted": False}], "/i/d0", ()),
        ([*PIVOTED, {"pivoted": False}, *PIVOTED], "/i/d2", ("/i/d0",)),
    ],
)
def test_only_the_record_tells_whether_a_pivot_happened(entries, start, stale):
    """Facts 10.3: on disk, ready and completed look the same."""
    verdict = of_pivot(images=IMAGES).verdict(entries, {})
    assert (verdict.start, verdict.stale) == ((start,), stale)
    assert (verdict.unused, verdict.commit) == ((), ())  # no image of the user's is touched


def test_after_an_interrupted_commit_the_base_is_warned_of():
    verdict = of_pivot(images=IMAGES).verdict([], {})
    assert "no point in time" in verdict.why


TWO = {"devices": ("a", "b"), "files": ("/i/n0", "/i/n1"), "images": ("/i/d0", "/i/e0", "/i/d1")}


@pytest.mark.parametrize(
    ("empty", "start", "unused"),
    [
        ({}, ("/i/d0", "/i/e0"), ()),
        ({"/i/n0": True}, ("/i/d0", "/i/e0"), ("/i/n0",)),
        ({"/i/n0": True, "/i/n1": True}, ("/i/d0", "/i/e0"), ("/i/n0", "/i/n1")),
        # Where one was written to the whole set is on the overlays: one point in time.
        ({"/i/n0": True, "/i/n1": False}, ("/i/n0", "/i/n1"), ()),
        ({"/i/n0": False, "/i/n1": True}, ("/i/n0", "/i/n1"), ()),
    ],
)
def test_a_snapshot_of_two_disks_is_one_point(empty, start, unused):
    verdict = of_snapshot(**TWO).verdict([], empty)
    assert (verdict.start, verdict.unused, verdict.stale) == (start, unused, ())
    assert not set(verdict.unused) & set(verdict.start)


NOTHING = {"/i/d0.t": True, "/i/d0.z": True}
WRITTEN = {"/i/d0.t": False, "/i/d0.z": True}


@pytest.mark.parametrize(
    ("entries", "empty", "unused", "commit"),
    [
        ([], {}, (), ()),
        ([], {"/i/d0.z": True}, ("/i/d0.z",), ()),
        ([], NOTHING, ("/i/d0.z", "/i/d0.t"), ()),
        ([], WRITTEN, ("/i/d0.z",), (("/i/d0.t", "/i/d0"),)),
        # Zeros are zeros: they hide nothing that the image holds.
        ([], {"/i/d0.t": False, "/i/d0.z": False}, ("/i/d0.z",), (("/i/d0.t", "/i/d0"),)),
        ([{"pivoted": False}], WRITTEN, ("/i/d0.z",), (("/i/d0.t", "/i/d0"),)),
        # Facts 10.3: a stale one is never committed: it would destroy newer data.
        (PIVOTED, WRITTEN, ("/i/d0.z", "/i/d0.t"), ()),
        (PIVOTED, NOTHING, ("/i/d0.z", "/i/d0.t"), ()),
        (PIVOTED, {}, (), ()),
        ([*PIVOTED, {"pivoted": False}], WRITTEN, ("/i/d0.z",), (("/i/d0.t", "/i/d0"),)),
    ],
)
def test_a_staged_commit(entries, empty, unused, commit):
    verdict = of_staging(images=("/i/d0", "/i/d1")).verdict(entries, empty)
    assert verdict.start == ("/i/d0",)
    assert verdict.unused == unused
    assert verdict.commit == commit
    assert verdict.stale == ()


@given(
    st.lists(st.booleans(), max_size=4),
    st.dictionaries(st.sampled_from(MADE), st.booleans()),
)
def test_what_holds_the_newest_data_is_never_removed(said, empty):
    """Of a staged commit: written to and not stale, the overlay is committed, and before that."""
    entries = [{"pivoted": word} for word in said]
    verdict = of_staging(images=("/i/d0",)).verdict(entries, empty)
    newest = empty.get("/i/d0.t") is False and not (said and said[-1])
    assert (("/i/d0.t", "/i/d0") in verdict.commit) is newest
    assert ("/i/d0.t" in verdict.unused) is ("/i/d0.t" in empty and not newest)
    assert not set(verdict.unused) & {"/i/d0", "/i/d1"}


def test_scenes_are_what_they_say():
    """The drawings of this file, checked once."""
    for scene in SCENES:
        for done in (False, True):
            drawing = scene(None, done).drawing
            assert isinstance(drawing, Drawing)
            if scene is not preparing:
                done_now = scene(None, done).record.took_effect(drawing.graph())
                assert done_now is done


VIEWED = tuple(f"{PREFIX}0-{what}" for what in ("view", "filter", "kept"))
PAUSED = f"{PREFIX}paused"


def of_point():
    """Return the record of: see d0 as it was."""
    nodes = (*VIEWED, PAUSED)
    return record("point-in-time", nodes=nodes, files=("/i/d0-fleece",), images=("/i/d0",))


def fleeced():
    """Draw a disk while it is seen as it was."""
    view, filter_, kept = VIEWED
    drawn = chain("d0").image(kept, file="/i/d0-fleece")
    drawn.filter(filter_, "copy-before-write", "d0").filter(view, "snapshot-access", filter_)
    drawn.nodes[filter_]["children"].append({"child": "target", "node-name": kept})
    return drawn.device(filter_).export(f"{PREFIX}0", view)


def left(drawn, made=()):
    """Return what is left of a point in time, in words."""
    found = [steps(of_point(), drawn.graph(), choice, made) for choice in Choice]
    assert found[0] == found[1]  # it cannot be carried on
    return [(step.verb, step.what) for step in found[0]]


def test_a_point_in_time_gives_the_guest_back_its_disk_before_anything_of_it_goes():
    view, filter_, kept = VIEWED
    drawn = fleeced()
    goes = [("delete-node", filter_), ("delete-node", kept)]
    assert left(drawn) == [
        ("end-export", f"{PREFIX}0"),
        ("delete-node", view),
        ("take-out", filter_),
        *goes,
    ]
    drawn.exports.clear()
    del drawn.nodes[view]
    assert left(drawn) == [("take-out", filter_), *goes]
    drawn.device("d0")
    assert left(drawn, ["/i/d0-fleece"]) == goes
    del drawn.nodes[filter_]
    assert left(drawn, ["/i/d0-fleece"]) == [("delete-node", kept)]
    del drawn.nodes[kept], drawn.nodes[f"{kept}-f"]
    assert left(drawn, ["/i/d0-fleece"]) == [("delete-file", "/i/d0-fleece")]
    assert left(drawn) == []


def test_what_else_of_it_is_exported_is_so_no_longer_either():
    """A copy that is being compared with its point, and that only QEMU can read."""
    drawn = fleeced()
    drawn.exports = {f"{PREFIX}1": VIEWED[2], "theirs": "d0"}  # of the view: ended already
    assert left(drawn)[0] == ("end-export", f"{PREFIX}1")
    assert ("end-export", "theirs") not in left(drawn)


def test_a_guest_that_was_paused_for_it_goes_on_first():
    drawn = fleeced()
    drawn._node(PAUSED, "null-co", 0, "null-co://")
    assert left(drawn) == [("resume", PAUSED)]


def test_an_export_of_somebody_elses_is_left_alone():
    drawn = fleeced()
    drawn.exports = {"theirs": VIEWED[0]}
    # That the filter is to be taken out is an error, then: nothing after it is done.
    assert left(drawn)[:2] == [("delete-node", VIEWED[0]), ("take-out", VIEWED[1])]


def test_a_point_in_time_says_nothing_about_which_image_is_newest():
    verdict = of_point().verdict([], {"/i/d0-fleece": False})
    assert (verdict.start, verdict.unused) == (("/i/d0",), ("/i/d0-fleece",))
    assert verdict.stale == ()


@pytest.mark.parametrize("choice", [UNDO, CONTINUE])
def test_a_guest_that_was_paused_for_a_pivot_goes_on_once_no_job_is_left(choice):
    paused = f"{PREFIX}paused"
    its = of_pivot(nodes=(paused,))
    drawn = chain("d0", "d1", "d2").job(JOB, "commit", "pending", "d0", "d2")
    drawn._node(paused, "null-co", 0, "null-co://")
    assert verbs(steps(its, drawn.graph(), choice)) == ["pivot"]
    drawn = chain("d2")
    drawn._node(paused, "null-co", 0, "null-co://")
    assert verbs(steps(its, drawn.graph(), choice)) == ["resume"]
