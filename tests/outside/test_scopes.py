"""VMs of one test, of a module, of the run; tests in every loop; tests without one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from qmpblock.testing import (
    Invariant,
    QemuProcess,
    StartQemu,
    StressSpec,
    build,
    check_acknowledged,
    parse_scenario,
    read_area,
)

DISK = parse_scenario(
    """
about: A disk that is written to
images:
  - {size: 8M, content: [write 0 64K 0xaa]}
guest: [write 4M 64K 0x11, flush]
""",
    "disk",
)
VERSIONS: set[tuple[int, int, int]] = set()


async def use(vm: QemuProcess, qemu: str) -> None:
    assert vm.command[0] == qemu
    await vm.guest_writes("d0")
    assert vm.guest is not None
    spec = StressSpec(offset=1 << 20, blocks=128, total=300)
    await vm.guest.stress(spec)
    assert (await vm.guest.finish_stress()).acked == 300


class TestLoops:
    """A test in each loop, whatever the loop of the fixtures is."""

    @pytest.mark.asyncio(loop_scope="function")
    async def test_function(
        self, start_qemu: StartQemu, qemu_binary: str, invariant: Invariant
    ) -> None:
        await use(await start_qemu(DISK, guest=True), qemu_binary)

    @pytest.mark.asyncio(loop_scope="class")
    async def test_class(
        self, start_qemu: StartQemu, qemu_binary: str, invariant: Invariant
    ) -> None:
        await use(await start_qemu(DISK, guest=True), qemu_binary)

    @pytest.mark.asyncio(loop_scope="module")
    async def test_module(
        self, start_qemu: StartQemu, qemu_binary: str, invariant: Invariant
    ) -> None:
        await use(await start_qemu(DISK, guest=True), qemu_binary)

    @pytest.mark.asyncio(loop_scope="session")
    async def test_session(
        self, start_qemu: StartQemu, qemu_binary: str, invariant: Invariant
    ) -> None:
        await use(await start_qemu(DISK, guest=True), qemu_binary)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(start_module_qemu: StartQemu) -> QemuProcess:
    return await start_module_qemu(DISK, guest=True)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("number", range(2))
async def test_a_vm_of_the_module(shared: QemuProcess, number: int, qemu_binary: str) -> None:
    await use(shared, qemu_binary)


@pytest.mark.asyncio(loop_scope="session")
async def test_a_vm_of_the_run(start_session_qemu: StartQemu, qemu_binary: str) -> None:
    await use(await start_session_qemu(DISK, guest=True), qemu_binary)


def test_without_asyncio(
    start_blocking_qemu: Callable[..., Any],
    qemu_version: tuple[int, int, int],
    invariant: Invariant,
) -> None:
    vm = start_blocking_qemu(DISK, guest=True)
    assert vm.version == qemu_version
    spec = StressSpec(offset=1 << 20, blocks=128, total=300)
    vm.guest.stress(spec)
    assert vm.guest.finish_stress().acked == 300
    assert vm.guest.check() > 0


@pytest.mark.asyncio
@pytest.mark.needs_qemu(">= 11", reason="the newer of the two")
async def test_on_the_newer_one(start_qemu: StartQemu, qemu_version: tuple[int, int, int]) -> None:
    assert qemu_version >= (11,)
    assert (await start_qemu()).version == qemu_version


@pytest.mark.asyncio
async def test_what_the_guest_wrote_is_on_the_disk(start_qemu: StartQemu, vm_dir: Path) -> None:
    built = await build(DISK, vm_dir / "images")
    vm = await start_qemu(built, guest=True)
    assert vm.guest is not None
    spec = StressSpec(offset=1 << 20, blocks=128, flush_every=10)
    await vm.guest.stress(spec)
    while (reached := await vm.guest.progress()).flushed < 50:
        await asyncio.sleep(0.01)
    await vm.kill()
    data = await read_area(built.disks[0], spec.offset, spec.length)
    found = check_acknowledged(data, spec, reached.flushed, reached.issued + 1_000_000)
    assert found.ok, str(found)
