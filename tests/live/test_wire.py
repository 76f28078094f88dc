"""Copies that go to an NBD server over a wire of ours, and what becomes of the guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from disturbed import nothing_of_ours, until, writes_on
from nbdservers import HOST, make_credentials, serving, tls_options
from otherusers import USERS, VM_USER, UsersQemu

from qmpblock.address import UnixAddress
from qmpblock.copying import wire as wire_module
from qmpblock.copying.relay import End
from qmpblock.copying.target import Credentials, NBDTarget, parse_target
from qmpblock.copying.wire import Wire, clear_wire, wire_socket
from qmpblock.errors import NBDConnectError, RequestError, StalledError
from qmpblock.names import new_run, wire_node
from qmpblock.qemu.connection import Connection, NBDAccess
from qmpblock.testing import Controller, StorageDaemon, Tools, build, parse_scenario, slow
from qmpblock.testing.stamps import StressSpec

pytestmark = pytest.mark.live

MIB = 1 << 20
SOURCE = "about: A disk.\nimages: [{size: 64M, content: [write 0 48M 0xaa]}]\n"
SERVED = "about: A server's.\ndisks: [{name: t, images: [{size: 64M, format: raw}]}]\n"
SPEC = StressSpec(
    offset=48 * MIB, blocks=1024, block_size=4096, queue_depth=4, seed=9, flush_every=20, rate=150
)


class _GivenUpError(Exception):
    """What a copy that has failed leaves by."""


AT_ONCE = 30.0  # seconds in which a command that nothing holds is done, on a busy machine
HELD = 1.5  # seconds for which a command is looked at that something holds


@pytest.fixture
async def served(vm_dir, qemu_binary):
    built = await build(parse_scenario(SERVED, "served"), vm_dir / "served", Tools.of(qemu_binary))
    async with StorageDaemon(built.disks, writable=True) as server:
        server.image = built.disks[0].active.path
        yield server


@pytest.fixture
async def vm(start_qemu, vm_dir, qemu_binary, invariant):
    text = parse_scenario(SOURCE, "source")
    built = await build(text, vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    return vm


@contextlib.asynccontextmanager
async def connected(vm, **more):
    async with Connection.open(vm.monitor_path, NBDAccess(), **more) as controller:
        yield controller


def target(served):
    return parse_target(served.uri("t"))


async def mirror(vm, wire, **more):
    """Begin a background mirror; `speed`: bytes a second."""
    await vm.execute(
        "blockdev-mirror", job_id="copy", device="d0", target=wire.node, sync="full", **more
    )


async def job(vm):
    return next((one for one in await vm.execute("query-jobs") if one["id"] == "copy"), None)


async def gone(vm, limit=60.0):
    """Wait until there is no job; return the seconds that took."""
    began = time.monotonic()

    async def none():
        return await job(vm) is None

    await until(none, "the end of the job", limit)
    return time.monotonic() - began


async def ready(vm):
    async def is_ready():
        return (await job(vm))["status"] == "ready"

    await until(is_ready, "a mirror that is ready")


async def unharmed(vm):
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert await vm.guest.check() > 0
    return done


async def answers(vm):
    """All that drains is done at once; the guest begins anew."""
    for command in ("stop", "cont", "system_reset"):
        async with asyncio.timeout(AT_ONCE):
            await vm.execute(command)


async def nodes(vm):
    return sorted(
        one["node-name"] for one in await vm.execute("query-named-block-nodes", flat=True)
    )


async def same(vm, image):
    """Whether a raw image holds what the guest's disk does, once QEMU has ended."""
    source = vm.disk("d0").active.path
    await vm.quit()
    command = [Tools.of().img, "compare", "-f", "qcow2", "-F", "raw", source, image]
    await asyncio.to_thread(subprocess.check_output, command)


async def copy_whole(vm, wire):
    """Mirror until the guest, which then writes no more, and the target are the same."""
    await mirror(vm, wire)
    await ready(vm)
    await unharmed(vm)
    await vm.execute("block-job-cancel", device="copy")
    await gone(vm)


async def test_a_mirror_that_goes_well(vm, served):
    before = await nodes(vm)
    async with (
        connected(vm) as controller,
        Wire.open(controller, target(served), run=new_run()) as wire,
    ):
        await copy_whole(vm, wire)
        assert wire.relay.sent > 48 * MIB
        assert wire.relay.ended is None
        assert not wire.relay.outstanding
    assert wire.relay.ended in (End.QEMU, End.SERVER)
    assert await nodes(vm) == before
    await nothing_of_ours(vm)
    await served.close()
    await same(vm, served.image)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a QEMU as another user")
