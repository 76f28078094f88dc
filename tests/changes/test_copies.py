"""What is left of copies, and which image is the newest when QEMU died in one."""

from dataclasses import replace

import pytest
from drawing import RUN, Drawing, bitmap, chain, record

from qmpblock.changes.copies import Copy, Move
from qmpblock.changes.step import Choice
from qmpblock.changes.unfinished import steps
from qmpblock.graph.model import JobInfo
from qmpblock.versioned import UnreadableError

PREFIX = f"qmpblock-{RUN}-"
JOBS = (f"{PREFIX}copy-0", f"{PREFIX}copy-1")
TO = (f"{PREFIX}to-0", f"{PREFIX}to-1")


def of(kind, **changes):
    common = record(operation="snapshot", files=())
    said = {
        name: getattr(common, name)
        for name in ("run", "vm", "devices", "names", "locks", "images", "more")
    }
    said |= {"helpers": JOBS, "nodes": TO}
    if kind is Move:
        said |= {"sources": ("d0", "d1"), "targets": TO, "files": ("/i/t0", "/i/t1")}
    return kind(**said | changes)


def graph(drawn, *jobs):
    """Return the graph with these jobs, each (id, status)."""
    found = drawn.graph()
    return replace(found, jobs=tuple(JobInfo(name, "mirror", status) for name, status in jobs))


def plan(its, found, stale=None, choice=Choice.UNDO):
    return [(step.verb, step.what) for step in steps(its, found, choice, stale=stale)]


@pytest.mark.parametrize("choice", list(Choice))
@pytest.mark.parametrize("status", ["running", "ready", "pending"])
def test_a_copy_is_given_up_wherever_it_is(status, choice):
    found = graph(chain("d0").device("d0"), (JOBS[0], status))
    assert plan(of(Copy), found, choice=choice) == [("cancel", JOBS[0])]


def test_what_a_copy_made_in_the_vm_goes():
    drawn = chain("d0")
    drawn._node(TO[0], "qcow2", 1 << 20, "/i/t0.partial")
    assert plan(of(Copy), graph(drawn.device("d0"))) == [("delete-node", TO[0])]


def test_what_belongs_to_a_wire_goes_when_no_node_is_left():
    wire = f"{PREFIX}0-wire"
    its = of(Copy, nodes=(TO[0], wire), wires=((wire, f"/tmp/{wire}/nbd"),))
    drawn = chain("d0")
    assert plan(its, graph(drawn.device("d0"))) == [("clear-wire", wire)]
    drawn._node(wire, "nbd", 1 << 20, "nbd://h/t")
    assert plan(its, graph(drawn)) == [("delete-node", wire)]


def test_jobs_that_hold_the_guest_are_dealt_with_first():
    its = of(Copy)
    found = graph(chain("d0").device("d0"), (JOBS[0], "pending"), (JOBS[1], "ready"))
    assert [(one.verb, one.what) for one in its.holding(found, stale=None)] == [("cancel", JOBS[0])]


def test_what_takes_note_of_writes_goes():
    name = f"{PREFIX}to-0-even"
    its = of(Copy, noted=(("d0", name), ("d0", f"{PREFIX}to-0-odd"), ("d9", name)))
    drawn = chain("d0").device("d0")
    drawn.nodes["d0"]["dirty-bitmaps"] = [bitmap(name)]
    assert plan(its, graph(drawn)) == [("delete-bitmap", f"d0/{name}")]
    with pytest.raises(UnreadableError):
        replace(its, noted=(("d0", "theirs"),)).check()


