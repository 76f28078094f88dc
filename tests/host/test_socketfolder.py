"""The directory for a socket of ours."""

import os
import socket
import stat

import pytest

from qmpblock.host.socketfolder import SocketFolder, remove_socket, temporary_directory
from qmpblock.host.statedirectory import InsecureError

NAME = "qmpblock-00c0ffee"


@pytest.fixture
def place(vm_dir):
    path = vm_dir / "tmp"
    path.mkdir(mode=0o700)
    return path


def test_it_is_made_and_removed(place):
    folder = SocketFolder(NAME, [str(place)])
    folder.remove()  # there is none yet
    assert not list(place.iterdir())
    folder.make()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(folder.socket)
        listener.listen()
        client.connect(folder.address().path)
    assert stat.S_IMODE((place / NAME).stat().st_mode) == 0o700
    before = len(os.listdir("/proc/self/fd"))
    folder.remove()
    folder.remove()
    assert not list(place.iterdir())
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_one_that_stays_is_nobody_elses_and_can_be_removed_later(place):
    folder = SocketFolder(NAME, [str(place)])
    folder.make()
    before = len(os.listdir("/proc/self/fd"))
    folder.leave()
    folder.remove()
    assert stat.S_IMODE((place / NAME).stat().st_mode) == 0o700
    assert len(os.listdir("/proc/self/fd")) == before - 1
    remove_socket(folder.socket)
    assert not list(place.iterdir())


def test_what_is_there_already_is_not_taken_for_ours(place):
    (place / NAME).mkdir()
    folder = SocketFolder(NAME, [str(place)])
    with pytest.raises(FileExistsError):
        folder.make()
    folder.remove()
    assert (place / NAME).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="it is about what root trusts")
def test_where_others_could_replace_it_it_is_not_made(place, vm_dir):
    other = vm_dir / "other"
    other.mkdir()
    for spoil in (lambda: place.chmod(0o777), lambda: os.chown(place, 61666, 61666)):
        place.chmod(0o755)
        assert SocketFolder(NAME, [str(place), str(other)]).path == place / NAME
        spoil()
        assert SocketFolder(NAME, [str(place), str(other)]).path == other / NAME
        with pytest.raises(InsecureError):
            SocketFolder(NAME, [str(place)]).make()
    assert not list(place.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="it is about what root trusts")
def test_a_demonstration_is_not_made_where_another_could_replace_it(place, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(place))
    assert temporary_directory("qmpblock-demo-12345678/vm") == str(place)
    os.chown(place, 61666, 61666)
    assert temporary_directory("qmpblock-demo-12345678/vm") == "/tmp"


def test_a_sticky_directory_does(place):
    place.chmod(0o1777)
    folder = SocketFolder(NAME, [str(place)])
    folder.make()
    folder.remove()


def test_a_path_that_is_too_long_for_a_socket_is_none(place, vm_dir):
    deep = vm_dir / ("d" * 90)
    deep.mkdir()
    assert SocketFolder(NAME, [str(deep), str(place)]).path == place / NAME


def test_a_link_in_the_place_of_our_directory_removes_no_socket(tmp_path):
    """Root removed any UNIX socket of the host to which such a link led."""
    (tmp_path / "run").mkdir(mode=0o755)
    with socket.socket(socket.AF_UNIX) as victim:
        victim.bind(str(tmp_path / "run" / "nbd"))
    (tmp_path / "qmpblock-deadbeef").symlink_to("run")
    remove_socket(str(tmp_path / "qmpblock-deadbeef" / "nbd"))
    assert (tmp_path / "run" / "nbd").is_socket()
    assert (tmp_path / "qmpblock-deadbeef").is_symlink()


def test_a_socket_of_ours_goes_with_its_directory(tmp_path):
    folder = tmp_path / "qmpblock-deadbeef"
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as ours:
        ours.bind(str(folder / "nbd"))
    remove_socket(str(folder / "nbd"))
    assert not folder.exists()
    folder.mkdir(mode=0o700)
    (folder / "nbd").write_text("no socket")
    remove_socket(str(folder / "nbd"))
    assert (folder / "nbd").exists()
