"""The content of a disk as the standard input of a command, without a VM."""

import asyncio
import hashlib
import os
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmpblock.copying.exporting import Export, _environment, _Input, _Pipe
from qmpblock.errors import Error, NBDRequestError
from qmpblock.host.qemunbd import QemuNbd
from qmpblock.host.usercommand import UserCommand

MIB = 1 << 20


class Failing:
    """A client whose server fails from some place on."""

    contexts = ()
    size = 64 * MIB

    def __init__(self, readable):
        self.readable = readable

    async def read(self, offset, length):
        if offset + length > self.readable:
            raise NBDRequestError(f"read {offset}+{length}", 22)
        return bytearray(length)


@asynccontextmanager
async def running(client, script):
    pipe = _Pipe(client)
    try:
        command = await UserCommand.start(["sh", "-c", script], os.environ, stdin=pipe.given)
        pipe.has_been_given()
        try:
            yield pipe, Export(command, pipe)
        finally:
            await command.end()
    finally:
        pipe.close()


@asynccontextmanager
async def image(path, size, *places):
    with path.open("wb") as file:
        file.truncate(size)
        for at in places:
            file.seek(at)
            file.write(os.urandom(MIB))
    leaf = {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}
    async with QemuNbd().serving(leaf) as client:
        yield client


async def test_all_of_it_holes_as_zeros(tmp_path):
    path = tmp_path / "image"
    async with (
        image(path, 40 * MIB + 512, 0, 3 * MIB + 512, 39 * MIB + 512) as client,
        running(client, f"sha256sum > {tmp_path}/sum") as (pipe, export),
    ):
        assert await export.wait() == 0
        assert await export.wait() == 0  # again
        assert pipe.sent == path.stat().st_size
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / "sum").read_text().split()[0] == wanted


async def test_a_slow_reader_is_waited_for(tmp_path):
    script = f"sleep 0.3; head -c {5 * MIB} > /dev/null; sleep 0.3; wc -c > {tmp_path}/rest"
    async with (
        image(tmp_path / "image", 20 * MIB, 0, 9 * MIB) as client,
        running(client, script) as (pipe, export),
    ):
        assert await export.wait() == 0
        assert pipe.sent == 20 * MIB
    assert int((tmp_path / "rest").read_text()) == 15 * MIB


@pytest.mark.parametrize("script", ["exit 3", "exec 0<&-; exit 3", "head -c 1 > /dev/null; exit 3"])
async def test_what_it_does_not_want_is_not_forced_on_it(script, tmp_path):
    async with (
        image(tmp_path / "image", 40 * MIB) as client,
        running(client, script) as (pipe, export),
    ):
        assert await export.wait() == 3
        assert pipe.sent < 40 * MIB


async def test_what_it_has_left_behind_does_not_hold_us(tmp_path):
    script = (
        f"(until test -e {tmp_path}/go; do sleep 0.02; done; cat > /dev/null) < /dev/stdin & true"
    )
    async with image(tmp_path / "image", 40 * MIB) as client, running(client, script) as made:
        async with asyncio.timeout(60):
            assert await made[1].wait() == 0
        (tmp_path / "go").touch()


async def test_a_part_is_never_taken_for_the_whole(tmp_path):
    """By the command itself, nor by what it has started."""
    script = f"(cat > {tmp_path}/copy; touch {tmp_path}/done) | cat; touch {tmp_path}/done"
    async with running(Failing(20 * MIB), script) as (pipe, export):
        with pytest.raises(Error, match="could not be read to its end") as caught:
            await export.wait()
    assert "do not rely on what it made" in caught.value.standing
    assert MIB < pipe.sent <= 20 * MIB
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


async def test_cancelled_it_leaves_the_command(tmp_path):
    command = await UserCommand.start(["sleep", "1000"], os.environ)
    waiting = asyncio.ensure_future(Export(command, _Input()).wait())
    try:
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert Path(f"/proc/{command._process.pid}").exists()
    finally:
        await command.end()


def test_what_it_finds_in_its_environment(monkeypatch):
    for name in ("NBD_URI", "NBD_URI_3"):
        monkeypatch.setenv(name, "of an export around this one")
    monkeypatch.setenv("NBD_URI_OF_MINE", "kept")
    found = _environment(["nbd://a", "nbd://b"])
    assert {name: value for name, value in found.items() if name.startswith("NBD_URI")} == {
        "NBD_URI": "nbd://a",
        "NBD_URI_1": "nbd://a",
        "NBD_URI_2": "nbd://b",
        "NBD_URI_OF_MINE": "kept",
    }
    assert found["PATH"] == os.environ["PATH"]
