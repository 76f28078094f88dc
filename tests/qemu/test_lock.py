"""Who holds a lock, and whether it is dead. The lock itself: live/test_lock.py."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace

import oldrecords
import pytest
from fake_objects import dead

from qmpblock import __version__
from qmpblock.errors import BusyError, CommandError, RecordError
from qmpblock.host.processes import start_time
from qmpblock.qemu import lock
from qmpblock.qemu.lock import Holder
from qmpblock.versioned import FORMAT, UnreadableError


def test_this_process_is_alive_and_reads_back():
    me = Holder.me("run1", path="/x")
    assert not me.is_dead()
    again = Holder.from_text(me.text())
    assert again == me
    assert again.details == {"path": "/x"}
    assert f"process {os.getpid()} on" in str(me)


def test_what_is_left_for_others_says_the_same_and_is_a_dead_ones():
    me = Holder.me("run1", path="/x")
    left = Holder.from_text(me.dead().text())
    assert left.is_dead()
    assert replace(left, start=me.start) == me


def test_a_process_that_ended_is_dead():
    code = "import sys; from qmpblock.qemu.lock import Holder; print(Holder.me('r').text())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Holder.from_text(done.stdout).is_dead()


def test_a_zombie_is_dead():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    try:
        me = Holder.me("r")
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert start_time(process.pid) is None
        assert replace(me, pid=process.pid, start=1).is_dead()
    finally:
        process.wait()


def test_a_reused_pid_is_not_its_predecessor():
    me = Holder.me("r")
    assert replace(me, start=me.start - 1).is_dead()


@pytest.mark.parametrize("change", [{"boot": "other"}, {"pids": "pid:[1]"}])
def test_what_cannot_be_told_counts_as_alive(change):
    assert not replace(Holder.me("r"), pid=1 << 30, **change).is_dead()


def test_an_abandoned_run_of_this_process_is_dead():
    me = Holder.me("abandoned-run")
    assert not me.is_dead()
    lock.abandon("abandoned-run")
    assert me.is_dead()
    assert not Holder.me("another").is_dead()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "[]",
        "{}",
        "not json",
        '{"run": 1}',
        Holder.me("r").text().replace('"pid":', '"pid":"x'),
        Holder.me("r").text().replace('"details":{}', '"details":5'),
    ],
)
def test_other_texts_are_none_of_ours(text):
    with pytest.raises(UnreadableError):
        Holder.from_text(text)


@pytest.mark.parametrize(
    "name", [one.name for one in fields(Holder) if one.name not in ("at", "more")]
)
def test_a_field_fewer_is_never_taken_for_a_free_lock(name):
    said = json.loads(Holder.me("r", path="/x").text())
    del said[name]
    with pytest.raises(UnreadableError, match=f"field {name} is absent"):
        Holder.from_text(json.dumps(said))


def test_a_field_more_is_kept():
    said = json.loads(Holder.me("r", path="/x").text()) | {"later": [1]}
    found = Holder.from_text(json.dumps(said))
    assert found.more == {"later": [1]}
    assert json.loads(found.text()) == said


def test_the_text_says_format_and_version():
    said = json.loads(Holder.me("r").text())
    assert (said["format"], said["version"]) == (FORMAT, __version__)


def test_a_newer_format_names_its_version():
    said = json.loads(Holder.me("r").text()) | {"format": FORMAT + 2, "version": "9.9"}
    with pytest.raises(UnreadableError, match=r"written by qmpblock 9\.9"):
        Holder.from_text(json.dumps(said))


def test_a_lock_from_before_there_was_a_format_is_read():
    found = Holder.from_text(oldrecords.LOCK)
    assert (found.run, found.host, found.more) == (oldrecords.RUN, "host", {})


class AtOnce:
    """A monitor, as far as it is to run several commands."""

    async def each(self, *commands):
        said = []
        for command, arguments in commands:
            try:
                said.append(await self.execute(command, arguments))
            except CommandError as error:
                said.append(error)
        return said


class Honest(AtOnce):
    """One with objects."""

    def __init__(self):
        self.objects = {}
        self.asked = []

    async def execute(self, command, arguments=None):
        name = arguments.get("id") or arguments["path"].rpartition("/")[2]
        self.asked.append((command, name))
        if command == "object-add":
            if name in self.objects:
                raise CommandError(command, arguments, "GenericError", "duplicate")
            self.objects[name] = arguments["data"]
        elif command == "object-del":
            if self.objects.pop(name, None) is None:
                raise CommandError(command, arguments, "GenericError", "not found")
        elif command == "qom-get":
            if name not in self.objects:
                raise CommandError(command, arguments, "DeviceNotFound", "not found")
            return self.objects[name]
        return [{"name": one, "type": "child<secret>"} for one in self.objects]


THREE = ("qmpblock-disk-a", "qmpblock-disk-b", "qmpblock-disk-c")


async def test_of_several_locks_the_first_says_what_they_are_for():
    """QEMU takes what they say in byte by byte."""
    monitor, me = Honest(), Holder.me("0123abcd", record="x" * 5000)
    await lock.acquire_all(monitor, THREE, me, None, stall=0)
    assert [await lock.read(monitor, name) for name in THREE] == [me, me, me]
    assert sum(len(text) for text in monitor.objects.values()) < 6500
    # A version from before that is not to take them for locks that say nothing.
    assert json.loads(monitor.objects[THREE[1]])["format"] > FORMAT
    del monitor.objects[THREE[0]]
    for name in THREE[1:]:
        assert "is to say, and does not" in await lock.read(monitor, name)
        with pytest.raises(RecordError):
            await lock.acquire(monitor, name, Holder.me("9876abcd"), None, stall=0)


@pytest.mark.parametrize("held", THREE)
async def test_several_locks_are_taken_all_or_none(held):
    monitor, other = Honest(), Holder.me("9876abcd", record="y")
    monitor.objects[held] = other.text()
    with pytest.raises(BusyError, match="9876abcd"):
        await lock.acquire_all(monitor, THREE, Holder.me("0123abcd"), None, stall=0)
    assert monitor.objects == {held: other.text()}
    given_back = [name for command, name in monitor.asked if command == "object-del"]
    assert given_back == sorted(given_back, reverse=True)


async def test_of_a_dead_ones_locks_each_tells_all_of_them():
    """Whoever wants one of its disks undoes what it did to the others, too."""
    monitor, undone = Honest(), []
    await lock.acquire_all(monitor, THREE, dead("deadbeef", record="z"), None, stall=0)

    async def undo(holder):
        undone.append((holder.run, holder.details))
        for name in reversed(THREE):
            monitor.objects.pop(name, None)

    me = Holder.me("0123abcd")
    await lock.acquire_all(monitor, THREE[1:], me, undo, stall=0)
    assert undone == [("deadbeef", {"record": "z"})]
    assert sorted(monitor.objects) == list(THREE[1:])
    assert await lock.read(monitor, THREE[2]) == me


async def test_a_lock_that_is_given_back_while_it_is_read_is_free():
    """It goes before the one that says what it is for."""
    monitor = Honest()
    await lock.acquire_all(monitor, THREE, Holder.me("0123abcd"), None, stall=0)
    execute = monitor.execute

    async def meanwhile(command, arguments=None):
        if arguments == {"path": f"/objects/{THREE[0]}", "property": "data"}:
            monitor.objects.clear()
        return await execute(command, arguments)

    monitor.execute = meanwhile
    assert await lock.read(monitor, THREE[1]) is None


def test_a_lock_sends_nobody_to_what_is_not_ours():
    text = Holder.me("0123abcd").beside("secret0").text()
    with pytest.raises(UnreadableError, match="none of ours"):
        Holder.from_text(text)


class Lying(AtOnce):
    """A monitor whose locks are each time held by another dead one."""

    def __init__(self, *, own=False):
        self.asked = []
        self.own = own  # whether the turns, too

    async def execute(self, command, arguments=None):
        self.asked.append(command)
        name = (arguments or {}).get("id") or (arguments or {}).get("path", "").rpartition("/")[2]
        if len(self.asked) > 5000:
            raise AssertionError("without end")
        if command == "object-add" and (self.own or "-undo-" not in name):
            raise CommandError(command, arguments, "GenericError", "attempt to add duplicate")
        if command == "qom-get":
            return dead(f"run{len(self.asked)}").text()
        return []


@pytest.mark.parametrize("own", [False, True])
async def test_locks_that_another_dead_one_holds_each_time_end(own):
    monitor = Lying(own=own)
    undone = []

    async def undo(holder):
        undone.append(holder.run)

    with pytest.raises(BusyError, match="another controller that died") as caught:
        await lock.acquire(monitor, "qmpblock-x", Holder.me("r"), undo, stall=60)
    assert caught.value.exit_code == 1
    assert "object-del" in caught.value.remedy
    assert len(monitor.asked) < 1000


async def test_so_many_that_died_one_after_the_other_are_undone():
    """Each killed while it undid the one before."""
    monitor, name, undone = Honest(), "qmpblock-x", []
    for n in range(12):
        monitor.objects[name] = dead(f"run{n}").text()
        name += f"-undo-run{n}"

    async def undo(holder):
        undone.append(holder.run)

    await lock.acquire(monitor, "qmpblock-x", Holder.me("r"), undo, stall=60)
    assert "run0" in undone
    assert list(monitor.objects) == ["qmpblock-x"]


async def test_a_crowd_of_turns_is_swept_only_so_far():
    class Crowd(Lying):
        async def execute(self, command, arguments=None):
            self.asked.append(command)
            if command == "qom-get":
                return dead("gone").text()
            crowd = [{"name": f"qmpblock-x-undo-{n}", "type": ""} for n in range(5000)]
            return crowd if command == "qom-list" else {}

    monitor = Crowd()
    await lock.acquire(monitor, "qmpblock-x", Holder.me("r"), None, stall=60)
    assert len(monitor.asked) < 600
    with pytest.raises(BusyError, match="5000 objects"):
        await lock.names(monitor)
