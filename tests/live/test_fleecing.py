"""What QEMU's fleecing does: a view of a disk as it was, while the guest goes on.

By plain QMP, so that these are facts about QEMU and not about us.
"""

import asyncio
import contextlib
import signal
import socket

import pytest
from fleecing import (
    DISK,
    MIB,
    SPEC,
    TIMEOUT,
    begin_writing,
    copied_by_job,
    export,
    ran,
    read_out,
    read_plainly,
    server,
    view,
)
from rounds import rounds

from qmpblock.copying.viewnode import UNIT
from qmpblock.errors import DisconnectedError
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.testing.stamps import check_point_in_time

pytestmark = pytest.mark.live

_READERS = 4  # at once


async def wrong_copies(vm, count, copying):
    """Have a view copied `count` times, by a function that is given the file; tell how many fail.

    The guest writes as fast as it can all the time.
    """
    copy, wrong = vm.directory / "copy.raw", []
    for number in range(count):
        await vm.guest.write_zeroes(0, 0, 16 * MIB)
        await begin_writing(vm)
        async with view(vm) as bounds, server(vm) as path:
            await copying(copy, path)
        await vm.guest.stop_stress()
        found = check_point_in_time(copy.read_bytes(), SPEC, bounds)
        if not found.ok:
            wrong.append(f"copy {number}: {found}")
        copy.unlink()
    return wrong


async def test_what_an_nbd_client_reads_of_a_view(start_qemu, invariant):
    count, _ = rounds(4)
    vm = await start_qemu(DISK, guest=True)

    async def copying(copy, path):
        async with export(vm, path) as uri:
            await read_out(copy, uri)

    assert await wrong_copies(vm, count, copying) == []


async def test_a_read_beyond_what_is_kept(start_qemu, invariant):
    """Before 10.0 it shows what the guest has written since; of one unit it is right (K37)."""
    vm = await start_qemu(DISK, guest=True)
    await begin_writing(vm)
    await vm.guest.stop_stress()
    await vm.guest.fill(0, 0, 16 * MIB, 0x33)
    await vm.guest.fill(0, MIB, MIB, 0xAA)
    async with view(vm), server(vm) as path, export(vm, path):
        await vm.guest.fill(0, MIB, MIB, 0x11)
        for offset, length in (
            (0, 2 * MIB),
            (MIB, MIB),
            *((MIB + n * UNIT, UNIT) for n in range(16)),
        ):
            data = await read_plainly(path, "view", offset, length)
            assert set(data[-UNIT:]) == {0xAA}
        data = await read_plainly(path, "view", MIB, MIB + UNIT)
    misread = Capabilities(vm.version).views_misread
    assert set(data[:MIB]) == ({0x11} if misread else {0xAA})
    assert set(data[MIB:]) == {0x33}


@pytest.mark.parametrize("command", ["blockdev-backup", "blockdev-mirror"])
async def test_what_a_job_reads_of_a_view(command, start_qemu, invariant):
    """On QEMU 7.2 some are wrong: one in twenty mirrors."""
    count, _ = rounds(4)
    vm = await start_qemu(DISK, guest=True)

    async def copying(copy, path):
        await copied_by_job(vm, copy, command)

    wrong = await wrong_copies(vm, count, copying)
    print(f"{len(wrong)} of {count} copies by {command} are wrong on QEMU {vm.version}: {wrong}")
    assert wrong == [] or Capabilities(vm.version).jobs_misread_views


async def test_readers_of_the_same_range(start_qemu, invariant):
    """Several at once, each with many requests in flight."""
    vm = await start_qemu(DISK, guest=True)
    aborts = Capabilities(vm.version).overlapping_reads_of_views_abort
    if aborts:
        vm.expect_exit()
        invariant.forget(vm)
    await begin_writing(vm)
    died = False
    try:
        async with view(vm), server(vm) as path, export(vm, path) as uri:
            for _ in range(10):
                reads = (ran("nbdcopy", uri, "null:") for _ in range(_READERS))
                found = await asyncio.gather(*reads)
                assert aborts or found == [(0, "")] * _READERS
    except DisconnectedError:
        died = True
        await vm.wait(30)
    assert died == aborts
    if not died:
        done = await vm.guest.stop_stress()
        assert (done.bad, done.errors) == (0, 0)


async def test_what_is_kept_is_bounded(start_qemu, invariant):
    """By a raw node that does not grow. The point ends with it, and not the guest's write."""
    vm = await start_qemu(DISK, guest=True)
    await begin_writing(vm)
    async with view(vm, limit=MIB), server(vm) as path, export(vm, path) as uri:
        before = (await vm.guest.progress(0)).acked
        async with asyncio.timeout(120):
            while (await vm.guest.progress(0)).acked < before + 5000:
                await asyncio.sleep(0.05)
        code, said = await ran("nbdcopy", uri, "null:")
        assert code != 0
        assert "Invalid argument" in said
        kept = (vm.directory / "kept").stat()
        assert kept.st_size == MIB
        assert kept.st_blocks * 512 > MIB // 2
    assert (await vm.execute("query-status"))["status"] == "running"
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0)
    assert await vm.guest.check() > 0


def is_listening(path):
    """Whether somebody does: a socket has its name before that."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


async def test_a_storage_that_does_not_answer_holds_one_write(start_qemu, invariant):
    """For as long as `cbw-timeout` says; then the point has ended, and the guest goes on."""
    vm = await start_qemu(DISK, guest=True)
    await begin_writing(vm)
    path = vm.directory / "stalled"
    image = vm.directory / "stalled.raw"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    served = await asyncio.create_subprocess_exec(
        "qemu-nbd", "-t", "-f", "raw", "-k", str(path), str(image)
    )
    try:
        async with asyncio.timeout(120):
            while not is_listening(path):
                await asyncio.sleep(0.01)
        async with view(vm, stored={"type": "unix", "path": str(path)}), server(vm) as nbd:
            served.send_signal(signal.SIGSTOP)
            try:
                await vm.guest.latency(0)
                before = (await vm.guest.progress(0)).acked
                async with asyncio.timeout(120):
                    while (await vm.guest.progress(0)).acked < before + 20_000:
                        await asyncio.sleep(0.05)
                held = (await vm.guest.latency(0)).held_us / 1e6
            finally:
                served.send_signal(signal.SIGCONT)  # what drains would wait for it
            async with export(vm, nbd) as uri:
                assert (await ran("nbdcopy", uri, "null:"))[0] != 0
        assert TIMEOUT - 0.5 < held < TIMEOUT + 3
    finally:
        with contextlib.suppress(ProcessLookupError):
            served.kill()
        await served.wait()
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0)
