"""The client against real servers: qemu-nbd of three generations, and nbdkit."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from pathlib import Path

import peers
import pytest

from qmpblock.errors import NBDConnectError, NBDRequestError, RangeError, UnsupportedError
from qmpblock.nbd import Client
from qmpblock.nbd.wire import HeaderStyle

BASE, DEPTH = "base:allocation", "qemu:allocation-depth"
MIB = 1 << 20
QEMUS = pytest.mark.parametrize("version", ["system", "10", "11"])


async def _map(client: Client, context: str) -> list[tuple[int, int, int]]:
    """Return (offset, length, flags) of the whole export, equal neighbours merged."""
    extents: list[tuple[int, int, int]] = []
    offset = 0
    while offset < client.size:
        ask = min(client.size - offset, client.max_status_length)
        for length, flags in (await client.block_status(offset, ask))[context].tolist():
            if extents and extents[-1][2] == flags:
                extents[-1] = (extents[-1][0], extents[-1][1] + length, flags)
            else:
                extents.append((offset, length, flags))
            offset += length
    return extents


def _nbdinfo(address: str, context: str) -> list[tuple[int, int, int]]:
    uri = "nbd+unix:///?socket=" + address.removeprefix("unix:")
    command = [peers.need("nbdinfo"), "--json", f"--map={context}", uri]
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    extents: list[tuple[int, int, int]] = []
    for one in told:
        if extents and extents[-1][2] == one["type"]:
            extents[-1] = (extents[-1][0], extents[-1][1] + one["length"], one["type"])
        else:
            extents.append((one["offset"], one["length"], one["type"]))
    return extents


@QEMUS
async def test_the_map_of_a_chain_is_that_of_nbdinfo(version: str, tmp_path: Path):
    base = peers.make_qcow2(tmp_path / "base", "64M", "write -P 1 0 1M", "write -P 1 20M 1M")
    top = peers.make_qcow2(
        tmp_path / "top", "80M", "write -P 2 512k 1M", "write -z 8M 64k", backing=base
    )
    with peers.serving_image(version, top, tmp_path / "s", "-A", "-r") as address:
        async with await Client.connect(address, contexts=[BASE, DEPTH]) as client:
            assert client.contexts == (BASE, DEPTH)
            assert client.read_only
            assert client.can_cache
            assert client.extended is (version != "system")
            assert client.size == 80 * MIB
            for context in (BASE, DEPTH):
                found = await _map(client, context)
                assert found == _nbdinfo(address, context)
                assert len(found) > 3
            first = await client.block_status(MIB, 8 * MIB, one=True)
            assert first[DEPTH].tolist() == [[MIB // 2, 1]]


@QEMUS
async def test_reading_and_writing(version: str, tmp_path: Path):
    image = peers.make_qcow2(tmp_path / "image", "128M")
    with peers.serving_image(version, image, tmp_path / "s", "--discard=unmap") as address:
        async with await Client.connect(address, contexts=[BASE]) as client:
            data = random.Random(1).randbytes(40 * MIB)  # more than one request may carry
            await client.write(3 * MIB + 1, data)
            assert await client.read(3 * MIB + 1, len(data)) == data
            await client.write_zeroes(8 * MIB, MIB)
            await client.write_zeroes(10 * MIB, MIB, no_hole=True, fua=True)
            await client.trim(12 * MIB, MIB)
            await client.write(0, b"last", fua=True)
            await client.flush()
            await client.cache(0, MIB)
            read = await client.read(8 * MIB, 5 * MIB)
            assert read[:MIB] == read[2 * MIB : 3 * MIB] == bytes(MIB)
            begin = 8 * MIB - 1
            assert read[3 * MIB : 4 * MIB] == data[begin : begin + MIB]
            holes = await client.read(64 * MIB, 33 * MIB)
            assert holes == bytes(33 * MIB)
        async with await Client.connect(address) as client:
            assert await client.read(0, 4) == b"last"


@QEMUS
async def test_many_requests_at_once(version: str, tmp_path: Path):
    image = peers.make_qcow2(tmp_path / "image", "16M")
    with peers.serving_image(version, image, tmp_path / "s") as address:
        async with await Client.connect(address, contexts=[BASE]) as client:

            async def work(number: int) -> None:
                data = random.Random(number).randbytes(5000)
                await client.write(number * 8192, data)
                status = await client.block_status(number * 8192, 4096)
                assert status[BASE][0, 1] == 0
                assert await client.read(number * 8192, 5000) == data

            await asyncio.gather(*(work(number) for number in range(200)))


@QEMUS
async def test_what_qemu_refuses(version: str, tmp_path: Path):
    image = peers.make_qcow2(tmp_path / "image", "1M")
    with peers.serving_image(version, image, tmp_path / "s", "-r", "-x", "disk") as address:
        with pytest.raises(NBDConnectError, match="ERR_UNKNOWN"):
            await Client.connect(address, export="none")
        with pytest.raises(NBDConnectError, match="SET_META_CONTEXT"):
            await Client.connect(address, export="none", contexts=[BASE])
        async with await Client.connect(
            address, export="disk", contexts=[BASE, "qemu:dirty-bitmap:no"]
        ) as client:
            assert client.contexts == (BASE,)
            with pytest.raises(UnsupportedError, match="read-only"):
                await client.write(0, b"x")
        assert await Client.list_contexts(address, export="disk") == (BASE,)


@pytest.fixture(scope="module")
def crumbs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an image of 66000 zero clusters with a hole after each: 132000 extents."""
    image = tmp_path_factory.mktemp("crumbs") / "image"
    create = [peers.need("qemu-img"), "create", "-q", "-f", "qcow2", "-o", "cluster_size=512"]
    subprocess.run([*create, str(image), str(66000 * 1024)], check=True)
    commands = "".join(f"write -q -z {i * 1024} 512\n" for i in range(66000))
    subprocess.run(
        [peers.need("qemu-io"), "-t", "unsafe", "-f", "qcow2", str(image)],
        input=commands.encode(),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return image


@QEMUS
async def test_a_map_longer_than_one_reply(version: str, tmp_path: Path, crumbs: Path):
    """QEMU stops after 131072 extents of a context."""
    with peers.serving_image(version, crumbs, tmp_path / "s", "-A", "-r") as address:
        async with await Client.connect(address, contexts=[BASE, DEPTH]) as client:
            first = await client.block_status(0, client.size)
            assert len(first[DEPTH]) == 131072
            assert first[BASE].tolist() == [[client.size, 3]]  # zero clusters are holes, too
            found = await _map(client, DEPTH)
            assert found == [(512 * i, 512, 1 - i % 2) for i in range(132000)]


async def test_an_export_larger_than_4_gib(tmp_path: Path):
    for version in ("system", "11"):
        image = peers.make_qcow2(tmp_path / f"image{version}", "1T", "write 900G 64k")
        with peers.serving_image(version, image, tmp_path / f"s{version}") as address:
            async with await Client.connect(address, contexts=[BASE]) as client:
                found = await _map(client, BASE)
                assert found == [
                    (0, 900 << 30, 3),
                    (900 << 30, 65536, 0),
                    ((900 << 30) + 65536, (124 << 30) - 65536, 3),
                ]


# -- nbdkit


async def test_nbdkit_memory(tmp_path: Path):
    with peers.serving_nbdkit(tmp_path / "s", "memory", "64M") as address:
        async with await Client.connect(address, contexts=[BASE]) as client:
            await client.write(MIB, b"x" * 100_000)
            assert await client.read(MIB - 2, 4) == b"\0\0xx"
            assert await _map(client, BASE) == _nbdinfo(address, BASE)
            await client.trim(MIB, 65536)
            await client.write_zeroes(0, MIB, fast=True)
            await client.flush()


async def test_nbdkit_extents(tmp_path: Path):
    extents = tmp_path / "extents"
    lines, offset = [], 0
    chance = random.Random(5)
    while offset < 60 * MIB:
        length = chance.randrange(1, 4000)
        lines.append(f"{offset} {length} {chance.choice(['', 'hole', 'zero', 'hole,zero'])}\n")
        offset += length
    extents.write_text("".join(lines))
    with peers.serving_nbdkit(
        tmp_path / "s", "--filter=extentlist", "null", "64M", f"extentlist={extents}"
    ) as address:
        async with await Client.connect(address, contexts=[BASE]) as client:
            found = await _map(client, BASE)
            assert len(found) > 10_000
            assert found == _nbdinfo(address, BASE)


async def test_nbdkit_errors_and_delays(tmp_path: Path):
    with peers.serving_nbdkit(
        tmp_path / "s", "--filter=error", "--filter=delay", "memory", "1M",
        "error-pread=ENOSPC", "error-pread-rate=50%", "rdelay=20ms",
    ) as address:  # fmt: skip
        async with await Client.connect(address) as client:
            results = await asyncio.gather(
                *(client.read(4096 * i, 4096) for i in range(60)), return_exceptions=True
            )
            failed = [r for r in results if isinstance(r, NBDRequestError)]
            assert {e.errno for e in failed} == {28}
            assert 0 < len(failed) < 60
            assert all(r == bytes(4096) for r in results if not isinstance(r, BaseException))
            await client.write(0, b"still alive")


async def test_nbdkit_block_sizes(tmp_path: Path):
    with peers.serving_nbdkit(
        tmp_path / "s", "--filter=blocksize-policy", "memory", "8M",
        "blocksize-minimum=4K", "blocksize-preferred=64K", "blocksize-maximum=1M",
        "blocksize-error-policy=error",
    ) as address:  # fmt: skip
        async with await Client.connect(address) as client:
            assert client.block_size == (4096, 65536, MIB)
            with pytest.raises(RangeError, match="minimum block size, 4096"):
                await client.read(512, 512)
            data = random.Random(1).randbytes(5 * MIB)
            await client.write(4096, data)  # split: nbdkit would refuse more than 1 MiB
            assert await client.read(4096, len(data)) == data


async def test_nbdkit_without_structured_replies(tmp_path: Path):
    with peers.serving_nbdkit(tmp_path / "s", "--no-sr", "memory", "1M") as address:
        async with await Client.connect(address) as client:
            assert client.session.style is HeaderStyle.SIMPLE
            await client.write(5, b"abc")
            assert await client.read(4, 5) == b"\0abc\0"
        with pytest.raises(UnsupportedError):
            await Client.connect(address, contexts=[BASE])


async def test_nbdkit_oldstyle(tmp_path: Path):
    with (
        peers.serving_nbdkit(tmp_path / "s", "-o", "memory", "1M") as address,
        pytest.raises(NBDConnectError, match="oldstyle"),
    ):
        await Client.connect(address)


async def test_nbdkit_not_fixed_newstyle(tmp_path: Path):
    with (
        peers.serving_nbdkit(tmp_path / "s", "--mask-handshake=2", "memory", "1M") as address,
        pytest.raises(NBDConnectError, match="fixed newstyle"),
    ):
        await Client.connect(address)


async def test_a_failing_export(tmp_path: Path):
    with (
        peers.serving_nbdkit(
            tmp_path / "s", "eval", "open=echo 'EPERM no luck' >&2; exit 1", "get_size=echo 1M"
        ) as address,
        pytest.raises(NBDConnectError),
    ):
        await Client.connect(address)
