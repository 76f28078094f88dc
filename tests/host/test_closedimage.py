"""The map of a closed image: what `qmpblock map IMAGE` shows, as a call."""

import json
import os
import subprocess
import sys

import pytest

import qmpblock
from qmpblock.cli.app import run as cli
from qmpblock.errors import NotFoundError, RangeError, RequestError, ToolError
from qmpblock.extents import AllocationMap

KIB = 1 << 10
MIB = 1 << 20


def run(*arguments, cwd):
    return subprocess.run(arguments, cwd=cwd, check=True, capture_output=True, text=True).stdout


def qemu_io(path, fmt, *commands):
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", fmt, *words, path, cwd=path.parent)


@pytest.fixture
def chain(tmp_path):
    """A qcow2 image of 6 MiB over a raw one of 4 MiB, 1 MiB of which is reserved."""
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "raw", base, "4M", cwd=tmp_path)
    qemu_io(base, "raw", "write -q 0 1M")
    with base.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 2 * MIB, MIB)
    created = ("create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw")
    run("qemu-img", *created, "top.qcow2", "6M", cwd=tmp_path)
    qemu_io(top, "qcow2", "write -q 512K 64K", "write -q -z 2M 64K", "write -q 5M 64K")
    return top


async def test_it_is_what_qemu_img_says(chain):
    image = await qmpblock.closed_image(chain)
    assert (image.size, repr(image)) == (6 * MIB, f"<ClosedImage '{chain}': 2 layers>")
    assert [(one.file, one.format, one.size) for one in image.chain] == [
        (str(chain), "qcow2", 6 * MIB),
        (f"{chain.parent}/base.raw", "raw", 4 * MIB),
    ]
    records = json.loads(run("qemu-img", "map", "--output=json", chain, cwd=chain.parent))
    seen = await image.map()
    assert seen == AllocationMap.from_qemu_img(records, layers=2, formats=("qcow2", "raw"))
    assert seen.where(reserved=True).total == 0


async def test_a_part_begins_and_ends_at_any_byte(chain):
    image = await qmpblock.closed_image(str(chain))
    whole, part = await image.map(), await image.map(MIB // 2 + 1, 70_000)
    assert part == whole.clip(MIB // 2 + 1, 70_000)
    with pytest.raises(RangeError, match="6291456 bytes"):
        await image.map(6 * MIB, 1)


async def test_what_is_reserved_is_marked_where_it_is_asked_for(chain):
    image = await qmpblock.closed_image(chain)
    seen = await image.map(reserved=True)
    # 64 KiB of it lie under zeros of the layer above, which hide them.
    assert list(seen.where(reserved=True)) == [(2 * MIB + 64 * KIB, 3 * MIB)]
    _, base = await image.layers(reserved=True)
    assert list(base.map.where(reserved=True)) == [(2 * MIB, 3 * MIB)]
    _, base = await image.layers()
    assert base.map.where(reserved=True).total == 0


async def test_each_layer_alone(chain):
    image = await qmpblock.closed_image(chain)
    top, base = await image.layers()
    assert [(one.depth, one.format, one.size) for one in (top, base)] == [
        (0, "qcow2", 6 * MIB),
        (1, "raw", 4 * MIB),
    ]
    assert list(top.map.data()) == [(512 * KIB, 576 * KIB), (5 * MIB, 5 * MIB + 64 * KIB)]
    assert list(top.map.zeros()) == [(2 * MIB, 2 * MIB + 64 * KIB)]
    assert list(base.map.data()) == [(0, MIB)]
    assert AllocationMap.stack([top.map, base.map]).without_reserved() == await image.map()


async def test_a_format_is_told_or_taken_from_the_name(chain):
    named = chain.rename(chain.parent / "top")
    with pytest.raises(RequestError, match="does not tell the image's format"):
        await qmpblock.closed_image(named)
    assert (await qmpblock.closed_image(named, format="qcow2")).size == 6 * MIB
    [alone] = (await qmpblock.closed_image(named, format="raw")).chain  # what the caller says
    assert alone.size < 6 * MIB


async def test_an_image_that_is_not_there(tmp_path):
    with pytest.raises(NotFoundError):
        await qmpblock.closed_image(tmp_path / "nosuch.qcow2")


async def test_an_image_that_goes_meanwhile(chain):
    image = await qmpblock.closed_image(chain)
    chain.unlink()
    with pytest.raises((NotFoundError, ToolError)):
        await image.map()


async def test_the_command_prints_the_same(chain):
    image = await qmpblock.closed_image(chain)
    command = [sys.executable, "-m", "qmpblock", "map", chain]
    printed = run(*command, "--json", cwd=chain.parent)
    assert json.loads(printed) == (await image.map()).to_qemu_img()
    printed = run(*command, "--totals", "--json", cwd=chain.parent)
    found = (await image.map(reserved=True)).totals().as_json(size=image.size)
    assert json.loads(printed) == found
    printed = json.loads(run(*command, "--layers", "--json", cwd=chain.parent))["layers"]
    layers = await image.layers(reserved=True)
    assert [(one["depth"], one["file"], one["format"], one["size"]) for one in printed] == [
        (one.depth, one.file, one.format, one.size) for one in layers
    ]
    for one, other in zip(printed, layers, strict=True):
        assert one["source"] == "qemu-img"
        assert [(part["start"], part["data"]) for part in one["extents"]] == [
            (part.offset, part.data) for part in other.map.coalesce()
        ]


def test_the_documents_of_the_command_tell_it_too(chain, capsys):
    """Of a raw layer, too, as docs/map.md says: `--layers --json` did not."""
    marked = {}
    for words in (["--layers"], ["--totals"]):
        assert cli(["map", str(chain), *words, "--json"]) == 0
        marked |= json.loads(capsys.readouterr().out)
    [base] = [one for one in marked["layers"] if one["depth"] == 1]
    reserved = [one for one in base["extents"] if one["reserved"]]
    assert [(one["start"], one["length"]) for one in reserved] == [(2 * MIB, MIB)]
    assert marked["totals"][1]["reserved"] == MIB - 64 * KIB
