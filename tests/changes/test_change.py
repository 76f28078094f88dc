"""The frame around a change, against a fake QEMU. Real ones: live/test_killing.py and others."""

import os
from dataclasses import replace

import pytest
from drawing import RUN, chain, record
from fake_objects import dead, fake_vm

from qmpblock.changes.change import Change
from qmpblock.changes.identity import identify
from qmpblock.changes.journal import Journal
from qmpblock.changes.leftovers import make_way, record_of
from qmpblock.errors import BusyError, Error, RecordError
from qmpblock.host.processes import boot_id, start_time
from qmpblock.names import lock_name, lock_names, new_run
from qmpblock.qemu.lock import Holder

LOCK = "qmpblock-disk-vd0"


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    where = tmp_path / "state"
    monkeypatch.setenv("QMPBLOCK_STATE", str(where))
    return where


# names


def test_a_lock_is_named_for_its_disk():
    graph = chain("d0").device("d0", "/machine/unattached/device[3]").graph()
    named, anonymous = (lock_name(device) for device in graph.devices)
    assert named == LOCK
    assert anonymous.startswith("qmpblock-disk--")
    assert "/" not in anonymous  # an object's id has none
    assert lock_names(graph.devices) == tuple(sorted((named, anonymous)))


def test_an_anonymous_disk_is_not_taken_for_one_of_that_id():
    """A qdev id cannot begin with a dash: it is what tells them apart."""
    graph = chain("d0").device("d0", "/machine/unattached/device[3]").graph()
    anonymous = lock_name(graph.devices[1])
    other = chain("d0").device("d0", anonymous.removeprefix("qmpblock-disk--")).graph()
    assert lock_name(other.devices[1]) != anonymous


def test_run_ids_are_what_a_record_takes():
    runs = {new_run() for _ in range(100)}
    assert len(runs) == 100
    for run in runs:
        assert record_of(Holder.me(run, record=record(run=run).as_json())) is not None


@pytest.mark.parametrize(
    "details",
    [
        {"record": None},
        {"record": {}},
        {"record": record(run="cafebabe").as_json()},  # another run's words in its mouth
        {"record": record(nodes=("disk0",)).as_json()},
    ],
)
def test_a_holder_that_does_not_say(details):
    with pytest.raises(RecordError, match="the lock qmpblock-disk-vd0 in this VM") as caught:
        record_of(Holder.me(RUN, **details), LOCK)
    assert f'object-del {{"id": "{LOCK}"}}' in caught.value.remedy


def test_a_holder_that_is_about_nothing_yet():
    assert record_of(Holder.me(RUN)) is None


async def test_which_qemu_it_is(tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
        found = await identify(vm)
        assert (found.pid, found.start) == (os.getpid(), start_time(os.getpid()))
        assert found.boot == boot_id()
        asked = len(qemu.fake.seen)
        assert await identify(vm) == found
        assert len(qemu.fake.seen) == asked  # it stays the same as long as the connection
    async with fake_vm(tmp_path / "r", chain("d0")) as (vm, qemu):
        qemu["query-uuid"] = {"return": {"UUID": "../../../etc/x"}}  # it is in a file's name
        assert (await identify(vm)).uuid == "unknown"


# begin and end


async def test_it_leaves_nothing_when_it_ends(tmp_path, state):
    image = tmp_path / "image"
    # The peer is this very process: it has its image open.
    with image.open("wb"):
        await _begin_and_end(tmp_path, state, image)


async def test_beside_an_image_that_qemu_has_not_open_nothing_is_written(tmp_path, state):
    """Somebody has put another directory in the place of the image's."""
    image = tmp_path / "image"
    with image.open("wb"):
        image.rename(tmp_path / "moved")
        image.write_text("another")
        async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
            with pytest.raises(Error, match="is not the file that QEMU has open"):
                await Change(vm, record(), beside=image).begin()
            assert qemu.objects == {}
    assert list(tmp_path.glob("*.journal")) == []
    assert list(state.glob("*.journal")) == []


async def _begin_and_end(tmp_path, state, image):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
        change = Change(vm, record(), beside=image)
        await change.begin()
        assert record_of(Holder.from_text(qemu.objects[LOCK])) == change.record
        assert len(change.journal.paths) == 2
        assert all(path.exists() for path in change.journal.paths)
        await change.end()
        assert qemu.objects == {}
        assert list(state.glob("*.journal")) == []
        assert list(tmp_path.glob("*.journal")) == []
        await change.end()  # idempotent


async def test_the_lock_comes_before_the_journal_and_goes_after_it(tmp_path, monkeypatch):
    """A journal without a lock belongs to a QEMU that is gone."""
    seen = []
    create, remove = Journal.create, Journal.remove
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):

        def noting_create(*arguments):
            seen.append(("create", LOCK in qemu.objects))
            return create(*arguments)

        def noting_remove(journal):
            seen.append(("remove", LOCK in qemu.objects))
            remove(journal)

        monkeypatch.setattr(Journal, "create", noting_create)
        monkeypatch.setattr(Journal, "remove", noting_remove)
        change = Change(vm, record())
        await change.begin()
        await change.end()
    assert seen == [("create", True), ("remove", True)]


