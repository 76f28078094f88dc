"""What other processes rely on, by their locks."""

import ctypes
import itertools
import os
import signal

import pytest
from imagelocks import lock

from qmpblock.graph.places import FileId
from qmpblock.host import filelocks
from qmpblock.host.filelocks import foreign_users, images_of
from qmpblock.host.openfiles import OpenFiles


@pytest.fixture
def other(tmp_path):
    """Have another process lock a byte of an image; yields a function."""
    image = tmp_path / "image"
    image.write_bytes(b"x")
    children = []

    def start(byte):
        ready, write = os.pipe()
        child = os.fork()
        if not child:
            # Killed with us; nothing of the test is to run here.
            ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
            with image.open("r+b") as file:
                lock(file, byte)
                os.write(write, b"x")
                os.close(write)
                signal.pause()
            os._exit(0)
        children.append(child)
        os.close(write)
        assert os.read(ready, 1) == b"x"
        os.close(ready)
        return child

    yield image, start
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)


def users(image):
    # The children count as foreign only if they are not this process.
    return foreign_users(OpenFiles(os.getpid()), FileId.of(image.stat()))


@pytest.mark.parametrize(("byte", "told"), [(201, True), (101, True), (100, False), (203, False)])
def test_who_writes_or_cannot_bear_it(other, byte, told):
    image, start = other
    child = start(byte)
    assert users(image) == (f"process {child}" if told else None)


def test_our_own_locks_are_not_foreign(other):
    image, start = other
    with image.open("r+b") as file:
        lock(file, 101)
        assert users(image) is None
        child = start(201)
        assert users(image) == f"process {child}"


def test_what_a_busy_host_locks_meanwhile_misleads_nobody(other, monkeypatch):
    """/proc/locks is no instant: a line of it comes twice, or not at all."""
    image, start = other
    with image.open("r+b") as file:
        lock(file, 101)
        whole = filelocks._everybodys
        times = itertools.cycle([2, 1, 0, 1])
        monkeypatch.setattr(filelocks, "_everybodys", lambda: (whole()[0] * next(times), False))
        for _ in range(8):
            assert users(image) is None
            assert filelocks.written([FileId.of(image.stat())])
        child = start(201)
        for _ in range(8):
            assert users(image) == f"process {child}"


def test_what_cannot_be_seen(other):
    image, _ = other
    assert foreign_users(OpenFiles(None), FileId.of(image.stat())) is None
    assert foreign_users(OpenFiles(os.getpid()), FileId(7, None)) is None


def test_images_are_told_from_other_files_by_their_locks(tmp_path):
    """A log that the VM has open is none; a shared lock is enough, as a backing file has it."""
    image, log = tmp_path / "image", tmp_path / "log"
    image.touch()
    with image.open("r+b") as file, log.open("w+b") as other:
        lock(other, 3)
        assert images_of(OpenFiles(os.getpid())) & {identity(image), identity(log)} == set()
        lock(file, 100)
        assert images_of(OpenFiles(os.getpid())) & {identity(image), identity(log)} == {
            identity(image)
        }
    assert images_of(OpenFiles(None)) == set()


def identity(path):
    return FileId.of(path.stat())
