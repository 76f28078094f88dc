"""The harness itself, on real QEMU: every scenario, the evidence, and what the invariant finds."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import sys
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from qmpblock.errors import CommandError, RequestError, UnsupportedError
from qmpblock.qemu.monitor import Monitor
from qmpblock.testing import QemuFailure, QemuProcess, Scenario, Tools, build, parse_scenario
from qmpblock.testing.faults import Controller, fill_up, inject, slow, small_file_system, unplug
from qmpblock.testing.guest_console import GuestError
from qmpblock.testing.invariant import Invariant, listening_sockets, snapshot

pytestmark = pytest.mark.live

ONE_RAW = parse_scenario("about: One.\nimages: [{size: 8M, format: raw}]\n", "one")
CHAIN = parse_scenario(
    "about: Two layers.\nimages: [{size: 8M, content: [write 0 1M 0x1]}, {}]\n"
    "guest: [write 2M 64K 0x2, flush]",
    "chain",
)


def scenario_of(text: str) -> Scenario:
    return parse_scenario(f"about: Test.\n{text}", "test")


def without_places(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if key not in ("offset", "filename")}
        for record in records
    ]


# -- scenarios


async def test_every_scenario_boots_and_its_images_verify(
    scenario: Scenario, start_qemu: Any, vm_dir: Path, qemu_binary: str
) -> None:
    tools = Tools.of(qemu_binary)
    built = await build(scenario, vm_dir / "live", tools)
    vm = await start_qemu(built, guest=True)
    for disk in vm.disks:
        await vm.guest_writes(disk)
    await vm.quit()
    again = await built.replayed(vm_dir / "replayed")
    for live, replayed in zip(built.disks, again.disks, strict=True):
        expected = without_places(await replayed.active.map(tools))
        assert without_places(await live.active.map(tools)) == expected
        assert await live.active.digest(tools) == await replayed.active.digest(tools)
        for layer in live.active.chain():
            await layer.check(tools)


@pytest.mark.scenarios("device-*.yaml", "iothread-*.yaml", "filter-*.yaml")
async def test_the_same_writes_without_a_guest(
    scenario: Scenario, start_qemu: Any, vm_dir: Path, qemu_binary: str
) -> None:
    tools = Tools.of(qemu_binary)
    built = await build(scenario, vm_dir / "live", tools)
    vm = await start_qemu(built)
    for disk in vm.disks:
        await vm.guest_writes(disk)
        assert "read 65536/65536" in await vm.qemu_io(disk, "read -P 0x11 4M 64k")
        with pytest.raises(CommandError, match="verification failed"):
            await vm.qemu_io(disk, "read -P 0x12 4M 64k")
    await vm.quit()
    again = await built.replayed(vm_dir / "replayed")
    for live, replayed in zip(built.disks, again.disks, strict=True):
        assert await live.active.digest(tools) == await replayed.active.digest(tools)


async def test_a_chain_of_150_boots(vm_dir: Path) -> None:
    images = "[{size: 1M, content: [write 0 64K 0x1]}" + ", {}" * 149 + "]"
    built = await build(scenario_of(f"images: {images}"), vm_dir)
    # Without the fixture: the invariant's snapshot of 300 nodes takes QEMU 7.2 seconds.
    async with QemuProcess.of(built) as vm:
        assert "read 65536" in await vm.qemu_io("d0", "read -P 1 0 64k")


# -- processes and their evidence


async def test_a_bad_option_fails_with_the_evidence(start_qemu: Any) -> None:
    with pytest.raises(QemuFailure) as caught:
        await start_qemu(CHAIN, extra=["-device", "nonsense"])
    assert caught.value.returncode == 1
    assert "'nonsense' is not a valid device model name" in caught.value.stderr
    for part in ("exit code: 1", "command: ", "-device nonsense", "stderr:\n", "stdout: empty"):
        assert part in str(caught.value)


async def test_a_death_is_a_failure_with_its_signal() -> None:
    vm = QemuProcess()
    try:
        await vm.start()
        os.kill(vm.pid, signal.SIGABRT)
        assert await vm.wait(120) == -signal.SIGABRT
        with pytest.raises(QemuFailure, match=r"had ended by itself(.|\n)*-6 \(SIGABRT\)"):
            await vm.quit()
    finally:
        await vm.close()
    assert not vm.directory.exists()


async def test_a_failing_test_gets_the_evidence_as_a_note() -> None:
    with pytest.raises(CommandError) as caught:
        async with QemuProcess() as vm:
            await vm.execute("no-such-command")
    assert f"-chardev socket,id=qmp,path={vm.monitor_path}" in caught.value.__notes__[0]
    assert not vm.running


async def test_an_unknown_disk_lists_those_that_there_are(start_qemu: Any) -> None:
    two = parse_scenario(
        "about: Two.\ndisks:\n  - {name: a, images: [{size: 1M}]}\n"
        "  - {name: b, images: [{size: 1M}], attach: {device: ide}}\n",
        "two",
    )
    vm = await start_qemu(two, guest=True)
    with pytest.raises(RequestError, match="no disk 'd0'; it has: a, b"):
        await vm.qemu_io("d0", "flush")
    assert await vm.guest_number("a") == 0
    with pytest.raises(RequestError, match=r"does not see b \(ide\)"):
        await vm.guest_number("b")
    with pytest.raises(RequestError, match="no guest runs"):
        await (await start_qemu(two)).guest_number("a")


async def test_kill_9_is_no_failure_where_the_test_did_it(start_qemu: Any) -> None:
    vm = await start_qemu(CHAIN, guest=True)
    assert await vm.kill() == -signal.SIGKILL
    assert vm.returncode == -signal.SIGKILL
    assert not Path(f"/proc/{vm.pid}").exists()


async def test_two_free_monitors_beside_the_harness_own(start_qemu: Any) -> None:
    vm = await start_qemu(CHAIN)
    async with (
        await Monitor.connect(vm.monitor_path) as first,
        await Monitor.connect(vm.second_monitor_path) as second,
    ):
        assert first.version == second.version == vm.version
        assert first.peer_pid == vm.pid


async def test_no_qemu_outlives_a_killed_test_run(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import asyncio
        from qmpblock.testing import QemuProcess
        async def main():
            async with QemuProcess() as vm:
                print("pid", vm.pid, vm.directory, flush=True)
                await asyncio.sleep(600)
        asyncio.run(main())
        """
    )
    async with Controller([sys.executable, "-c", program], tmp_path) as run:
        await run.wait_for_output(r"pid \d+ .*\n")
        _, pid, directory = run.stdout.split()
        assert Path(f"/proc/{pid}").exists()
        run.kill()
    for _ in range(500):
        if not Path(f"/proc/{pid}").exists():
            break
        await asyncio.sleep(0.01)
    else:
        os.kill(int(pid), signal.SIGKILL)
        pytest.fail("QEMU outlived the process that started it")
    # Nobody was left to remove what a killed run had made, unless another run has begun since.
    shutil.rmtree(directory, ignore_errors=True)