TWO = {"locks": (LOCK, "qmpblock-disk-vd1")}


@pytest.mark.parametrize("held", TWO["locks"])
async def test_a_living_controller_is_in_the_way_and_named(tmp_path, state, held):
    other = Holder.me("cafebabe", record=record(run="cafebabe").as_json())
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
        qemu.hold(held, other)
        with pytest.raises(BusyError, match=rf"process {os.getpid()} .*run cafebabe") as caught:
            await Change(vm, record(**TWO)).begin()
        assert qemu.objects == {held: other.text()}  # ours are given back, theirs is not
    assert caught.value.standing == "nothing was touched"
    assert not state.exists()


async def test_a_lock_of_another_host_is_never_taken(tmp_path):
    other = replace(dead("cafebabe"), boot="another machine's")
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
        qemu.hold(LOCK, other)
        with pytest.raises(BusyError):
            await Change(vm, record()).begin()
        assert qemu.objects == {LOCK: other.text()}


async def test_without_a_journal_nothing_begins(tmp_path, state):
    state.write_text("no directory")
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
        change = Change(vm, record(**TWO))
        with pytest.raises(Error, match="cannot write the journal"):
            await change.begin()
        assert qemu.objects == {}


def left_by_the_dead():
    """Return a VM in which a controller died in the middle of a stream, and its record."""
    drawing = chain("d0", "d1").job("qmpblock-cafebabe-stream", "stream", "running", "d0")
    its = record(run="cafebabe", job="qmpblock-cafebabe-stream", keeper="d0", top="d0", base="")
    return drawing, its


@pytest.mark.parametrize("journal", [True, False])
async def test_what_a_dead_controller_left_is_undone_first(tmp_path, state, journal):
    drawing, its = left_by_the_dead()
    async with fake_vm(tmp_path / "q", drawing) as (vm, qemu):
        its = replace(its, vm=await identify(vm))
        if journal:
            Journal.create(its)
        qemu.hold(LOCK, dead("cafebabe", record=its.as_json()))
        change = Change(vm, record())
        await change.begin()
        assert [verb for verb, _ in qemu.verbs] == ["job-cancel", "job-dismiss"]
        assert list(qemu.objects) == [LOCK]
        assert Holder.from_text(qemu.objects[LOCK]).run == RUN
        await change.end()
    assert list(state.glob("*.journal")) == []


async def test_a_dead_lock_that_says_nothing_is_taken(tmp_path):
    """Its controller died before it did anything."""
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
        qemu.hold(LOCK, dead("cafebabe"))
        change = Change(vm, record())
        await change.begin()
        await change.end()
        assert qemu.objects == {}


async def test_way_is_made_for_a_plan(tmp_path):
    drawing, its = left_by_the_dead()
    told = []
    async with fake_vm(tmp_path / "q", drawing) as (vm, qemu):
        await make_way(vm, [LOCK, "qmpblock-disk-free"])
        assert qemu.verbs == []
        qemu.hold(LOCK, dead("cafebabe", record=its.as_json()))
        await make_way(vm, [LOCK], told.append)
        assert [step.verb for step in told] == ["cancel", "dismiss"]
        assert qemu.objects == {}
        qemu.hold(LOCK, Holder.me("cafebabe"))
        with pytest.raises(BusyError):
            await make_way(vm, [LOCK])


async def test_adopting_takes_over_what_is_there(tmp_path, state):
    drawing, its = left_by_the_dead()
    dead_one = dead("cafebabe", record=its.as_json())
    async with fake_vm(tmp_path / "q", drawing) as (vm, qemu):
        qemu.hold(LOCK, dead_one)
        change = Change(vm, its)
        assert await change.adopt(dead_one, None)
        assert qemu.verbs == []  # its job goes on
        mine = Holder.from_text(qemu.objects[LOCK])
        assert (mine.run, mine.pid) == ("cafebabe", os.getpid())
        assert not mine.is_dead()
        assert list(state.glob("*.journal")) == []  # it had none: what a lock says makes no file
        await change.end()
        assert qemu.objects == {}


async def test_only_one_adopts(tmp_path):
    """Two run `recover --continue`; who comes second must not take it from the first."""
    drawing, its = left_by_the_dead()
    dead_one = dead("cafebabe", record=its.as_json())
    async with fake_vm(tmp_path / "q", drawing) as (vm, qemu):
        qemu.hold(LOCK, dead_one)
        first = replace(Holder.me("cafebabe", record=its.as_json()), pid=os.getppid())
        first = replace(first, start=start_time(first.pid))
        qemu.hold(LOCK, first)
        assert not await Change(vm, its).adopt(dead_one, None)
        assert qemu.objects == {LOCK: first.text()}