async def test_a_qemu_of_another_user(vm_dir, qemu_binary, served, monkeypatch):
    """The socket is in a directory that is its own, and nobody else's."""
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    built = await build(parse_scenario(SOURCE, "its"), vm_dir / "its", Tools.of(qemu_binary))
    place = vm_dir / "vm"
    place.mkdir()
    for path in (place, vm_dir / "its", *(vm_dir / "its").rglob("*")):
        os.chown(path, VM_USER, VM_USER)
    vm_dir.chmod(0o755)
    user = USERS["the VM's user"]
    async with (
        UsersQemu.of(built, directory=place, qemu=qemu_binary, user=user, umask=0o007) as vm,
        connected(vm) as controller,
    ):
        async with Wire.open(controller, target(served), run=new_run()) as wire:
            folder = os.path.dirname(wire.relay.path)
            status = os.stat(folder)
            assert (status.st_uid, status.st_mode & 0o777) == (VM_USER, 0o700)
            await mirror(vm, wire)
            await ready(vm)
            await vm.execute("block-job-cancel", device="copy")
            await gone(vm)
        assert not os.path.exists(folder)
        await nothing_of_ours(vm)
        vm.expect_exit()


@pytest.fixture
def credentials(vm_dir):
    return make_credentials(vm_dir / "credentials")


@pytest.mark.parametrize("kind", ["", "x509", "psk"])
async def test_over_tcp_and_with_tls(vm, vm_dir, kind, credentials, free_port):
    image = vm_dir / "target"
    image.touch()
    os.truncate(image, 64 * MIB)
    words = tls_options(credentials, kind) if kind else []
    uri = {"": "nbd://127.0.0.1:{}/t", "psk": "nbds://127.0.0.1:{}/t"}.get(
        kind, "nbds://127.0.0.1:{}/t?tls-hostname=" + HOST
    )
    where = parse_target(uri.format(free_port))
    creds = Credentials(str(credentials / "client"), kind, "alice") if kind else None
    async with (
        serving(image, *words, port=free_port),
        connected(vm) as controller,
        Wire.open(controller, where, run=new_run(), credentials=creds) as wire,
    ):
        await copy_whole(vm, wire)
        assert wire.relay.sent > 48 * MIB
    await nothing_of_ours(vm)
    await same(vm, image)


async def test_tls_at_a_unix_socket_and_with_whom_it_is_not_spoken(vm, vm_dir, credentials):
    before = await nodes(vm)
    image, path = vm_dir / "target", vm_dir / "s"
    image.touch()
    os.truncate(image, 64 * MIB)
    where = f"nbds+unix:///t?socket={path}&tls-hostname="
    creds = Credentials(str(credentials / "client"))
    async with (
        serving(image, *tls_options(credentials, "x509"), path=path),
        connected(vm) as controller,
    ):
        for target, given, words in (
            (parse_target(where + "other.example"), creds, "hostname"),
            (parse_target(where + HOST), Credentials(str(vm_dir)), "tls-creds-x509|credentials"),
            (parse_target(f"nbd+unix:///t?socket={path}"), None, "TLS"),
        ):
            with pytest.raises(NBDConnectError, match=words):
                async with Wire.open(controller, target, run=new_run(), credentials=given):
                    pytest.fail("there is a wire")
            await nothing_of_ours(vm)
        good = parse_target(where + HOST)
        async with Wire.open(controller, good, run=new_run(), credentials=creds) as wire:
            assert wire.node in await nodes(vm)
    assert await nodes(vm) == before
    await unharmed(vm)


@pytest.mark.parametrize("first", ["cancel", "cut"])
async def test_a_server_that_does_not_answer_any_more(vm, served, first):
    before = await nodes(vm)
    async with connected(vm) as controller:
        with contextlib.suppress(_GivenUpError):
            async with Wire.open(controller, target(served), run=new_run()) as wire:
                await mirror(vm, wire, speed=16 * MIB)
                await until(lambda: wire.relay.sent > MIB, "bytes of a copy")
                served.pause()
                await until(lambda: wire.relay.stalled_for > 1, "a stall")
                await writes_on(vm.guest, count=20)
                if first == "cancel":
                    await vm.execute("job-cancel", id="copy")
                    await asyncio.sleep(0.3)
                    assert await job(vm) is not None, "nothing but a cut ends it"
                    wire.cut()
                else:
                    wire.cut()
                took = await gone(vm)
                raise _GivenUpError
    assert took < AT_ONCE
    assert wire.relay.ended is End.CUT
    await unharmed(vm)
    assert await nodes(vm) == before
    await nothing_of_ours(vm)
    await answers(vm)