async def test_a_directory_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="too long for a UNIX socket"):
        QemuProcess(directory=tmp_path / ("x" * 100))


# -- the invariant


async def _leak_node(vm: QemuProcess) -> None:
    await vm.execute("blockdev-add", driver="null-co", node_name="left")


async def _leak_job(vm: QemuProcess) -> None:
    await vm.execute("blockdev-add", driver="null-co", node_name="target", size=8 << 20)
    await vm.execute(
        "blockdev-backup", job_id="left", device="d0", target="target", sync="full", speed=1
    )


async def _leak_object(vm: QemuProcess) -> None:
    await vm.execute("object-add", qom_type="secret", id="left", data="x")


async def _leak_bitmap(vm: QemuProcess) -> None:
    await vm.execute("block-dirty-bitmap-add", node="d0", name="left")


async def _start_server(vm: QemuProcess) -> None:
    path = str(vm.directory / "nbd")
    await vm.execute("nbd-server-start", addr={"type": "unix", "data": {"path": path}})


async def _start_tcp_server(vm: QemuProcess) -> None:
    address = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
    await vm.execute("nbd-server-start", addr=address)


async def _leak_export(vm: QemuProcess) -> None:
    await _start_server(vm)
    await vm.execute("block-export-add", type="nbd", id="left", node_name="d0")


async def _leak_fd(vm: QemuProcess) -> None:
    ours, theirs = socket.socketpair()
    async with await Monitor.connect(vm.monitor_path) as monitor:
        await monitor.pass_fd("left", theirs.fileno())
    ours.close()
    theirs.close()


async def _leak_file_fd(vm: QemuProcess) -> None:
    async with await Monitor.connect(vm.monitor_path) as monitor:
        with (vm.directory / "idle.rom").open("rb") as file:
            await monitor.pass_fd("left", file.fileno())


async def _leave_file(vm: QemuProcess) -> None:
    (vm.image_directories()[0] / "left.qcow2").write_bytes(b"")


async def _leave_temporary(vm: QemuProcess) -> None:
    (Path(os.environ["TMPDIR"]) / "qmpblock-left").mkdir()


async def _leave_stopped(vm: QemuProcess) -> None:
    await vm.execute("stop")


async def _cut_backing(vm: QemuProcess) -> None:
    options = {"driver": "qcow2", "node-name": "d0", "file": "d0-file", "backing": None}
    await vm.execute("blockdev-reopen", options=[options])


