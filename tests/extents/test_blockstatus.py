"""The lock-step rules, against a model of single bytes and against real QEMU's two views."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.errors import NBDError, NBDProtocolError, RangeError, RequestError
from qmpblock.extents.allocationmap import AllocationMap
from qmpblock.extents.blockstatus import ExtentAllowance, NBDMapBuilder, Nodes, merge

TOOLS = ("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
needs_tools = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS),
    reason=f"needs {', '.join(TOOLS)} (Debian: qemu-utils, libnbd-bin)",
)

_THROTTLE = ("--object", "throttle-group,id=idle")  # a filter that needs no write permission

Runs = list[tuple[int, int]]  # (length, flags)


def array(runs: Runs, dtype: Any = np.uint32) -> np.ndarray:
    return np.array(runs, dtype).reshape(-1, 2)


def byte_rule(offset: int, status: int, d: int, sizes: Sequence[int], levels: Sequence[int]):
    """Apply the table of extents/blockstatus.py to one byte: (depth, present, zero, data)."""
    if d == 0:
        return levels[-1], False, True, False
    if offset >= sizes[d - 1]:
        return levels[d - 1] - 1, False, True, False
    return levels[d - 1], True, bool(status & 2), not status & 1


def per_byte(found: AllocationMap) -> list[tuple[int, bool, bool, bool]]:
    return [(e.depth, e.present, e.zero, e.data) for e in found for _ in range(e.length)]


def runs_of(values: Sequence[int], draw_cut) -> Runs:
    """Run-length encode, with extra cuts where draw_cut() says so."""
    runs: Runs = []
    for value in values:
        if runs and runs[-1][1] == value and not draw_cut():
            runs[-1] = (runs[-1][0] + 1, value)
        else:
            runs.append((1, value))
    return runs


@st.composite
def exports(draw: st.DrawFn):
    """Draw a disk as NBD shows it, byte by byte, a range of it, and how replies are cut."""
    count = draw(st.integers(1, 4))
    size = draw(st.integers(1, 40))
    sizes = [size, *(draw(st.integers(0, 50)) for _ in range(count - 1))]
    steps = [draw(st.integers(0, 1)) for _ in range(count - 1)]
    levels = list(itertools.accumulate(steps, initial=0))
    status = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    depth = draw(st.lists(st.integers(0, count), min_size=size, max_size=size))
    # The exported node itself has no end to read past; a filter over a short node neither.
    depth = [d if d == 0 or levels[d - 1] or b < sizes[d - 1] else 0 for b, d in enumerate(depth)]
    offset = draw(st.integers(0, size))
    length = draw(st.integers(0, size - offset))
    return sizes, levels, status, depth, offset, length, draw(st.randoms(use_true_random=False))


@given(exports())
def test_any_split_of_replies_gives_the_rule_for_each_byte(export) -> None:
    sizes, levels, status, depth, offset, length, rng = export
    builder = NBDMapBuilder(sizes, offset, length, levels=levels)
    while builder.remaining:
        at = builder.next_offset
        views = []
        for values in (status, depth):
            # May stop short of the request, or pass its end, as the protocol allows.
            stop = rng.randint(at + 1, len(values))
            views.append(array(runs_of(values[at:stop], lambda: rng.random() < 0.2)))
        builder.feed(*views)
        assert builder.next_offset > at
    found = builder.finish()
    expected = [
        byte_rule(b, status[b], depth[b], sizes, levels) for b in range(offset, offset + length)
    ]
    assert per_byte(found) == expected
    assert (found.start, found.stop, found.layers) == (offset, offset + length, levels[-1] + 1)
    assert len(found.coalesce()) == len(found), "the builder's result is canonical"


def test_the_shorter_context_decides_how_far_a_reply_reaches() -> None:
    builder = NBDMapBuilder([100, 100], 0, 100)
    builder.feed(array([(30, 0), (40, 3)]), array([(20, 1), (25, 2)]))
    assert builder.next_offset == 45
    assert builder.remaining == 55
    builder.feed(array([(1000, 3)]), array([(55, 0)]))
    assert [(e.offset, e.length, e.depth, e.present) for e in builder.finish()] == [
        (0, 20, 0, True),
        (20, 10, 1, True),
        (30, 15, 1, True),
        (45, 55, 1, False),
    ]


def test_an_extent_is_split_where_a_short_layer_ends() -> None:
    builder = NBDMapBuilder([100, 60, 100], 0, 100)
    builder.feed(array([(100, 3)]), array([(100, 2)]))
    below, past = builder.finish()
    assert (below.length, below.depth, below.present) == (60, 1, True)
    assert (past.length, past.depth, past.present, past.zero) == (40, 0, False, True)


@pytest.mark.parametrize(
    ("base", "depth", "words"),
    [
        ([], [(8, 1)], "no extent of base:allocation"),
        ([(8, 0)], [], "no extent of qemu:allocation-depth"),
        ([(4, 0), (0, 0)], [(8, 1)], "without length"),
        ([(8, 0)], [(8, 3)], "allocation depth 3 .* chain has 2"),
        ([(8, 0)], [(8, 2**32 - 1)], "allocation depth 4294967295"),
    ],
)
def test_a_lying_server_is_named_and_nothing_is_taken(base: Runs, depth: Runs, words: str) -> None:
    builder = NBDMapBuilder([8, 8], 0, 8)
    with pytest.raises(NBDProtocolError, match=words):
        builder.feed(array(base), array(depth))
    assert builder.next_offset == 0
    with pytest.raises(NBDProtocolError, match="only up to 0"):
        builder.finish()


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_lengths_that_overflow_a_sum_are_cut_at_the_end(dtype: Any) -> None:
    size = 2**63 - 1
    huge = [(2**63 - 1, 0)] * 5
    found = merge(array(huge, dtype), array(huge[:1], dtype) | 1, 5, size - 5, Nodes.of([size]))
    assert found.stop == size
    assert found.starts.tolist() == [5]


def test_a_sum_that_overflows_midway_is_cut_at_the_end() -> None:
    size = 2**63 - 1
    halves = array([(2**62, 0)] * 4, np.uint64)
    found = merge(halves, array([(2**62, 1)] * 4, np.uint64), 0, size, Nodes.of([size]))
    assert (found.starts.tolist(), found.stop) == ([0, 2**62], size)


def test_a_negative_length_is_no_length() -> None:
    with pytest.raises(NBDProtocolError, match="without length"):
        merge(array([(-5, 0)], np.int64), array([(8, 1)]), 0, 8, Nodes.of([8]))


def test_a_server_that_never_ends_is_stopped() -> None:
    builder = NBDMapBuilder([10**9], 0, 10**9, allowance=ExtentAllowance(1000))
    crumbs = array([(1, 0)] * 400)
    builder.feed(crumbs, crumbs | 1)
    builder.feed(crumbs, crumbs | 1)
    with pytest.raises(NBDError, match="more than 1000 extents; it was stopped at offset 800"):
        builder.feed(crumbs, crumbs | 1)


def test_a_request_outside_the_disk_is_refused() -> None:
    for offset, length in ((0, 9), (8, 1), (-1, 2), (4, -1)):
        with pytest.raises(RangeError, match="outside the disk of 8 bytes"):
            NBDMapBuilder([8, 100], offset, length)


@pytest.mark.parametrize("levels", [[0], [1, 2], [0, 2], [0, -1], [0, 1, 2]])
def test_levels_that_fit_no_chain_are_refused(levels: list[int]) -> None:
    with pytest.raises(RequestError, match="levels"):
        Nodes.of([8, 8], levels)
    with pytest.raises(RequestError, match="levels"):
        Nodes.of([])


# Real QEMU: the same chain through qemu-nbd's two contexts and through qemu-img map


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}: {done.stderr}"
    return done.stdout


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def served(image: str, directory: Path) -> Iterator[str]:
    """Serve an image read-only with allocation depths; yields the URI."""
    path = directory / "nbd.sock"
    path.unlink(missing_ok=True)
    command = ["qemu-nbd", *_THROTTLE, "-r", "-A", "-t", "-k", str(path), image]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            deadline = time.monotonic() + 120
            while not listens(path):  # the socket exists a moment before it listens
                assert server.poll() is None, server.stderr.read() if server.stderr else ""
                assert time.monotonic() < deadline, "qemu-nbd never listened"
                time.sleep(0.01)
            yield f"nbd+unix:///?socket={path}"
        finally:
            server.terminate()


def context(uri: str, name: str) -> Runs:
    return [
        (e["length"], e["type"]) for e in json.loads(run("nbdinfo", "--json", f"--map={name}", uri))
    ]


def both_views(
    image: str, directory: Path, sizes: Sequence[int], levels: Sequence[int] | None = None
) -> tuple[AllocationMap, AllocationMap]:
    """Return the map by our rules from NBD, and qemu-img's own."""
    with served(image, directory) as uri:
        base = array(context(uri, "base:allocation"))
        depth = array(context(uri, "qemu:allocation-depth"))
    builder = NBDMapBuilder(sizes, 0, int(base[:, 0].sum()), levels=levels)
    builder.feed(base, depth)
    records = json.loads(run("qemu-img", "map", *_THROTTLE, "--output=json", image))
    return builder.finish(), AllocationMap.from_qemu_img(records).without_reserved()