async def test_what_drains_waits_for_the_server_until_the_wire_is_cut(vm, served):
    """And `within` bounds that, with no help of the event loop's."""
    async with connected(vm) as controller:
        with pytest.raises(StalledError, match="did not answer for") as caught:  # noqa: PT012
            async with Wire.open(controller, target(served), run=new_run()) as wire:
                # One that ended while QEMU flushes would break 7.2 (K34).
                await mirror(vm, wire, speed=16 * MIB, on_target_error="stop")
                await until(lambda: wire.relay.sent > MIB, "bytes of a copy")
                served.pause()
                await until(lambda: wire.relay.stalled_for > 0.5, "a stall")
                stop = asyncio.create_task(vm.execute("stop"))
                await asyncio.sleep(HELD)
                assert not stop.done()
                began = time.monotonic()
                with wire.relay.within(0.1):
                    await stop
                assert time.monotonic() - began < AT_ONCE
                assert wire.relay.ended is End.STALLED
                await vm.execute("cont")
                await vm.execute("job-cancel", id="copy")
                await gone(vm)
    assert "may not be on its storage" in caught.value.standing
    await unharmed(vm)
    await nothing_of_ours(vm)


async def test_a_server_is_waited_for_less_long_than_qemu_is(vm, served):
    """Else what waits for QEMU, which waits for the server, is given up first, and stays."""
    async with connected(vm, stall=2) as controller:
        with pytest.raises(StalledError, match=r"NBD server of .* did not answer"):  # noqa: PT012
            async with Wire.open(controller, target(served), run=new_run()) as wire:
                write = f'qemu-io {wire.node} "write 0 64k"'
                await vm.execute("human-monitor-command", command_line=write)
                served.pause()
    await unharmed(vm)
    await nothing_of_ours(vm)
    await answers(vm)


async def test_a_server_that_dies(vm, served):
    async with connected(vm) as controller:
        with controller.monitor.subscribe("BLOCK_JOB_COMPLETED") as events:
            async with Wire.open(controller, target(served), run=new_run()) as wire:
                await mirror(vm, wire, speed=16 * MIB)
                await until(lambda: wire.relay.sent > MIB, "bytes of a copy")
                await served.kill()
                assert await gone(vm) < AT_ONCE
                await answers_of(vm)
            assert "error" in (await events.get(60))["data"]
    assert wire.relay.ended is End.SERVER
    await unharmed(vm)
    await nothing_of_ours(vm)


async def answers_of(vm):
    async with asyncio.timeout(AT_ONCE):
        await vm.execute("stop")
        await vm.execute("cont")


async def test_a_slow_server_is_not_taken_for_a_stalled_one(vm, vm_dir, qemu_binary):
    """The first request of a mirror may be one for 64 MiB of zeros: that takes longest (7.2)."""
    built = await build(parse_scenario(SERVED, "slow"), vm_dir / "slow", Tools.of(qemu_binary))
    async with (
        StorageDaemon([slow(built.disks[0], 8 * MIB)], writable=True) as server,
        connected(vm, stall=12) as controller,
        Wire.open(controller, target(server), run=new_run()) as wire,
    ):
        began, longest = time.monotonic(), 0.0
        await mirror(vm, wire)
        while wire.relay.sent < 40 * MIB and wire.relay.ended is None:
            longest = max(longest, wire.relay.stalled_for)
            await asyncio.sleep(0.05)
        assert (wire.relay.ended, wire.relay.patience) == (None, 12), longest
        assert time.monotonic() - began > 2
        await vm.execute("job-cancel", id="copy")
        await gone(vm)
    await unharmed(vm)
    await nothing_of_ours(vm)


