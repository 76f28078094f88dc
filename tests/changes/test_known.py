"""A manager that pivots a disk, and QEMU, come to name the same image. Real ones: live."""

import contextlib
from types import SimpleNamespace

import pytest
from drawing import RUN, chain, record

from qmpblock.changes.known import agree, bring_home, give_up, move_up, pivot
from qmpblock.changes.step import Choice
from qmpblock.changes.unfinished import steps
from qmpblock.errors import BusyError, Error, GraphError, StalledError, UnsupportedError

COMMIT = "commit-vda-d0"  # as libvirt calls its job
PAUSED = f"qmpblock-{RUN}-paused"


def of_pivot(**changes):
    said = {
        "top": "d0",
        "base": "d1",
        "top_file": "/i/d0",
        "base_file": "/i/d1",
        "nodes": (PAUSED,),
        "known_as": "vda",
    }
    return record("commit by its manager", True, **said | changes)


class Managed:
    """A VM whose manager lends its monitor, and what that says of the disk's image."""

    def __init__(self, drawn, now="/i/d0", later="/i/d0", *, lent=True):
        self.drawn = drawn
        self.said = now, later
        self.happens = []  # before each look at the graph
        self.sent = []
        self.marks = []
        self.stall = 0.2
        self.monitor = SimpleNamespace(is_lent=lent, through=self.through, execute=self.execute)

    async def graph(self):
        if self.happens:
            self.happens.pop(0)()
        return self.drawn.graph()

    async def through(self, ask):
        return await ask(self)

    async def files(self):
        now, later = self.said
        return {"vda": now}, None if later is None else {"vda": later} if later else {}

    async def abort(self, name):
        self.sent.append(name)
        if len(self.sent) == 1:
            raise Error("it is busy")
        self.drawn.jobs.clear()

    async def execute(self, command, arguments):
        self.sent.append(arguments["value"])
        self.drawn.device(arguments["value"])

    def mark(self, **entry):
        self.marks.append(entry)


def working(status="ready"):
    return chain("d0", "d1").job(COMMIT, "commit", status, "d0", "d1")


def moved():
    return chain("d0", "d1").device("d1")


async def test_both_name_the_base():
    """Noted before the guest goes on, for then the top is stale."""
    vm = Managed(moved(), "/i/d1", "/i/d1")
    assert await agree(vm, of_pivot(), vm, "vda") is True
    assert vm.marks == [{"pivoted": True}]
    assert await agree(Managed(moved(), "/i/d1", None), of_pivot(), None, "vda") is True
    vm = Managed(moved(), "/i/d1", "")  # plugged into the running VM alone
    assert await agree(vm, of_pivot(), None, "vda") is True


async def test_both_name_the_top():
    vm = Managed(chain("d0", "d1"))
    assert await agree(vm, of_pivot(), vm, "vda") is False
    assert (vm.sent, vm.marks) == ([], [])


async def test_a_manager_that_is_still_at_it_is_waited_for():
    """Its job is QEMU's until it has noted what came of it."""
    vm = Managed(working())

    def ends():
        vm.drawn.device("d1")
        vm.drawn.job(COMMIT, "commit", "concluded")

    def notes():
        vm.said = "/i/d1", "/i/d1"
        vm.drawn.jobs.clear()

    vm.happens = [lambda: None, ends, lambda: None, notes]
    assert await agree(vm, of_pivot(), None, "vda") is True
    assert vm.sent == []


@pytest.mark.parametrize("later", ["/i/d0", None])
async def test_what_it_has_forgotten_is_taken_back(later):
    """The guest is paused: both images hold the same."""
    vm = Managed(moved(), "/i/d0", later)
    assert await agree(vm, of_pivot(), vm, "vda") is False
    assert (vm.sent, vm.marks) == (["d0"], [])


@pytest.mark.parametrize("said", [("/i/x", "/i/x"), ("/i/d0", "/i/d1")])
async def test_they_do_not_come_to_agree(said):
    vm = Managed(moved(), *said)
    with pytest.raises(StalledError, match="do not name the same image"):
        await agree(vm, of_pivot(), None, "vda")
    assert vm.sent == []


async def test_a_snapshot_of_the_base_since_is_agreed_on():
    """The guest was back there: the top is stale, which is noted likewise."""
    drawn = chain("theirs", "d1")
    vm = Managed(drawn.image("d0").device("theirs"), "/i/theirs", "/i/theirs")
    assert await agree(vm, of_pivot(), vm, "vda") is True
    assert (vm.sent, vm.marks) == ([], [{"pivoted": True}])


