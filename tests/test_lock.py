"""Who holds a lock, and whether it is dead. The lock itself: live/test_lock.py."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace

import oldrecords
import pytest

from qmpblock import __version__, lock
from qmpblock.hostprocess import start_time
from qmpblock.lock import Holder
from qmpblock.versioned import FORMAT, UnreadableError


def test_this_process_is_alive_and_reads_back():
    me = Holder.me("run1", path="/x")
    assert not me.is_dead()
    again = Holder.from_text(me.text())
    assert again == me
    assert again.details == {"path": "/x"}
    assert f"process {os.getpid()} on" in str(me)


def test_a_process_that_ended_is_dead():
    code = "import sys; from qmpblock.lock import Holder; print(Holder.me('r').text())"
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
        Holder.me("r").text().replace('"pid": ', '"pid": "x'),
        Holder.me("r").text().replace('"details": {}', '"details": 5'),
    ],
)
def test_other_texts_are_none_of_ours(text):
    with pytest.raises(UnreadableError):
        Holder.from_text(text)


@pytest.mark.parametrize("name", [one.name for one in fields(Holder) if one.name != "more"])
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
    said = json.loads(Holder.me("r").text()) | {"format": FORMAT + 1, "version": "9.9"}
    with pytest.raises(UnreadableError, match=r"written by qmpblock 9\.9"):
        Holder.from_text(json.dumps(said))


def test_a_lock_from_before_there_was_a_format_is_read():
    found = Holder.from_text(oldrecords.LOCK)
    assert (found.run, found.host, found.more) == (oldrecords.RUN, "host", {})