CHILD = """
import asyncio, sys
from qmpblock.copying.target import parse_target
from qmpblock.copying.wire import Wire
from qmpblock.qemu.connection import Connection, NBDAccess
async def main(monitor, target, run):
    async with Connection.open(monitor, NBDAccess()) as vm:
        async with Wire.open(vm, parse_target(target), run=run) as wire:
            job = {"job-id": "copy", "device": "d0", "target": wire.node, "sync": "full"}
            await vm.monitor.execute("blockdev-mirror", job | {"speed": 16 << 20})
            while wire.relay.sent < 1 << 20:
                await asyncio.sleep(0.01)
            print("copying", flush=True)
            await asyncio.sleep(60)
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("stalled", [False, True])
async def test_a_controller_that_is_killed(vm, vm_dir, served, stalled):
    before, run = await nodes(vm), new_run()
    command = [sys.executable, "-c", CHILD, vm.monitor_path, served.uri("t"), run]
    with vm.control.subscribe("BLOCK_JOB_COMPLETED") as events:
        async with Controller(command, vm_dir) as child:
            await child.wait_for_output("copying")
            if stalled:
                served.pause()
                await asyncio.sleep(0.5)
            child.kill()
            assert await gone(vm) < AT_ONCE
        assert "error" in (await events.get(60))["data"]
    await unharmed(vm)
    await answers(vm)
    assert wire_node(run, 0) in await nodes(vm)
    async with connected(vm) as controller:
        for _ in range(2):
            await clear_wire(controller.monitor, wire_node(run, 0), wire_socket(run))
    assert await nodes(vm) == before
    assert not os.path.exists(os.path.dirname(wire_socket(run)))


async def test_a_server_that_goes_silent_in_the_handshake_holds_the_guest_no_longer(
    vm, vm_dir, monkeypatch
):
    monkeypatch.setattr(wire_module, "HOLD", 0.5)
    before = await nodes(vm)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(vm_dir / "s"))
    listener.listen()
    taken = []

    def greet():
        sock, _ = listener.accept()
        taken.append(sock)
        sock.sendall(b"NBDMAGICIHAVEOPT\0\3")

    thread = threading.Thread(target=greet)
    thread.start()
    silent = NBDTarget(UnixAddress(str(vm_dir / "s")), "t")
    began = time.monotonic()
    async with connected(vm) as controller:
        with pytest.raises(NBDConnectError, match=r"did not go on for 0\.5 s") as caught:
            async with Wire.open(controller, silent, run=new_run()):
                pytest.fail("there is a wire")
    assert 0.5 < time.monotonic() - began < 0.5 + AT_ONCE
    assert caught.value.standing == "nothing of ours is left in the VM"
    thread.join()
    for sock in (*taken, listener):
        sock.close()
    await unharmed(vm)
    assert await nodes(vm) == before


async def test_a_descriptor_that_was_handed_over_is_connected_to_again_by_its_number(vm, served):
    """Why there is a relay with a path: that number may be any socket of QEMU's by then."""

    def there():
        return set(os.listdir(f"/proc/{vm.pid}/fd"))

    async with connected(vm) as controller:
        monitor = controller.monitor
        with socket.socket(socket.AF_UNIX) as wire:
            wire.connect(str(served.directory / "nbd"))
            before = there()
            await monitor.pass_fd("wire", wire.fileno())
            [number] = there() - before
            server = {"type": "fd", "str": "wire"}
            options = {"driver": "nbd", "node-name": "n", "server": server, "export": "t"}
            await monitor.execute("blockdev-add", options)
            wire.shutdown(socket.SHUT_RDWR)
        ours, innocent = socket.socketpair()
        with ours, innocent:
            ours.settimeout(60)

            async def is_free():
                await vm.hmp('qemu-io n "write 0 4k"')
                return number not in there()

            await until(is_free, "the lost connection closed")
            await monitor.pass_fd("innocent", innocent.fileno())
            assert number in there()
            ours.sendall(b"what others have said to it")

            async def read_by_qemu():
                await vm.hmp('qemu-io n "write 0 4k"')
                return number not in there()

            await until(read_by_qemu, "the innocent socket read and closed")
        await monitor.execute("blockdev-del", {"node-name": "n"})
    await unharmed(vm)


async def test_an_export_that_is_not_there_or_cannot_be_written(vm, vm_dir, qemu_binary):
    built = await build(parse_scenario(SERVED, "ro"), vm_dir / "ro", Tools.of(qemu_binary))
    before = await nodes(vm)
    async with StorageDaemon(built.disks) as server, connected(vm) as controller:
        where = target(server)
        for one, words in (
            (where, "denied"),
            (NBDTarget(where.server, "none"), "none"),
        ):
            with pytest.raises(NBDConnectError, match=words):
                async with Wire.open(controller, one, run=new_run()):
                    pytest.fail("there is a wire")
        unix = NBDTarget(where.server, "t", tls=True)
        for credentials, words in (
            (None, "credentials are needed"),
            (Credentials("/d"), "tls-host"),
        ):
            with pytest.raises(RequestError, match=words):
                async with Wire.open(controller, unix, run=new_run(), credentials=credentials):
                    pytest.fail("there is a wire")
    assert await nodes(vm) == before
    await unharmed(vm)
    await nothing_of_ours(vm)