async def test_a_snapshot_of_the_top_since_is_agreed_on():
    vm = Managed(chain("theirs", "d0", "d1"), "/i/theirs", "/i/theirs")
    assert await agree(vm, of_pivot(), vm, "vda") is False
    assert (vm.sent, vm.marks) == ([], [])


async def test_that_the_guest_is_on_neither_image_is_said():
    """Somebody has had it committed to what lies below both."""
    vm = Managed(chain("d0", "d1").image("below").device("below"), "/i/below", "/i/below")
    assert await agree(vm, of_pivot(), vm, "vda") is None
    assert (vm.sent, vm.marks) == ([], [])


async def test_a_disk_that_was_unplugged_is_nowhere():
    drawn = moved()
    drawn.devices.clear()
    assert await agree(Managed(drawn), of_pivot(), None, "vda") is False


class Two(Managed):
    """One with two disks, which go over to copies."""

    PATHS = ("/machine/peripheral/vd0", "/machine/peripheral/vd1")

    def __init__(self):
        drawn = chain("d0").image("d1").image("t0").image("t1").device("d1", "vd1")
        super().__init__(drawn.device("d0", "vd0"))
        self.names = {"vda": "/i/d0", "vdb": "/i/d1"}
        self.held = []
        self.forgets = ""
        self.monitor.in_one_turn = contextlib.nullcontext
        self.monitor.subscribe = self.stops

    @contextlib.contextmanager
    def stops(self, name):
        assert name == "STOP"
        yield SimpleNamespace(pending=list)

    async def files(self):
        return self.names, self.names

    async def pivot(self, name):
        number = {"vda": 0, "vdb": 1}[name]
        self.sent.append(f"pivot {name}")
        self.drawn.device(f"t{number}", f"vd{number}")
        if name != self.forgets:
            self.names = self.names | {name: f"/i/t{number}"}

    async def suspend(self):
        self.sent.append("suspend")

    async def resume(self):
        self.sent.append("resume")

    async def execute(self, command, arguments=None):
        if command == "query-status":
            paused = "suspend" in self.sent
            return {"running": not paused, "status": "paused" if paused else "running"}
        if command == "qom-set":
            self.sent.append((arguments["path"], arguments["value"]))
            self.drawn.device(arguments["value"], arguments["path"].rpartition("/")[2])
        return {}

    def record(self):
        return record(
            "copy by its manager",
            devices=self.PATHS,
            names=("vd0", "vd1"),
            nodes=(PAUSED,),
            files=("/i/t0", "/i/t1"),
            managed_as=("vda", "vdb"),
            sources=("d0", "d1"),
            source_files=("/i/d0", "/i/d1"),
        )


async def test_the_guest_goes_on_when_all_disks_are_over():
    vm = Two()
    await pivot(vm, vm.record(), vm, "vda", "vdb")
    assert vm.sent == ["suspend", "pivot vda", "pivot vdb", "resume"]
    assert vm.marks == [{"pivoted": True}]


async def test_of_two_one_is_forgotten():
    """That goes back; the other one is over; the guest waits for whoever undoes it."""
    vm = Two()
    vm.forgets = "vdb"
    with pytest.raises(Error, match="forgotten its pivot of vdb"):
        await pivot(vm, vm.record(), vm, "vda", "vdb")
    assert vm.sent == ["suspend", "pivot vda", "pivot vdb", (Two.PATHS[1], "d1")]
    assert vm.marks == []
    its = vm.record()
    assert [its.passage(name).is_over(vm.drawn.graph()) for name in ("vda", "vdb")] == [True, False]


def goes_elsewhere(vm):
    vm.drawn.image("below").device("below", "vd0")
    vm.names = vm.names | {"vda": "/i/below"}


async def test_that_somebody_has_changed_the_disk_as_it_pivoted_is_said():
    vm = Two()

    async def pivots(name):
        goes_elsewhere(vm)

    vm.pivot = pivots
    with pytest.raises(GraphError, match="somebody else has changed the images of vda"):
        await pivot(vm, vm.record(), vm, "vda")
    assert vm.marks == []


@pytest.mark.parametrize("refuses", [True, False])
async def test_that_somebody_has_changed_the_disk_as_it_was_to_move_up_is_said(refuses):
    vm = Two()

    async def snapshot(files):
        goes_elsewhere(vm)
        if refuses:
            raise Error("no snapshot was taken")

    vm.snapshot = snapshot
    said = "no snapshot was taken" if refuses else "somebody else has changed the images of vda"
    its = of_pivot(top="over", top_file="/i/over", base="d0", base_file="/i/d0")
    with pytest.raises(Error, match=said):
        await move_up(vm, its, None, "vda")


