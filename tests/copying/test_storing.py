"""What is copied goes to storage meanwhile, and nobody waits for what hangs."""

import asyncio
import os
import threading
import time

import pytest

from qmpblock.copying import storing
from qmpblock.copying.devicetarget import DeviceTarget
from qmpblock.copying.plan import CopyPlan
from qmpblock.copying.targetfile import TargetFile
from qmpblock.errors import Error, StalledError
from qmpblock.graph.places import FileId
from qmpblock.host.ourfiles import Directory


@pytest.fixture
def target(tmp_path):
    (tmp_path / "copy.partial").write_bytes(b"x")
    with Directory(tmp_path) as directory:
        plan = CopyPlan(None, str(tmp_path / "copy"), "raw")
        made = FileId.of((tmp_path / "copy.partial").stat())
        yield TargetFile(plan, "node", directory, keeps_name=False, made=made)


@pytest.fixture
def seen(monkeypatch):
    """Take note of the files that are asked for, by their descriptors."""
    files = {}

    def begin(fd):
        files.setdefault(fd, []).append(os.readlink(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr(storing, "begin_writeback", begin)
    return files


async def until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "storing"]


async def test_again_and_again_while_it_lasts(target, seen):
    async with storing.storing([target]):
        await until(lambda: any(len(times) > 1 for times in seen.values()))
    [(fd, times)] = seen.items()
    assert set(times) == {target.path}
    assert not threads()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


async def test_a_device_by_a_descriptor_that_claims_nothing(tmp_path, seen):
    path = tmp_path / "device"
    path.write_bytes(b"x")
    with path.open("r+b") as claimed:
        target = DeviceTarget(CopyPlan(None, str(path), "raw"), "node", claimed.fileno())
        async with storing.storing([target]):
            await until(lambda: seen)
        [(fd, times)] = seen.items()
        assert set(times) == {str(path)}
        assert fd != claimed.fileno()
        os.fstat(claimed.fileno())  # which stays
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


async def test_where_it_cannot_be_had_nobody_minds(target, monkeypatch):
    def fail(fd):
        raise OSError(38, "no such call", fd)

    monkeypatch.setattr(storing, "begin_writeback", fail)
    async with storing.storing([target]):
        await until(lambda: not threads())


async def test_a_file_that_is_gone_is_none(target, seen):
    os.unlink(target.path)
    async with storing.storing([target]):
        await until(lambda: not threads())
    assert not seen


async def test_what_hangs_is_not_waited_for(target, monkeypatch):
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(fd):
        hangs.set()
        goes_on.wait()

    monkeypatch.setattr(storing, "begin_writeback", hang)
    monkeypatch.setattr(storing, "_PATIENCE", 0.1)
    async with storing.storing([target]):
        await until(hangs.is_set)
    assert threads()  # it hangs as before
    goes_on.set()
    await until(lambda: not threads())


async def test_what_is_there_is_brought_to_storage_now(target, monkeypatch):
    synced = []
    monkeypatch.setattr(storing.os, "fsync", lambda fd: synced.append(os.readlink(f"/dev/fd/{fd}")))
    assert await storing.store(target, 60) >= 0
    assert synced == [target.path]


async def test_that_fails(target, monkeypatch):
    def fail(fd):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(storing.os, "fsync", fail)
        with pytest.raises(Error, match=r"copy\.partial cannot be brought .* Input/output error"):
            await storing.store(target, 60)


async def test_that_hangs(target, monkeypatch):
    goes_on = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(storing.os, "fsync", lambda _: goes_on.wait())
        with pytest.raises(StalledError, match="has not been brought to stable storage"):
            await storing.store(target, 0.05)
        goes_on.set()
        await until(lambda: not threads())
