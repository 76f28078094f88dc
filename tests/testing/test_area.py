"""Reading a range out of an image, one layer of it, or an NBD export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import peers
import pytest

from qmpblock.errors import RangeError, RequestError, ToolError
from qmpblock.testing import BuiltScenario, build, parse_scenario, read_area

K = 1024
CHAIN = """
about: An overlay over a base, each with data of its own.
images:
  - {size: 1M, content: [write 0 128K 0xaa]}
  - {content: [write 64K 64K 0xbb]}
"""


@pytest.fixture
async def built(tmp_path: Path) -> BuiltScenario:
    return await build(parse_scenario(CHAIN, "chain"), tmp_path)


async def test_what_a_guest_would_see(built: BuiltScenario) -> None:
    assert await read_area(built.disks[0], 0, 128 * K) == b"\xaa" * 64 * K + b"\xbb" * 64 * K
    assert await read_area(built.disks[0].active, 128 * K, K) == bytes(K)


async def test_one_layer_alone(built: BuiltScenario) -> None:
    top, base = built.disks[0].active.chain()
    alone = await read_area(top, 0, 128 * K, layer_only=True)
    assert alone == bytes(64 * K) + b"\xbb" * 64 * K
    assert await read_area(base, 64 * K, K) == b"\xaa" * K
    by_path = await read_area(top.path, 0, 128 * K, format="qcow2", layer_only=True)
    assert by_path == alone
    whole = await read_area(top.path, 0, K, format="qcow2")
    assert whole == b"\xaa" * K


@pytest.mark.parametrize(("offset", "length"), [(64 * K - 3, 7), (64 * K - 512, 513), (5, 0)])
async def test_any_byte(built: BuiltScenario, offset: int, length: int) -> None:
    wanted = (b"\xaa" * 64 * K + b"\xbb" * 64 * K)[offset : offset + length]
    assert await read_area(built.disks[0], offset, length) == wanted


@pytest.mark.parametrize("form", ["luks", "raw", "qed", "vmdk"])
async def test_every_format(tmp_path: Path, form: str) -> None:
    secret = ", secret: geheim" if form == "luks" else ""
    text = (
        f"about: One.\nimages: [{{format: {form}, size: 1M, content: [write 4K 4K 0x7]{secret}}}]\n"
    )
    built = await build(parse_scenario(text, form), tmp_path)
    assert await read_area(built.disks[0], 4 * K, 4 * K) == b"\7" * 4 * K
    if form != "luks":  # where nothing was written, that decrypts what is no ciphertext
        assert await read_area(built.disks[0], 4 * K - 1, 2) == b"\0\7"


@pytest.fixture
def export(tmp_path: Path) -> Iterator[str]:
    image, socket = tmp_path / "served", tmp_path / "nbd"
    image.write_bytes(b"\xcd" * 8192)
    command = ["qemu-nbd", "-f", "raw", "-k", str(socket), "-x", "disk", "-t", str(image)]
    with peers.running(command, socket):
        yield f"nbd+unix:///disk?socket={socket}"


async def test_an_nbd_export(export: str) -> None:
    assert await read_area(export, 100, 1000) == b"\xcd" * 1000
    with pytest.raises(RequestError, match="shows no layers"):
        await read_area(export, 0, 512, layer_only=True)
    for uri in ("nbds://host/x", "nbd+unix:///x", "nbd:///x"):
        with pytest.raises(RequestError, match=r"is not nbd://HOST"):
            await read_area(uri, 0, 512)


async def test_what_cannot_be_read_is_an_error(built: BuiltScenario, tmp_path: Path) -> None:
    with pytest.raises(RangeError, match="must not be negative"):
        await read_area(built.disks[0], -1, 5)
    with pytest.raises(ToolError, match="size"):
        await read_area(built.disks[0], 1 << 20, 512)
    with pytest.raises(RequestError, match="none is probed") as caught:
        await read_area(built.disks[0].active.path, 0, 512)
    assert "format=" in (caught.value.remedy or "")
    with pytest.raises(ToolError, match="No such file"):
        await read_area(tmp_path / "nothing", 0, 512, format="raw")
