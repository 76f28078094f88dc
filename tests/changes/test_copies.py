"""What is left of copies, and which image is the newest when QEMU died in one."""

from dataclasses import replace

import pytest
from drawing import RUN, bitmap, chain, record

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
