"""The state directory: nobody but us can write there, whatever the umask is."""

import fcntl
import os
import signal
import stat
import subprocess
import sys

import pytest
from drawing import record

from qmpblock.changes.journal import Journal
from qmpblock.changes.survey import survey
from qmpblock.errors import Error
from qmpblock.host.statedirectory import InsecureError, StateDirectory

ROOT = os.geteuid() == 0


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    where = tmp_path / "a" / "b" / "state"
    monkeypatch.setenv("QMPBLOCK_STATE", str(where))
    return where


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o277], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_all_that_is_made_is_for_this_user_alone(state):
    Journal.create(record())
    key = StateDirectory.proven().key()
    for path in (state, *state.parents[:2]):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in state.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert StateDirectory.proven().key() == key
    assert len(key) == 32


def test_it_need_not_be_there(state):
    assert StateDirectory.proven() is None
    assert not state.parent.exists()
    state.parents[1].write_text("no directory")
    assert StateDirectory.proven() is None
    with pytest.raises(NotADirectoryError):
        StateDirectory.proven(make=True)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("mode", [0o702, 0o722])
def test_where_others_can_write_nothing_is_kept_or_believed(state, which, mode):
    Journal.create(record())
    (state, *state.parents)[which].chmod(mode)
    with pytest.raises(Error, match="is writable for others") as caught:
        Journal.create(record(run="cafebabe"))
    assert "chmod go-w" in str(caught.value)
    assert caught.value.standing == "nothing was changed"
    found = survey()
    assert found.journals == []
    assert ["is writable for others" in str(error) for error in found.unreadable] == [True]


@pytest.mark.skipif(not ROOT, reason="only root can make a directory that another user owns")
@pytest.mark.parametrize("which", [0, 1])
def test_what_another_user_has_is_none(state, which):
    Journal.create(record())
    os.chown((state, state.parent)[which], 4321, 4321)
    with pytest.raises(InsecureError, match="belongs to the user 4321"):
        StateDirectory.proven()


def test_a_sticky_directory_above_it_will_do(state):
    """As /tmp is: nobody can put another one in the place of ours there."""
    state.mkdir(parents=True, mode=0o700)
    state.parent.chmod(0o1777)
    assert StateDirectory.proven() is not None
    state.chmod(0o1777)
    with pytest.raises(InsecureError):
        StateDirectory.proven()


def test_links_of_ours_are_followed(state, tmp_path):
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    state.parent.mkdir(parents=True, mode=0o700)
    state.symlink_to("../../link")
    (tmp_path / "link").symlink_to(real)
    Journal.create(record())
    assert len(list(real.glob("*.journal"))) == 1
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(state)
    with pytest.raises(OSError, match="symbolic links"):
        StateDirectory.proven()


@pytest.mark.skipif(not ROOT, reason="only root can make a link that another user owns")
def test_links_of_others_are_not(state, tmp_path):
    state.parent.mkdir(parents=True, mode=0o700)
    (tmp_path / "real").mkdir()
    state.symlink_to(tmp_path / "real")
    os.lchown(state, 4321, 4321)
    with pytest.raises(InsecureError, match="belongs to the user 4321"):
        StateDirectory.proven(make=True)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_may_read_is_none(state, mode):
    state.mkdir(parents=True, mode=0o700)
    StateDirectory.proven().key()
    (state / "key").chmod(mode)
    with pytest.raises(InsecureError, match="no secret"):
        StateDirectory.proven().key()
    assert StateDirectory.proven().keys() == []


@pytest.mark.parametrize("trap", ["link", "fifo", "short"])
def test_what_is_no_key_is_none(state, tmp_path, trap):
    state.mkdir(parents=True, mode=0o700)
    key = state / "key"
    if trap == "link":
        (tmp_path / "real").write_bytes(bytes(32))
        key.symlink_to(tmp_path / "real")
    elif trap == "fifo":
        os.mkfifo(key, 0o600)
    else:
        key.write_bytes(bytes(31))
        key.chmod(0o600)
    with pytest.raises(OSError, match=r"is no"):
        StateDirectory.proven().key()


def test_keys_of_other_installations_can_be_brought(state):
    state.mkdir(parents=True, mode=0o700)
    mine = StateDirectory.proven().key()
    other = state / "otherhost.key"
    other.write_bytes(b"k" * 32)
    other.chmod(0o600)
    assert StateDirectory.proven().keys() == [mine, b"k" * 32]


DYING = """
import os, sys
from qmpblock.host.statedirectory import StateDirectory
directory = StateDirectory.proven(make=True)
real = getattr(os, sys.argv[1])
def die(*arguments, **named):
    if sys.argv[2] == "after":
        real(*arguments, **named)
    os.kill(os.getpid(), 9)
setattr(os, sys.argv[1], die)
directory.key()
"""


@pytest.mark.parametrize(
    ("call", "when"),
    [("write", "before"), ("fsync", "after"), ("link", "before"), ("link", "after")],
)
def test_what_is_left_of_a_key_whose_maker_was_killed_goes(state, call, when):
    done = subprocess.run([sys.executable, "-c", DYING, call, when], check=False)
    assert done.returncode == -signal.SIGKILL
    [left] = state.glob("key-*")
    made = (state / "key").read_bytes() if (state / "key").exists() else None
    held = state / "key-0123456789abcdef"  # of one that lives
    held.write_bytes(b"")
    for name in ("key-mine", "key-0123456789ABCDEF", "my-key-0123456789abcdee"):  # none of ours
        (state / name).write_bytes(b"")
    (state / "key-fedcba9876543210").mkdir()
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = StateDirectory.proven().key()
    assert made in (None, found)
    assert not left.exists()
    assert held.exists()
    assert len(list(state.glob("*key-*"))) == 5
    assert StateDirectory.proven().key() == found
    assert not held.exists()


def test_a_key_that_is_swept_while_it_is_made_is_made_again(state, monkeypatch):
    real, swept = fcntl.flock, []

    def flock(fd, how):
        for left in () if swept else state.glob("key-*"):
            left.unlink()
            swept.append(left)
        return real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    key = StateDirectory.proven(make=True).key()
    assert len(swept) == 1
    assert [path.name for path in state.iterdir()] == ["key"]
    assert (state / "key").read_bytes() == key
