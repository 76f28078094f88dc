"""A qemu-storage-daemon as a server under test."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess

import pytest

from qmpblock.errors import CommandError, RequestError, ToolError
from qmpblock.testing import StorageDaemon, Tools, build, inject, parse_scenario, read_area, slow

pytestmark = pytest.mark.live
K = 1024
TWO = parse_scenario(
    """
about: Two disks, one of them encrypted.
disks:
  - name: d0
    images: [{size: 8M, content: [write 0 1M 0xaa]}, {content: [write 64K 64K 0xbb]}]
  - name: d1
    images: [{size: 1M, format: luks, secret: geheim, content: [write 0 4K 0xcc]}]
""",
    "two",
)


@pytest.fixture
async def built(vm_dir, qemu_binary):
    return await build(TWO, vm_dir, Tools.of(qemu_binary))


async def test_each_disk_is_an_export(built):
    async with StorageDaemon(built.disks) as server:
        wanted = b"\xaa" * 64 * K + b"\xbb" * 64 * K
        assert await read_area(server.uri("d0"), 0, 128 * K) == wanted
        assert await read_area(server.uri(built.disks[1]), 0, 4 * K) == b"\xcc" * 4 * K
        with pytest.raises(RequestError, match="there are: d0, d1"):
            server.uri("d2")
        names = {export["id"] for export in await server.execute("query-block-exports")}
        assert names == {"d0", "d1"}
        with pytest.raises(CommandError, match="nonsense"):
            await server.execute("nonsense")
        printed = await asyncio.to_thread(
            subprocess.check_output,
            [Tools.of().img, "map", "--output=json", "-f", "raw", server.uri("d0")],
        )
        assert sum(one["length"] for one in json.loads(printed) if one["data"]) == 1024 * K
        directory, pid = server.directory, server.pid
    assert not directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_one_that_hangs_dies_and_comes_back(built):
    async with StorageDaemon(built.disks) as server:
        server.pause()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read_area(server.uri("d0"), 0, K), 0.5)
        server.resume()
        assert await read_area(server.uri("d0"), 0, K) == b"\xaa" * K
        await server.kill()
        with pytest.raises(ToolError, match=r"Connection re(fused|set)"):
            await read_area(server.uri("d0"), 0, K)
        await server.start()
        assert await read_area(server.uri("d0"), 0, K) == b"\xaa" * K
        server.pause()  # and it is ended all the same


async def test_faults_and_writing(built, vm_dir):
    bad = inject(slow(built.disks[0], 8 << 20), "read_aio", "EIO", layer=1)
    async with StorageDaemon([bad], writable=True) as server:
        with pytest.raises(ToolError, match="Input/output error"):
            await read_area(server.uri("d0"), 0, K)
        command = [Tools.of().io, "-f", "raw", "-c", "write -P 0x77 4M 64k", server.uri("d0")]
        await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
        assert await read_area(server.uri("d0"), 4 << 20, K) == b"\x77" * K
    assert await read_area(built.disks[0], 4 << 20, K) == b"\x77" * K


async def test_one_that_does_not_start_says_why(built):
    built.disks[0].active.path.unlink()
    with pytest.raises(ToolError, match="No such file"):
        async with StorageDaemon(built.disks):
            pass
