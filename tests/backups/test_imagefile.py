"""One image file of a backup: whether it is what its backup says, at once or by all of it."""

import asyncio
import hashlib
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from backuppoints import disk, point

from qmpblock.backups import imagefile
from qmpblock.backups.directory import open_backups
from qmpblock.backups.imagefile import digest_of, first_broken, why_wrong
from qmpblock.backups.point import Image

DATA = bytes(range(256)) * 100_000


@pytest.fixture
def there(tmp_path):
    """An image in a directory, and what its backup says of it."""
    file = tmp_path / "a.qcow2"
    file.write_bytes(DATA)
    state = file.stat()
    backup = replace(
        disk("vd0", "a.qcow2"),
        length=len(DATA),
        modified=state.st_mtime_ns,
        digest=hashlib.blake2b(DATA, digest_size=32).hexdigest(),
    )
    with open_backups(tmp_path) as backups:
        yield backups, Image(point("20261130T110500Z", [backup]), backup), file


def touch_up(file, state):
    """Give a file the time at which it was written to last before."""
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


async def test_the_digest_of_a_file(tmp_path):
    """Of one of several pieces, and of one of none; b2sum -l 256 says the same."""
    told = []
    for data in (DATA, b""):
        (tmp_path / "x").write_bytes(data)
        with (tmp_path / "x").open("rb") as file:
            found = await digest_of(file.fileno(), told.append)
        assert found == hashlib.blake2b(data, digest_size=32).hexdigest()
    assert sum(told) == len(DATA)
    assert len(told) > 1


async def test_whoever_is_cancelled_closes_nothing_that_is_being_read(tmp_path, monkeypatch):
    """Or its thread would go on with whatever got that number next."""
    file, other = tmp_path / "x", tmp_path / "y"
    file.write_bytes(DATA)
    other.write_bytes(b"another")
    reading, on, found = threading.Event(), threading.Event(), []
    read = os.pread

    def slowly(fd, length, at):
        reading.set()
        on.wait()
        found.append(os.fstat(fd).st_ino)
        return read(fd, length, at)

    with monkeypatch.context() as patched:
        patched.setattr(imagefile.os, "pread", slowly)
        fd = os.open(file, os.O_RDONLY)
        digest = asyncio.ensure_future(digest_of(fd))
        await asyncio.to_thread(reading.wait)
        threads = {one for one in threading.enumerate() if one is not threading.main_thread()}
        digest.cancel()
        await asyncio.wait({digest})
        os.close(fd)
        again = os.open(other, os.O_RDONLY)
        assert again == fd
        on.set()
        for one in threads:
            if one.name.startswith("ThreadPoolExecutor"):
                await asyncio.to_thread(one.join)
    os.close(again)
    assert digest.cancelled()
    assert found == [file.stat().st_ino]
    assert not any(
        Path(f"/proc/self/fd/{n}").exists() and os.path.samestat(os.fstat(n), file.stat())
        for n in map(int, os.listdir("/proc/self/fd"))
    )


async def test_what_it_was(there):
    backups, image, _ = there
    assert await why_wrong(backups, image) is None
    assert await first_broken(backups, (image,)) is None


async def test_it_is_gone(there):
    backups, image, file = there
    file.unlink()
    assert await why_wrong(backups, image) == "a.qcow2 is gone"
    assert await first_broken(backups, (image,)) == "a.qcow2 is gone"
    file.symlink_to("/dev/zero")
    assert await why_wrong(backups, image) == "a.qcow2 is gone"


async def test_it_is_shorter(there):
    backups, image, file = there
    file.write_bytes(DATA[:-1])
    assert "has 25599999 bytes, and had 25600000" in await first_broken(backups, (image,))


async def test_a_byte_is_another(there):
    backups, image, file = there
    state = file.stat()
    file.write_bytes(DATA[:5000] + b"?" + DATA[5001:])
    assert await why_wrong(backups, image) == "a.qcow2 holds something else than it did"
    assert await first_broken(backups, (image,)) == "a.qcow2 holds something else than it did"
    touch_up(file, state)  # as a medium does that goes bad
    assert await why_wrong(backups, image) == "a.qcow2 holds something else than it did"


async def test_what_was_only_copied_is_what_it_was(there, monkeypatch):
    """Its time is another one; so its digest is taken, and of nothing else."""
    backups, image, file = there
    taken = []

    async def digest(fd, tell=None):
        taken.append(fd)
        return image.backup.digest

    with monkeypatch.context() as patch:
        patch.setattr(imagefile, "digest_of", digest)
        assert await first_broken(backups, (image,)) is None
        assert taken == []
        os.utime(file)
        assert await first_broken(backups, (image,)) is None
        assert len(taken) == 1
