"""Thin, full, or like another: of real images, made so and made otherwise."""

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qmpblock
from qmpblock.copying.hostspace import (
    check_full,
    check_like,
    check_thin,
    space_of,
    verify_space,
)
from qmpblock.errors import RequestError
from qmpblock.extents import AllocationMap
from qmpblock.ranges import Ranges

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
DATA = Ranges([(MIB, MIB + 64 * KIB)])


def run(*arguments):
    subprocess.run([str(one) for one in arguments], check=True, capture_output=True)


def image(tmp_path, fmt, *options, writes=(f"write -P 7 {MIB} 64K",)):
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.{fmt}"
    words = [word for one in options for word in ("-o", one)]
    run("qemu-img", "create", "-f", fmt, *words, path, "4M")
    for one in writes:
        run("qemu-io", "-f", fmt, "-c", one, path)
    return path


async def look(path, asked, **options):
    return await verify_space(await qmpblock.closed_image(path), asked, **options)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
async def test_a_thin_one(tmp_path, fmt):
    path = image(tmp_path, fmt)
    assert (await look(path, "thin", wanted=DATA)).as_asked
    found = await look(path, "thin", wanted=Ranges())
    assert (found.as_asked, found.excess) == (False, DATA)
    found = await look(path, "full")
    lacking = DATA.complement(0, SIZE)
    if fmt == "raw":  # QEMU writes the first block of a raw file
        lacking = lacking.difference(Ranges([(0, 4096)]))
    assert found.lacking == lacking


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("raw", ["preallocation=falloc"]),
        ("raw", ["preallocation=full"]),
        ("qcow2", ["preallocation=falloc"]),
        ("qcow2", ["preallocation=full"]),
    ],
)
async def test_a_full_one(tmp_path, fmt, options):
    path = image(tmp_path, fmt, *options)
    assert (await look(path, "full")).as_asked
    found = await look(path, "thin", wanted=DATA)
    assert not found.as_asked
    assert found.excess == DATA.complement(0, SIZE).difference(Ranges([(0, 4096)]))


async def test_metadata_alone_are_not_full(tmp_path):
    path = image(tmp_path, "qcow2", "preallocation=metadata")
    found = await look(path, "full")
    assert not found.as_asked
    assert found.lacking.total or found.short > 3 * MIB


async def test_a_hole_in_a_full_one_is_seen(tmp_path):
    path = image(tmp_path, "raw", "preallocation=falloc")
    with path.open("r+b") as file:
        run("fallocate", "--punch-hole", "--offset", 2 * MIB, "--length", MIB, path)
        os.fsync(file.fileno())
    found = await look(path, "full")
    assert found.lacking == Ranges([(2 * MIB, 3 * MIB)])


async def test_plain_zeros_need_no_space_and_stored_ones_have_it(tmp_path):
    plain = image(tmp_path, "qcow2", writes=["write -z 0 1M"])
    assert (await look(plain, "thin", wanted=Ranges())).as_asked
    stored = image(tmp_path, "qcow2", writes=["write -P 0 0 1M"])
    assert (await look(stored, "thin", wanted=Ranges())).excess == Ranges([(4096, MIB)])
    freed = image(tmp_path, "qcow2", writes=["write -P 1 0 1M", "write -z 0 1M"])
    assert (await look(freed, "thin", wanted=Ranges())).excess == Ranges([(4096, MIB)])


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
async def test_like_another(tmp_path, fmt):
    model = await qmpblock.closed_image(image(tmp_path, "qcow2"))
    [layer] = await model.layers(reserved=True)
    assert (await look(image(tmp_path, fmt), layer.map)).as_asked
    more = image(tmp_path, fmt, writes=[f"write -P 7 {MIB} 64K", "write -P 7 3M 64K"])
    found = await look(more, layer.map)
    assert (found.excess, found.lacking.total) == (Ranges([(3 * MIB, 3 * MIB + 64 * KIB)]), 0)
    found = await look(image(tmp_path, fmt, writes=[]), layer.map)
    assert (found.excess.total, found.lacking) == (0, DATA)


async def test_only_the_active_layer_counts(tmp_path):
    base = image(tmp_path, "raw", "preallocation=full")
    top = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", base, top)
    assert (await look(top, "thin", wanted=Ranges())).as_asked
    assert (await look(top, "full")).lacking == Ranges([(0, SIZE)])


async def test_what_is_no_way_to_be(tmp_path):
    with pytest.raises(RequestError, match="neither thin nor full"):
        await look(image(tmp_path, "raw"), "fat")


# -- what decides, on maps that are made up

flags = st.tuples(st.booleans(), st.booleans())  # whether a cluster is data, or reserved
maps = st.lists(flags, min_size=1, max_size=12)


def made(clusters, cluster=4096):
    records = [
        {
            "start": number * cluster,
            "length": cluster,
            "depth": 0,
            "present": True,
            "zero": not data,
            "data": data,
        }
        for number, (data, _) in enumerate(clusters)
    ]
    own = AllocationMap.from_qemu_img(records, layers=1, formats=["raw"])
    return own.with_reserved(
        Ranges(
            (number * cluster, (number + 1) * cluster)
            for number, (data, reserved) in enumerate(clusters)
            if reserved and not data
        )
    )


@given(maps, maps)
def test_the_rules(one, other):
    one = one[: len(other)]
    other = other[: len(one)]
    own, model = made(one), made(other)
    has = {number for number, pair in enumerate(one) if any(pair)}
    wanted = {number for number, pair in enumerate(other) if any(pair)}
    assert {start // 4096 for start, stop in space_of(own).split(4096)} == has
    thin = check_thin(own, space_of(model), 4096)
    assert {start // 4096 for start, stop in thin.excess.split(4096)} == has - wanted - {0}
    full = check_full(own)
    assert full.lacking.total == (len(one) - len(has)) * 4096
    assert full.as_asked == (len(has) == len(one))
    like = check_like(own, model, 4096)
    assert like.excess == thin.excess
    assert {start // 4096 for start, stop in like.lacking.split(4096)} == wanted - has
    assert check_like(own, own, 4096).as_asked
    assert check_full(own, max(0, len(has) * 4096 - 512)).short == (512 if has else 0)
