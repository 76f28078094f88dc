"""Post-copy, as QEMU has it: where it holds, and what a source does that loses its destination."""

import asyncio
import contextlib
import struct

import pytest
from disturbed import until

from qmpblock.errors import CommandError

pytestmark = pytest.mark.live

MIB = 1 << 20
SHUT = 1  # of the return path's messages: all is there
SOURCE = ("events", "pause-before-switchover", "postcopy-ram", "return-path")
ROOM = ["-m", "64"]
NEWER = pytest.mark.needs_qemu(">= 10", reason="older ones wait for ever")
OLDER = pytest.mark.needs_qemu("< 10", reason="newer ones go on by themselves")


class Wire:
    """Passes on what goes between two QEMUs, but for the destination's last word: it has all."""

    def __init__(self, here, there):
        self._here, self._there = here, there
        self._tasks = set()

    async def __aenter__(self):
        self._server = await asyncio.start_unix_server(self._connected, self._here)
        return self

    async def __aexit__(self, *_):
        await self.cut()

    async def cut(self):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        back, there = await asyncio.open_unix_connection(self._there)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, there))
                group.create_task(self._pass_back(back, writer))
        finally:
            for one in (writer, there):
                one.transport.abort()

    async def _pass_on(self, reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(64 << 10):
                writer.write(data)
                await writer.drain()

    async def _pass_back(self, reader, writer):
        """Pass on the messages of the return path: type, length, and so many bytes."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readexactly(4)
                kind, length = struct.unpack(">HH", head)
                body = await reader.readexactly(length)
                if kind != SHUT:
                    writer.write(head + body)


async def shown(vm):
    migration = (await vm.execute("query-migrate")).get("status", "none")
    return (await vm.execute("query-status"))["status"], migration


async def allow(vm, *names):
    states = [{"capability": name, "state": True} for name in names]
    await vm.execute("migrate-set-capabilities", capabilities=states)


async def comes_to(vm, *migration):
    async def there():
        return (await shown(vm))[1] in migration

    await until(there, f"{migration}")


@pytest.fixture
def pair(begin, start_destination, vm_dir):
    """Give what starts a pair, and has the source hold its guest for the switch."""

    @contextlib.asynccontextmanager
    async def held(*, stopped=False, slow=False):
        source = await begin(extra=ROOM)
        await source.guest.dirty(24)  # so that there is something left at the switch
        destination = await start_destination(source, extra=ROOM)
        for vm in (source, destination):
            vm.expect_exit()
        try:
            await allow(destination, "postcopy-ram")
        except CommandError as error:
            pytest.skip(f"no post-copy here: {error.description}")
        await allow(source, *SOURCE)
        limits = {"max-bandwidth": MIB, "max-postcopy-bandwidth": MIB if slow else 0}
        await source.execute("migrate-set-parameters", **limits)
        there, here = str(vm_dir / "there"), str(vm_dir / "here")
        await destination.execute("migrate-incoming", uri=f"unix:{there}")
        async with Wire(here, there) as wire:
            await source.execute("migrate", uri=f"unix:{here}")
            await comes_to(source, "active")
            if stopped:
                await source.execute("stop")
            await source.execute("migrate-start-postcopy")
            await comes_to(source, "pre-switchover")
            assert await shown(source) == ("finish-migrate", "pre-switchover")
            assert await shown(destination) == ("inmigrate", "active")
            await source.execute("migrate-continue", state="pre-switchover")
            yield source, destination, wire
        await source.kill()
        await destination.kill()

    return held


async def all_is_there(source, destination):
    """Have the guest run there, whose source has not heard that it has all."""
    await comes_to(destination, "completed")
    assert (await shown(destination))[0] == "paused"  # -S
    await destination.execute("cont")
    await comes_to(source, "postcopy-active")
    assert (await shown(source))[0] == "finish-migrate"


@NEWER
@pytest.mark.parametrize("stopped", [False, True])
async def test_the_source_goes_on_beside_it(pair, stopped):
    """Unless its guest was stopped before: then it is for whoever continues it."""
    async with pair(stopped=stopped) as (source, destination, wire):
        await all_is_there(source, destination)
        await wire.cut()
        await comes_to(source, "failed")
        assert (await shown(source))[0] == ("paused" if stopped else "running")
        assert (await shown(destination))[0] == "running"


@OLDER
async def test_the_source_waits_for_ever(pair):
    async with pair(stopped=True) as (source, destination, wire):
        await all_is_there(source, destination)
        await wire.cut()
        with pytest.raises(CommandError, match="not finalized yet"):
            await source.execute("cont")
        assert await shown(source) == ("finish-migrate", "postcopy-active")


@OLDER
async def test_there_is_no_way_back_though_it_never_ran_there(pair):
    async with pair(stopped=True, slow=True) as (source, destination, wire):
        await comes_to(destination, "postcopy-active")
        assert (await shown(destination))[0] == "paused"
        await wire.cut()
        await comes_to(source, "postcopy-paused")
        with pytest.raises(CommandError, match="not finalized yet"):
            await source.execute("cont")
        assert (await shown(source))[0] == "finish-migrate"