def protocol(path: Path, driver: str, **more: Any) -> dict[str, Any]:
    return {"driver": driver, "file": {"driver": "file", "filename": str(path)}, **more}


def make_layer(
    directory: Path,
    index: int,
    fmt: str,
    size: int,
    backing: tuple[Path, str] | None,
    commands: Sequence[str],
    options: str = "",
) -> Path:
    path = directory / f"layer{index}.{fmt}"
    below = ["-b", str(backing[0]), "-F", backing[1]] if backing else []
    more = ["-o", options] if options else []
    run("qemu-img", "create", "-q", "-f", fmt, *more, *below, path, str(size))
    if commands:
        run("qemu-io", "-f", fmt, *itertools.chain(*(("-c", c) for c in commands)), path)
    return path


def virtual_size(path: Path, fmt: str) -> int:
    return int(
        json.loads(run("qemu-img", "info", "--output=json", "-f", fmt, path))["virtual-size"]
    )


@needs_tools
@pytest.mark.parametrize("seed", range(12))
def test_random_chains_map_as_qemu_img_maps_them(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    depth = rng.randint(1, 5)
    sizes: list[int] = []
    below: tuple[Path, str] | None = None
    for index in range(depth):
        base = index == 0
        fmt = (
            rng.choice(["raw", "qcow2", "qed", "vmdk"])
            if base
            else rng.choice(["qcow2", "qcow2", "qed"])
        )
        # qed and vmdk round sizes; raw may end anywhere (QEMU rounds up to a sector)
        size = rng.randint(1, 32) * 65536 + (
            rng.choice([0, 512, 4096, 1000]) if fmt == "raw" else 0
        )
        cluster = rng.choice([4096, 65536])
        commands = []
        for _ in range(rng.randint(0, 12)):
            verb = rng.choice(["write -P 7", "write -z", "write -z -u", "discard", "write -c -P 9"])
            if ("-c" in verb and fmt != "qcow2") or ("-z" in verb and fmt == "vmdk"):
                verb = "write -P 5"
            unit = cluster if "-c" in verb else 512
            length = unit if "-c" in verb else rng.choice([512, 4096, 65536, 100 * 512])
            at = rng.randrange(0, max(1, (size - length) // unit + 1)) * unit
            if at + length <= size:
                commands.append(f"{verb} {at} {length}")
        # QEMU compresses only into clusters that are not allocated yet: those come first, once.
        packed = sorted({c for c in commands if "-c" in c})
        commands = packed + [c for c in commands if c not in packed]
        options = f"cluster_size={cluster}" if fmt == "qcow2" else ""
        path = make_layer(tmp_path, index, fmt, size, below, commands, options)
        below = path, fmt
        sizes.insert(0, virtual_size(path, fmt))
    ours, theirs = (
        both_views(str(below[0]), tmp_path, sizes)
        if below and below[1] != "raw"
        else (both_views("json:" + json.dumps(protocol(below[0], "raw")), tmp_path, sizes))
    )
    assert ours.to_qemu_img() == theirs.to_qemu_img()


@needs_tools
def test_a_short_middle_layer_maps_as_qemu_img_maps_it(tmp_path: Path) -> None:
    mib = 1 << 20
    base = make_layer(tmp_path, 0, "raw", 3 * mib, None, ["write -P 1 1M 64k", "write -P 1 2M 64k"])
    middle = make_layer(tmp_path, 1, "qcow2", mib + 512, (base, "raw"), ["write 64k 4k"])
    top = make_layer(
        tmp_path,
        2,
        "qcow2",
        4 * mib,
        (middle, "qcow2"),
        [
            "write -z 128k 64k",
            "write 256k 64k",
            "write -z 256k 64k",
            "write -c 512k 64k",
            "write 3M 4k",
        ],
    )
    ours, theirs = both_views(str(top), tmp_path, [4 * mib, mib + 512, 3 * mib])
    assert ours.to_qemu_img() == theirs.to_qemu_img()
    assert not ours.at(2 * mib).present, "the base's data is hidden"


@needs_tools
@pytest.mark.parametrize("fmt", ["qcow2", "raw", "vdi", "vpc", "vmdk", "qed", "parallels", "vhdx"])
def test_one_layer_of_each_format(fmt: str, tmp_path: Path) -> None:
    size = 4 << 20
    path = make_layer(tmp_path, 0, fmt, size, None, ["write -P 3 1M 1M"])
    image = "json:" + json.dumps(protocol(path, fmt))
    ours, theirs = both_views(image, tmp_path, [virtual_size(path, fmt)])
    assert ours.to_qemu_img() == theirs.to_qemu_img()


@needs_tools
@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
def test_a_preallocated_layer_over_data(preallocation: str, tmp_path: Path) -> None:
    path = make_layer(
        tmp_path, 0, "qcow2", 1 << 20, None, ["write 64k 64k"], f"preallocation={preallocation}"
    )
    ours, theirs = both_views(str(path), tmp_path, [1 << 20])
    assert ours.to_qemu_img() == theirs.to_qemu_img()


@needs_tools
def test_a_filter_inside_the_chain_goes_by_the_layer_under_it(tmp_path: Path) -> None:
    """As a commit job puts one there; qemu-img skips filters, NBD counts them."""
    mib = 1 << 20
    base = make_layer(tmp_path, 0, "raw", 3 * mib, None, ["write -P 1 0 64k", "write 2M 64k"])
    middle = make_layer(tmp_path, 1, "qcow2", mib, (base, "raw"), ["write 64k 64k"])
    # Its header names no backing, which would contradict the filter given below.
    top = make_layer(tmp_path, 2, "qcow2", 4 * mib, None, ["write 128k 64k"])
    below = protocol(middle, "qcow2", backing=protocol(base, "raw"))
    chain = protocol(
        top, "qcow2", backing={"driver": "throttle", "throttle-group": "idle", "file": below}
    )
    ours, theirs = both_views(
        "json:" + json.dumps(chain), tmp_path, [4 * mib, mib, mib, 3 * mib], [0, 1, 1, 2]
    )
    assert ours.to_qemu_img() == theirs.to_qemu_img()