async def _change_throttle(vm: QemuProcess) -> None:
    await vm.execute(
        "qom-set", path="/objects/group-d0", property="limits", value={"bps-total": 1 << 20}
    )


async def _leave_threshold(vm: QemuProcess) -> None:
    await vm.execute("block-set-write-threshold", node_name="d0-file", write_threshold=1 << 20)


@pytest.mark.parametrize(
    ("leak", "line"),
    [
        (_leak_node, "appeared: node: left null-co"),
        (_leak_job, "appeared: job: left backup running"),
        (_leak_object, "appeared: object: left secret"),
        (_leak_bitmap, "appeared: bitmap: left of d0, recording"),
        (_start_server, r"appeared: socket: listening on unix:/.*/nbd"),
        (_start_tcp_server, r"appeared: socket: listening on tcp:\d+"),
        (_leak_export, "appeared: export: left nbd of d0"),
        (_leak_fd, "appeared: socket: connected, unix:"),
        (_leak_file_fd, r"appeared: open file: /.*/idle.rom for reading"),
        (_leave_file, r"appeared: file: /.*/left.qcow2"),
        (_leave_temporary, r"appeared: file: /.*/qmpblock-left"),
        (_leave_stopped, "disappeared: VM: running"),
        (_cut_backing, "disappeared: edge: d0 -backing-> d0-1 "),
        (_leave_threshold, "appeared: node: d0-file file .*, write threshold 1048576"),
        (_change_throttle, r"appeared: object: group-d0 throttle-group, limits .*1048576"),
    ],
)
async def test_the_invariant_finds_a_leak(
    leak: Callable[[QemuProcess], Awaitable[None]],
    line: str,
    start_qemu: Any,
    invariant: Invariant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qmpblock.testing.invariant._SETTLE", 0.3)
    filters = "attach: {filters: [throttle]}" if leak is _change_throttle else ""
    images = "images: [{size: 8M, content: [write 0 1M 0x1]}, {}]"
    vm = await start_qemu(scenario_of(f"{images}\n{filters}"))
    await leak(vm)
    with pytest.raises(AssertionError) as caught:
        await invariant.verify(vm)
    assert re.search(line, str(caught.value))


async def test_the_documented_result_may_be_declared(start_qemu: Any, invariant: Invariant) -> None:
    vm = await start_qemu(CHAIN)
    await _leak_node(vm)
    invariant.expect("appeared: node: left null-co")


async def test_an_expected_change_must_happen(
    start_qemu: Any, invariant: Invariant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpblock.testing.invariant._SETTLE", 0.1)
    vm = await start_qemu(CHAIN)
    invariant.expect("appeared: node: left")
    with pytest.raises(AssertionError, match="expected, but did not happen: appeared: node: left"):
        await invariant.verify(vm)


async def test_what_came_and_went_is_no_difference(start_qemu: Any) -> None:
    vm = await start_qemu(CHAIN, guest=True)
    await _leak_export(vm)
    assert listening_sockets(vm.pid) == sorted(
        f"unix:{vm.directory / name}" for name in ("control", "nbd", "qmp", "qmp2", "report")
    )
    await vm.guest_writes("d0")
    async with await Monitor.connect(vm.monitor_path) as monitor:
        await monitor.execute("block-export-del", {"id": "left", "mode": "hard"})
        await monitor.execute("nbd-server-stop")


async def test_an_implicit_name_is_not_the_node(start_qemu: Any) -> None:
    scenario = scenario_of(
        "images: [{size: 1M}, {}]\nattach: {node_names: no, filters: [throttle]}"
    )
    vm = await start_qemu(scenario)
    state = await snapshot(vm.control, vm.pid)
    assert not any(re.search(r"#block\d", line) for line in state.lines)
    assert any(line.startswith("node: #block qcow2") for line in state.lines)


# -- faults


async def test_an_injected_error_reaches_the_guest(start_qemu: Any, vm_dir: Path) -> None:
    built = await build(CHAIN, vm_dir / "images")
    disk = inject(built.disks[0], "write_aio", "ENOSPC", once=True)
    vm = await start_qemu([disk], extra=["-global", "virtio-blk-device.werror=report"])
    with pytest.raises(CommandError, match="No space left"):
        await vm.qemu_io(disk, "write -P 3 4M 64k")
    await vm.qemu_io(disk, "write -P 3 4M 64k")


async def test_an_error_in_a_backing_file(start_qemu: Any, vm_dir: Path) -> None:
    built = await build(CHAIN, vm_dir / "images")
    disk = inject(built.disks[0], "read_aio", "EIO", layer=1)
    vm = await start_qemu([disk])
    with pytest.raises(CommandError, match="Input/output error"):
        await vm.qemu_io(disk, "read 0 64k")
    await vm.qemu_io(disk, "read 2M 64k")


async def test_a_slow_file(start_qemu: Any, vm_dir: Path) -> None:
    built = await build(CHAIN, vm_dir / "images")
    disk = slow(built.disks[0], 4 << 20)
    vm = await start_qemu([disk])
    loop = asyncio.get_running_loop()
    begin = loop.time()
    for _ in range(3):
        await vm.qemu_io(disk, "write 2M 1M")
    assert loop.time() - begin > 0.3  # a burst of a tenth of a second is free


async def test_a_full_file_system(start_qemu: Any, vm_dir: Path) -> None:
    try:
        async with small_file_system(vm_dir / "small", 4 << 20) as directory:
            built = await build(scenario_of("images: [{size: 8M}]"), directory)
            vm = await start_qemu(built)
            filler = fill_up(directory, leave=256 << 10)
            with pytest.raises(CommandError, match="No space left"):
                await vm.qemu_io("d0", "write 0 2M")
            filler.unlink()
            await vm.qemu_io("d0", "write 0 2M")
            await vm.quit()
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("device", ["virtio-scsi", "virtio-blk"])
async def test_unplug(device: str, start_qemu: Any, invariant: Invariant) -> None:
    images = "images: [{size: 1M}]"
    vm = await start_qemu(scenario_of(f"{images}\nattach: {{device: {device}}}"), guest=True)
    invariant.expect("disappeared: device: .*vd0.* holds d0", "disappeared: edge: .*-root-> d0 ")
    await unplug(vm, "d0")
    assert all(not entry.get("qdev") for entry in await vm.execute("query-block"))


async def test_a_guest_whose_vm_does_not_run_is_told_of_at_once(start_qemu: Any) -> None:
    vm = await start_qemu(ONE_RAW, guest=True)
    loop = asyncio.get_running_loop()
    await vm.execute("stop")
    began = loop.time()
    with pytest.raises(GuestError, match="in the run state paused") as caught:
        await vm.guest.hello()
    assert "cont" in (caught.value.remedy or "")
    assert loop.time() - began < 45  # what is not told would be waited for a minute
    waiting = asyncio.create_task(vm.guest.hello())
    await asyncio.sleep(0.2)
    await vm.execute("cont")  # paused for a moment is nothing
    assert (await waiting).disks


async def test_a_guest_whose_disk_has_stopped_its_vm_is_told_of_at_once(
    start_qemu: Any, vm_dir: Path
) -> None:
    built = await build(ONE_RAW, vm_dir / "images")
    vm = await start_qemu([inject(built.disks[0], "write_aio", "ENOSPC")], guest=True)
    began = asyncio.get_running_loop().time()
    with pytest.raises(GuestError, match="in the run state io-error") as caught:
        await vm.guest.fill(0, 0, 4096, 1)
    assert "werror" in (caught.value.remedy or "")
    assert asyncio.get_running_loop().time() - began < 45
    vm.expect_exit()
    await vm.kill()


async def test_one_that_is_ending_is_waited_for(start_qemu: Any) -> None:
    """Its monitors are closed before its process can be waited for."""
    for _ in range(5):
        vm = await start_qemu(ONE_RAW)
        vm.expect_exit()
        os.kill(vm.pid, signal.SIGKILL)
        await vm.quit()
        assert not vm.running


LONG = """
import asyncio, os, subprocess, sys, tempfile
from pathlib import Path
from qmpblock.testing import QemuProcess, build, parse_scenario
from qmpblock.testing.scratch import private_directory, remove

ONE = parse_scenario("about: One.\\nimages: [{size: 8M}]\\n", "one")

async def main():
    directory = private_directory()
    built = await build(ONE, directory / "images")
    async with QemuProcess.of(built, guest=True) as vm:
        await vm.guest.fill(0, 0, 65536, 0x11)
        command = [sys.executable, "-m", "qmpblock", "disks", vm.monitor_path]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout, done.stderr)
        print("short", len(vm.monitor_path) < 60, "private",
              len(list(Path(tempfile.gettempdir()).glob("qt-*"))))
    remove(directory)
    print("left", sorted(path.name for path in Path(tempfile.gettempdir()).glob("qt-*")))

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a mount namespace")
async def test_a_long_name_of_the_temporary_directory_and_a_tmp_that_is_read_only() -> None:
    script = (
        'mount -t tmpfs tmpfs /mnt && mkdir -p "$1" && mount -t tmpfs -o ro tmpfs /tmp && '
        'TMPDIR=$1 exec "$2" -c "$3"'
    )
    place = "/mnt/" + "a-long-name-of-a-directory/" * 6
    words = (place, sys.executable, LONG)
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = (text.decode() for text in await process.communicate())
    assert process.returncode == 0, err
    assert "vd0" in out, out
    assert "short True private 2" in out
    assert "left []" in out