class TestMove:
    """All disks go over, or none."""

    def found(self, over=(), jobs=()):
        drawn = chain("d0")
        drawn._node("d1", "qcow2", 1 << 20, "/i/d1")
        for node in TO:
            drawn._node(node, "qcow2", 1 << 20, f"/i/{node}")
        for number in (0, 1):
            drawn.device(TO[number] if number in over else f"d{number}", f"vd{number}")
        return graph(drawn, *jobs)

    def its(self):
        paths = [one.qom_path for one in self.found().devices]
        return of(Move, devices=tuple(paths), names=("vd0", "vd1"), images=("/i/d0", "/i/d1"))

    @pytest.mark.parametrize(
        ("over", "stale", "verb"),
        [
            ((), None, "cancel"),
            ((), False, "cancel"),
            ((), True, "pivot"),  # both hold everything, and the journal says which to trust
            ((0,), None, "pivot"),
            ((0,), True, "pivot"),
        ],
    )
    def test_a_pending_one(self, over, stale, verb):
        found = self.found(over, [(JOBS[1], "pending")])
        assert plan(self.its(), found, stale) == [(verb, JOBS[1])]
        assert [one.verb for one in self.its().holding(found, stale=stale)] == [verb]

    def test_whether_it_took_effect(self):
        its = self.its()
        assert its.took_effect(self.found()) is False
        assert its.took_effect(self.found((0, 1))) is True
        assert its.took_effect(self.found((0,))) is None
        unplugged = chain("d0")
        unplugged.devices.clear()
        assert its.took_effect(graph(unplugged)) is None

    def test_targets_go_that_nobody_is_on(self):
        assert plan(self.its(), self.found()) == [("delete-node", TO[0]), ("delete-node", TO[1])]
        assert plan(self.its(), self.found((0, 1))) == []

    def test_what_another_copy_can_go_on_from_is_kept(self):
        drawn = chain("d0").device("d0")
        its = replace(self.its(), devices=tuple(one.qom_path for one in drawn.graph().devices))
        found = steps(its, graph(drawn), Choice.UNDO, ["/i/t0", "/i/t1"], kept={"/i/t1"})
        assert [(one.verb, one.what, one.to) for one in found] == [
            ("delete-file", "/i/t0", None),
            ("keep-file", "/i/t1", "/i/t1.partial"),
        ]

    def test_copies_get_what_the_disks_had_once_the_guests_are_there(self):
        its = replace(self.its(), settings=((TO[0], "unmap", "on"), (TO[1], "", "off")))
        assert plan(its, self.found((0, 1))) == [
            ("restore-discard", TO[0]),
            ("restore-zeroes", TO[0]),
        ]
        assert {verb for verb, _ in plan(its, self.found())} == {"delete-node"}

    def test_a_setting_that_is_none_is_no_record(self):
        with pytest.raises(UnreadableError):
            replace(self.its(), settings=((TO[0], "quit", ""),)).check()

    def test_one_whose_disk_was_unplugged_after_it_went_over_stays(self):
        drawn = chain("d0")
        for node in TO:
            drawn._node(node, "qcow2", 1 << 20, f"/i/{node}")
        drawn.devices.clear()
        assert plan(self.its(), graph(drawn), True) == []
        assert len(plan(self.its(), graph(drawn), False)) == 2

    def test_which_images_hold_the_newest_data(self):
        its = self.its()
        before = its.verdict([], {"/i/t0": False})
        assert (before.start, before.stale, before.unused) == (its.images, (), ("/i/t0",))
        left = its.verdict([{"file": "/i/t0", "worth": True}], {"/i/t0": False, "/i/t1": False})
        assert (left.kept, left.unused) == (("/i/t0",), ("/i/t1",))
        after = its.verdict([{"pivoted": True}], {})
        assert (after.start, after.stale, after.unused) == (its.files, its.images, ())


