"""Images hold what their scenario says: the tested QEMU's own qemu-img is the judge."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from qmpblock.errors import ToolError
from qmpblock.testing.images import BuiltScenario, Tools, build, content_digest, find_qemu
from qmpblock.testing.scenario import load_scenario, load_scenarios, parse_scenario

FIXTURES = Path(__file__).parents[2] / "fixtures"
DRAWN = load_scenarios(FIXTURES, "seed-*.yaml")


@pytest.fixture
def tools() -> Tools:
    return Tools.of()


async def build_text(text: str, directory: Path, tools: Tools) -> BuiltScenario:
    return await build(parse_scenario(f"about: Test.\n{text}", "test"), directory, tools)


def spans(records: list[dict[str, Any]]) -> list[tuple[int, int, int, bool, bool]]:
    keys = ("start", "length", "depth", "present", "zero")
    return [tuple(record[key] for key in keys) for record in records]  # type: ignore[misc]


@pytest.mark.parametrize("scenario", DRAWN, ids=str)
async def test_images_are_as_drawn(scenario: Any, tmp_path: Path, tools: Tools) -> None:
    built = await build(scenario, tmp_path, tools)
    drawing = scenario.drawing
    rows = drawing.before
    found = []
    for record in await built.disks[0].active.map(tools):
        for _ in range(record["length"] // drawing.block):
            found.append(len(rows) - 1 - record["depth"] if record["present"] else None)
    expected = []
    for cells in zip(*rows, strict=True):
        holders = [index for index, cell in enumerate(cells) if cell != " "]
        expected.append(holders[-1] if holders else None)
    assert found == expected
    raw = bytearray(drawing.block * len(rows[0]))
    for row in rows:
        for index, cell in enumerate(row):
            if cell != " ":
                raw[index * drawing.block : (index + 1) * drawing.block] = (
                    b"\0" if cell == "0" else cell.encode()
                ) * drawing.block
    (tmp_path / "expected.raw").write_bytes(raw)
    assert await built.disks[0].active.digest(tools) == content_digest(tmp_path / "expected.raw")


async def test_a_chain_with_odd_names(tmp_path: Path, tools: Tools) -> None:
    built = await build(load_scenario(FIXTURES / "chain-5-names.yaml"), tmp_path / "a b,c", tools)
    assert spans(await built.disks[0].active.map(tools)) == [
        *((index << 20, 1 << 20, 4 - index, True, False) for index in range(5)),
        (5 << 20, 3 << 20, 4, False, True),
    ]
    for layer in built.disks[0].active.chain():
        await layer.check(tools)


async def test_a_chain_of_150(tmp_path: Path, tools: Tools) -> None:
    images = "[{size: 1M, content: [write 0 64K 0x1]}" + ", {}" * 149 + "]"
    built = await build_text(f"images: {images}", tmp_path, tools)
    records = await built.disks[0].active.map(tools)
    assert spans(records)[0] == (0, 65536, 149, True, False)


async def test_preallocated_zeros_keep_their_offset(tmp_path: Path, tools: Tools) -> None:
    text = "images: [{size: 4M, content: [write 0 2M 0x1, zero 1M 1M, zero 3M 1M]}]"
    built = await build_text(text, tmp_path, tools)
    records = await built.disks[0].active.map(tools)
    by_start = {record["start"]: record for record in records}
    assert by_start[1 << 20]["zero"]
    assert "offset" in by_start[1 << 20]
    assert "offset" not in by_start[3 << 20]


async def test_a_replay_is_the_guests_writes_on_images_made_anew(
    tmp_path: Path, tools: Tools
) -> None:
    text = "images: [{size: 4M, content: [write 0 1M 0x1]}, {}]\nguest: [write 2M 64K 0x2]"
    built = await build_text(text, tmp_path / "a", tools)
    before = await built.disks[0].active.digest(tools)
    again = await built.replayed(tmp_path / "b")
    assert spans(await again.disks[0].active.map(tools)) == [
        (0, 1 << 20, 1, True, False),
        (1 << 20, 1 << 20, 1, False, True),
        (2 << 20, 65536, 0, True, False),
        (2162688, 2031616, 1, False, True),
    ]
    assert await built.disks[0].active.digest(tools) == before
    assert await again.disks[0].active.digest(tools) != before


@pytest.mark.parametrize(("discard", "zero"), [("ignore", False), ("unmap", True)])
async def test_a_replay_heeds_the_disks_discard_option(
    discard: str, zero: bool, tmp_path: Path, tools: Tools
) -> None:
    built = await build_text(
        f"images: [{{size: 1M, content: [write 0 1M 0x1]}}]\nattach: {{discard: {discard}}}\n"
        "guest: [discard 0 1M]",
        tmp_path,
        tools,
    )
    await built.disks[0].replay(tools)
    (record,) = await built.disks[0].active.map(tools)
    assert record["zero"] is zero


async def test_encrypted_images_made_twice_hold_the_same(tmp_path: Path, tools: Tools) -> None:
    text = "images: [{size: 1M, format: luks, secret: 'a,b', content: [write 0 4K 0x1]}]"
    first = await build_text(text, tmp_path / "a", tools)
    second = await build_text(text, tmp_path / "b", tools)
    assert await first.disks[0].active.digest(tools) == await second.disks[0].active.digest(tools)
    assert first.disks[0].active.path.read_bytes() == second.disks[0].active.path.read_bytes()


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_a_header_without_a_backing_format(compat: str, tmp_path: Path, tools: Tools) -> None:
    option = f"options: {{compat: '{compat}'}}"
    text = f"images: [{{size: 1M}}, {{backing_format: no, {option}}}]"
    built = await build_text(text, tmp_path, tools)
    active = built.disks[0].active
    told = await tools.run(tools.img, "info", "-f", "qcow2", str(active.path))
    assert "backing file: d0-0.qcow2" in told
    assert "backing file format" not in told
    await active.check(tools)


async def test_a_failed_tool_says_command_code_and_words(tmp_path: Path, tools: Tools) -> None:
    text = "images: [{size: 1M, options: {cluster_size: '3'}}]"
    with pytest.raises(ToolError, match=r"(?i)cluster size") as caught:
        await build_text(text, tmp_path, tools)
    assert caught.value.returncode == 1
    assert "cluster_size=3" in " ".join(caught.value.command)


async def test_a_failed_request_of_qemu_io_is_a_failure(tmp_path: Path, tools: Tools) -> None:
    built = await build_text("images: [{size: 1M}]", tmp_path, tools)
    with pytest.raises(ToolError, match=r"(?i)past the end|input/output|invalid"):
        await tools.run(
            tools.io, "-f", "qcow2", str(built.disks[0].active.path), stdin="write 2M 4K\nquit\n"
        )


async def test_a_damaged_image_is_found(tmp_path: Path, tools: Tools) -> None:
    built = await build_text("images: [{size: 1M, content: [write 0 1M 0x1]}]", tmp_path, tools)
    active = built.disks[0].active
    await active.check(tools)
    with active.path.open("r+b") as file:
        file.seek(2 << 16)  # the refcount block
        file.write(bytes(64))
    with pytest.raises(ToolError, match="exit code 2"):
        await active.check(tools)


async def test_cancelling_kills_the_tool(tools: Tools) -> None:
    task = asyncio.create_task(tools.run("sleep", "6000"))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 60)


def test_a_digest_does_not_see_how_zeros_are_stored(tmp_path: Path) -> None:
    dense, sparse, other, far = (tmp_path / name for name in ("dense", "sparse", "other", "far"))
    dense.write_bytes(bytes(1 << 20) + b"x" * 100 + bytes(1 << 20))
    with sparse.open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x" * 100)
        file.truncate((2 << 20) + 100)
    other.write_bytes(bytes((1 << 20) + 1) + b"x" * 100 + bytes((1 << 20) - 1))
    far.write_bytes(bytes(1 << 19) + b"x" * 100 + bytes(3 << 19))  # the same blocks elsewhere
    assert content_digest(dense) == content_digest(sparse)
    assert len({content_digest(path) for path in (dense, other, far)}) == 3
    (tmp_path / "empty").write_bytes(b"")
    assert content_digest(tmp_path / "empty") == hashlib.sha256(b"size 0\n").hexdigest()


def test_a_missing_qemu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMPBLOCK_QEMU", "/nowhere/qemu-system-x86_64")
    with pytest.raises(ToolError, match="QMPBLOCK_QEMU"):
        find_qemu()
