"""The backup program of the chapter, tested by a project with strict types and strict markers."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from qmpblock.testing import (
    Bounds,
    Controller,
    Invariant,
    QemuProcess,
    StartQemu,
    StorageDaemon,
    StressSpec,
    Taken,
    Tools,
    build,
    check_acknowledged,
    check_one_instant,
    check_point_in_time,
    inject,
    parse_scenario,
    read_area,
    slow,
)

PROGRAM = Path(__file__).parent / "chapter" / "backup.py"
ONE = parse_scenario(
    """
about: A disk over a backing image
images:
  - {size: 8M, content: [write 0 1M 0xaa]}
  - {content: [write 1M 64K 0xbb]}
""",
    "one",
)
TWO = parse_scenario(
    """
about: Two disks, one of them on an iothread
disks:
  - {name: d0, images: [{size: 4M}], attach: {iothread: one}}
  - {name: d1, images: [{size: 4M, format: raw}], attach: {device: virtio-scsi}}
""",
    "two",
)


def tool(directory: Path, *words: object) -> Controller:
    return Controller([sys.executable, str(PROGRAM), *map(str, words)], directory)


async def writing(
    vm: QemuProcess, name: str = "d0", *, flush_every: int = 0, rate: int = 0
) -> StressSpec:
    assert vm.guest is not None
    number = await vm.guest_number(name)
    spec = StressSpec(disk=number, offset=2 << 20, blocks=256, flush_every=flush_every, rate=rate)
    await vm.guest.stress(spec)
    while (await vm.guest.progress(number)).acked < 50:
        await asyncio.sleep(0.01)
    return spec


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("slowed", [False, True])
async def test_a_point_in_time(
    start_qemu: StartQemu, invariant: Invariant, vm_dir: Path, slowed: bool
) -> None:
    built = await build(ONE, vm_dir / "images")
    disk = slow(built.disks[0], 16 << 20, layer=1) if slowed else built.disks[0]
    vm = await start_qemu([disk], guest=True)
    spec = await writing(vm, rate=200 if slowed else 0)
    assert vm.guest is not None
    async with (
        vm.guest.bounds(spec.disk) as bounds,
        tool(vm_dir, vm.monitor_path, vm_dir, "d0") as t,
    ):
        assert await t.wait() == 0, t.stderr
    copy = await read_area(vm_dir / "d0.raw", spec.offset, spec.length, format="raw")
    found = check_point_in_time(copy, spec, bounds[spec.disk])
    assert found.ok, str(found)
    later = await vm.guest.progress(spec.disk)
    stale = check_point_in_time(copy, spec, Bounds(acked=later.acked + 1, issued=later.issued + 1))
    assert stale.lost
    nothing = check_point_in_time(bytes(spec.length), spec, bounds[spec.disk])
    assert not nothing.ok


@pytest.mark.asyncio(loop_scope="class")
@pytest.mark.parametrize("together", [True, False])
async def test_one_instant(
    start_qemu: StartQemu, invariant: Invariant, vm_dir: Path, together: bool
) -> None:
    vm = await start_qemu(TWO, guest=True)
    assert vm.guest is not None
    names = ("d0", "d1")
    specs = await vm.guest.stress_in_step(
        *[
            StressSpec(disk=await vm.guest_number(name), blocks=128, seed=seed)
            for seed, name in enumerate(names, 1)
        ]
    )
    while min([(await vm.guest.progress(spec.disk)).acked for spec in specs]) < 50:
        await asyncio.sleep(0.01)
    async with vm.guest.bounds(*[spec.disk for spec in specs]) as bounds:
        for words in [names] if together else [("d0",), ("d1",)]:
            async with tool(vm_dir, vm.monitor_path, vm_dir, *words) as run:
                assert await run.wait() == 0, run.stderr
    for spec in specs:  # before QEMU ends: 7.2 may abort, with a disk on an iothread under load
        await vm.guest.stop_stress(spec.disk)
    taken = {
        name: Taken(
            await read_area(vm_dir / f"{name}.raw", spec.offset, spec.length, format="raw"),
            spec,
            bounds[spec.disk],
        )
        for name, spec in zip(names, specs, strict=True)
    }
    assert check_one_instant(taken).ok == together


@pytest.mark.asyncio(loop_scope="session")
async def test_the_tool_is_killed(
    start_qemu: StartQemu, invariant: Invariant, vm_dir: Path
) -> None:
    vm = await start_qemu(ONE, guest=True)
    spec = await writing(vm)
    async with tool(vm_dir, vm.monitor_path, vm_dir, "--slowly", "d0") as run:
        await run.wait_for_output("copying")
        run.kill()
    with pytest.raises(AssertionError, match="appeared: job: backup-d0"):
        await invariant.verify(vm)
    async with tool(vm_dir, vm.monitor_path, "clean") as run:
        assert await run.wait() == 0, run.stderr
    assert vm.guest is not None
    assert (await vm.guest.stop_stress(spec.disk)).errors == 0
    assert await vm.guest.check(spec.disk) > 0


@pytest.mark.asyncio
async def test_qemu_is_killed(start_qemu: StartQemu, vm_dir: Path) -> None:
    vm = await start_qemu(ONE, guest=True)
    spec = await writing(vm, flush_every=10)
    assert vm.guest is not None
    async with tool(vm_dir, vm.monitor_path, vm_dir, "--slowly", "d0") as run:
        await run.wait_for_output("copying")
        while not (reached := await vm.guest.progress(spec.disk)).flushed:
            await asyncio.sleep(0.01)
        await vm.kill()
        assert await run.wait() != 0
    data = await read_area(vm.disk("d0"), spec.offset, spec.length)
    assert check_acknowledged(data, spec, reached.flushed, reached.issued + 1_000_000).ok


@pytest.mark.asyncio
async def test_a_source_that_cannot_be_read(
    start_qemu: StartQemu, invariant: Invariant, vm_dir: Path
) -> None:
    built = await build(ONE, vm_dir / "images")
    vm = await start_qemu([inject(built.disks[0], "read_aio", "EIO", layer=1)], guest=True)
    async with tool(vm_dir, vm.monitor_path, vm_dir, "d0") as run:
        assert await run.wait() != 0
        assert "Input/output error" in run.stderr


@pytest.mark.asyncio
async def test_a_server_that_goes_and_comes_back(qemu_binary: str, vm_dir: Path) -> None:
    built = await build(ONE, vm_dir / "images", Tools.of(qemu_binary))
    async with StorageDaemon(built.disks) as server:
        assert await read_area(server.uri("d0"), 1 << 20, 4096) == b"\xbb" * 4096
        await server.kill()
        await server.start()
        assert await read_area(server.uri("d0"), 0, 4096) == b"\xaa" * 4096