class TestManagersMove:
    """Disks that their manager has go over, one after the other, while the VM is paused."""

    PAUSED = f"{PREFIX}paused"

    def drawn(self, over=(), *, noted=(), paused=False):
        """Draw the disks as they are.

        :param over: those that went over; `noted`: those of which the manager has noted it.
        """
        drawn = Drawing()
        for number in (0, 1):
            if number not in noted:
                drawn.image(f"d{number}")
            drawn.image(f"new{number}", file=f"/i/t{number}")
            drawn.device(f"new{number}" if number in over else f"d{number}", f"vd{number}")
        return drawn.image(self.PAUSED) if paused else drawn

    def its(self):
        paths = [one.qom_path for one in self.drawn().graph().devices]
        return record(
            "copy by its manager",
            devices=tuple(paths),
            names=("vd0", "vd1"),
            images=("/i/d0", "/i/d1"),
            nodes=(self.PAUSED,),
            files=("/i/t0", "/i/t1"),
            managed_as=("vda", "vdb"),
            sources=("d0", "d1"),
            source_files=("/i/d0", "/i/d1"),
        )

    def test_whether_it_took_effect(self):
        its = self.its()
        assert its.took_effect(self.drawn().graph()) is False
        assert its.took_effect(self.drawn((0, 1)).graph()) is True
        assert its.took_effect(self.drawn((0,)).graph()) is None
        unplugged = self.drawn((0, 1))
        del unplugged.devices["vd1"]
        assert its.took_effect(unplugged.graph()) is True
        unplugged.devices.clear()
        assert its.took_effect(unplugged.graph()) is None

    def test_an_image_that_is_the_storage_itself(self):
        drawn = self.drawn()
        drawn._node("alone", "file", 1 << 20, "/i/t0")
        drawn.device("alone", "vd0").device("new1", "vd1")
        assert self.its().took_effect(drawn.graph()) is True

    @pytest.mark.parametrize("choice", list(Choice))
    def test_its_jobs_are_given_up(self, choice):
        drawn = self.drawn()
        drawn.job("copy-vda-d0", "mirror", "ready", "d0").job("copy-vdb-d1", "mirror", "run", "d1")
        left = [("give-up", "vda"), ("give-up", "vdb")]
        assert plan(self.its(), drawn.graph(), choice=choice) == left
        drawn.image(self.PAUSED)
        assert plan(self.its(), drawn.graph(), choice=choice) == left

    @pytest.mark.parametrize(
        ("over", "noted", "paused"), [((), (), True), ((0,), (), False), ((0, 1), (0, 1), True)]
    )
    def test_all_are_to_be_the_same_to_both_before_the_guest_goes_on(self, over, noted, paused):
        found = self.drawn(over, noted=noted, paused=paused).graph()
        [step] = steps(self.its(), found, Choice.UNDO)
        assert (step.verb, step.what, step.to) == ("agree", "vda, vdb", ("vda", "vdb"))

    def test_nothing_is_left_of_what_is_done(self):
        assert plan(self.its(), self.drawn((0, 1), noted=(0, 1)).graph()) == []

    def test_a_copy_from_which_the_manager_may_start_the_vm_stays(self):
        its, asked = self.its(), [{"asked": True}]
        assert its.may_start(self.drawn((0, 1)).graph(), []) == ()
        assert its.may_start(self.drawn().graph(), asked) == []
        assert its.may_start(self.drawn((1,)).graph(), asked) == ["/i/t1"]
        over_the_old = self.drawn().image("theirs", backing="d0").device("theirs", "vd0")
        assert its.may_start(over_the_old.graph(), asked) == []
        elsewhere = self.drawn().image("base").device("base", "vd0")
        assert its.may_start(elsewhere.graph(), asked) == ["/i/t0"]
        unplugged = self.drawn()
        del unplugged.devices["vd0"]
        assert its.may_start(unplugged.graph(), asked) == ["/i/t0"]

    def test_which_images_hold_the_newest_data(self):
        its, made = self.its(), {"/i/t0": False, "/i/t1": False}
        before = its.verdict([], made)
        assert (before.start, before.stale, before.unused) == (its.images, (), its.files)
        between = its.verdict([{"asked": True}], made)
        assert (between.start, between.stale, between.unused) == (its.images, (), ())
        assert "of /i/t0, /i/t1 can be removed" in between.why
        after = its.verdict([{"asked": True}, {"pivoted": True}], made)
        assert (after.start, after.stale, after.unused) == (its.files, its.images, ())
        assert all("virsh domblklist" in one.why for one in (before, between, after))