async def test_its_job_is_given_up():
    vm = Managed(working())
    await give_up(vm, of_pivot(), "vda")
    assert vm.sent == ["vda", "vda"]


async def test_one_that_it_does_not_give_up_is_said():
    vm = Managed(working())

    async def refuse(name):
        raise Error("it is busy")

    vm.abort = refuse
    with pytest.raises(StalledError, match="does not give up"):
        await give_up(vm, of_pivot(), "vda")


async def test_by_another_monitor_nothing_is_done():
    vm = Managed(moved(), lent=False)
    for asked in (agree(vm, of_pivot(), None, "vda"), give_up(vm, of_pivot(), "vda")):
        with pytest.raises(UnsupportedError, match="by the manager itself") as refused:
            await asked
        assert "qmpblock recover unix:/run/vm.qmp" in refused.value.remedy


async def test_an_overlay_of_ours_stays_where_it_has_forgotten_that_it_went_home():
    """Until the VM is started again it takes the disk for busy (K41)."""
    vm = Managed(chain("d0", "d1"))

    async def ready(name):
        return True

    vm.ready = ready
    assert await bring_home(vm, of_pivot(), None, "vda") is False
    assert vm.sent == []


def of_layers(*files):
    """Return a VM whose manager knows these layers, and refuses to commit any."""
    vm = Managed(chain("d0", "d1"))

    async def ready(name):
        return False

    async def layers(name):
        return [(file, f"{name}[{len(files) - at}]") for at, file in enumerate(files)]

    async def commit(name, base, top, *, active):
        vm.sent.append((name, base, top, active))
        raise Error("no")

    vm.ready, vm.layers, vm.commit = ready, layers, commit
    return vm


@pytest.mark.parametrize("files", [["/i/d1"], ["/i/d0", "/i/theirs", "/i/d1"]])
async def test_an_overlay_that_lies_elsewhere_for_it_is_not_brought_home(files):
    """It knows of none, or somebody has put a layer between."""
    vm = of_layers(*files)
    with pytest.raises(Error, match="does not know /i/d1 as the layer of vda below /i/d0"):
        await bring_home(vm, of_pivot(), None, "vda")
    assert vm.sent == []


async def test_it_is_told_which_layer_comes_home_and_where():
    """So it refuses where somebody has put a layer on it."""
    vm = of_layers("/i/d0", "/i/d1", "/i/d2")
    with pytest.raises(Error, match="no"):
        await bring_home(vm, of_pivot(), None, "vda")
    assert vm.sent == [("vda", "vda[2]", "vda[3]", True)]


async def test_an_overlay_of_ours_waits_for_somebody_elses_job():
    """Also where that is ready to pivot, as a copy of libvirt's is."""
    vm = Managed(chain("d0", "d1").job("backup-vda", "backup", "running", "d0", "d1"))

    async def ready(name):
        return True

    async def layers(name):
        return [("/i/d0", f"{name}[2]"), ("/i/d1", f"{name}[1]")]

    vm.ready, vm.layers = ready, layers
    with pytest.raises(BusyError, match="somebody else's job is at work on vda"):
        await bring_home(vm, of_pivot(), None, "vda")
    assert vm.sent == []


@pytest.mark.parametrize("choice", list(Choice))
def test_what_is_left_of_it_when_its_controller_died(choice):
    its = of_pivot()

    def left(drawn):
        return [(step.verb, step.what) for step in steps(its, drawn.graph(), choice)]

    assert left(chain("d0", "d1")) == []
    assert left(working()) == [("give-up", "vda")]
    assert left(working().image(PAUSED)) == [("give-up", "vda")]
    assert left(chain("d0", "d1").image(PAUSED)) == [("agree", "vda")]
    assert left(moved()) == [("agree", "vda")]  # a manager that knows has closed the top
    known = chain("d1")
    assert left(known) == []
    assert left(known.image(PAUSED)) == [("agree", "vda")]


def test_which_image_holds_all_when_qemu_died():
    its = of_pivot(images=("/i/d0", "/i/d1"))
    before, after = its.verdict([], {}), its.verdict([{"pivoted": True}], {})
    assert (before.start, before.stale) == (("/i/d0",), ())
    assert (after.start, after.stale) == (("/i/d1",), ("/i/d0",))
    assert all("virsh domblklist" in one.why for one in (before, after))


def test_a_reader_besides_the_managers_job_is_seen():
    its = of_pivot()
    its.check_readers(working().graph())
    with pytest.raises(Error, match="export theirs"):
        its.check_readers(working().export("theirs", "d1").graph())
