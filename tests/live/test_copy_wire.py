"""Copies of running disks to NBD servers: whole ones, and what becomes of the guest otherwise."""

import asyncio
import contextlib
import os
import random
import sys
import time
from pathlib import Path

import pytest
from disturbed import nothing_of_ours
from nbdservers import (
    HOST,
    CutOffError,
    make_credentials,
    serving,
    serving_elsewhere,
    set_wire,
    slow_down,
    tls_options,
)

import qmpblock
from qmpblock.changes.leftovers import clear
from qmpblock.copying import catchup
from qmpblock.copying.copy import copy
from qmpblock.errors import (
    NBDConnectError,
    NBDDisconnectedError,
    RequestError,
    StalledError,
    UnsupportedError,
)
from qmpblock.testing import Controller, StorageDaemon, Tools, build, parse_scenario, slow
from qmpblock.testing.stamps import StressSpec, check_point_in_time

pytestmark = pytest.mark.live

MIB = 1 << 20
SIZE = 64 * MIB
SOURCE = (
    "about: A disk.\nimages: [{size: 64M, content: [write 0 40M 0xaa]}, "
    "{content: [write 3M 1M 0xbb]}]\n"
)
SERVED = "about: A server's.\ndisks: [{{name: t, images: [{{size: {}, format: raw}}]}}]\n"
SPEC = StressSpec(
    offset=48 * MIB, blocks=1024, block_size=4096, queue_depth=4, seed=9, flush_every=20, rate=150
)
GARBAGE = b"\xee"
LONGEST = 20.0  # seconds for which a request of the guest's may be held: `wire.HOLD`, and a machine
LONG = 300  # seconds: a stall limit that is not what ends it
SOON = 120  # seconds, of a busy machine

both = pytest.mark.parametrize("at", ["start", "end"])


@contextlib.asynccontextmanager
async def daemon(vm_dir, qemu_binary, size="64M", rate=None):
    """Serve a raw image that is full of something else."""
    text = parse_scenario(SERVED.format(size), "served")
    built = await build(text, vm_dir / "served", Tools.of(qemu_binary))
    image = Path(built.disks[0].active.path)
    image.write_bytes(GARBAGE * image.stat().st_size)
    disks = built.disks if rate is None else [slow(built.disks[0], rate)]
    async with StorageDaemon(disks, writable=True) as server:
        server.image = image
        yield server


@pytest.fixture
async def vm(start_qemu, vm_dir, qemu_binary, invariant):
    text = parse_scenario(SOURCE, "source")
    built = await build(text, vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu(built, guest=True)
    await vm.guest.stress(SPEC)
    await invariant.begin(vm)
    return vm


async def finished(job, at, vm):
    """Let a copy come to its end; return the bounds of what the guest had written then."""
    if at == "start":
        return None
    async for seen in job:
        if seen.ready:
            break
    async with vm.guest.bounds(0) as bounds:
        await job.complete()
    return bounds[0]


async def copied(vm, at, uri, **more):
    """Copy the disk; return the bounds of the point in time."""
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        copying = copy(controller, {disk: uri}, at=at, **more)
        async with contextlib.AsyncExitStack() as stack:
            if at == "start":
                async with vm.guest.bounds(0) as bounds:
                    job = await stack.enter_async_context(copying)
                point = bounds[0]
            else:
                job = await stack.enter_async_context(copying)
                point = await finished(job, at, vm)
        [done] = job.result.disks
        assert (done.size, done.format) == (SIZE, "raw")
        print(f"copied to {done.target}: {job.result.seconds:.2f} s, held {job.result.held:.3f} s")
    return point


async def unharmed(vm, invariant):
    """Check that the guest went on without an error, and that all is as it was."""
    held = (await vm.guest.latency()).held_us / 1e6
    print(f"longest hold of a request of the guest's: {held:.3f} s")
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert held < LONGEST
    await nothing_of_ours(vm)
    await invariant.verify(vm)
    assert await vm.guest.check() > 0


def check_whole(image, point, *, rest=0):
    """Check that an image holds the disk at that point, and behind it what it held before."""
    data = image.read_bytes()
    assert len(data) == SIZE + rest
    assert data[SIZE:] == GARBAGE * rest
    assert data[: 3 * MIB] == b"\xaa" * (3 * MIB)
    assert data[3 * MIB : 4 * MIB] == b"\xbb" * MIB
    assert data[4 * MIB : 40 * MIB] == b"\xaa" * (36 * MIB)
    assert data[40 * MIB : 48 * MIB] == bytes(8 * MIB)
    area = data[SPEC.offset : SPEC.offset + SPEC.blocks * SPEC.block_size]
    verdict = check_point_in_time(area, SPEC, point)
    assert verdict.ok, verdict
    assert data[SPEC.offset + len(area) : SIZE] == bytes(SIZE - SPEC.offset - len(area))


@both
@pytest.mark.parametrize("size", ["64M", "72M"])
async def test_to_a_unix_socket(vm, vm_dir, qemu_binary, invariant, at, size):
    """Also to a larger export, whose rest is left as it is."""
    async with daemon(vm_dir, qemu_binary, size) as server:
        point = await copied(vm, at, server.uri("t"))
        await unharmed(vm, invariant)
    check_whole(server.image, point, rest=(int(size[:-1]) - 64) * MIB)


@both
@pytest.mark.parametrize("kind", ["", "x509"])
async def test_over_tcp_and_with_tls(vm, vm_dir, invariant, at, kind, free_port):
    image = vm_dir / "target"
    image.write_bytes(GARBAGE * SIZE)
    made = make_credentials(vm_dir / "credentials") if kind else None
    uri = f"nbds://127.0.0.1:{free_port}/t?tls-hostname={HOST}" if kind else ""
    more = {}
    if kind:
        (made / "client" / "keys.psk").unlink()  # else that is meant
        more["tls_creds"] = str(made / "client")
    words = tls_options(made, kind) if kind else []
    async with serving(image, *words, port=free_port):
        point = await copied(vm, at, uri or f"nbd://127.0.0.1:{free_port}/t", **more)
        await unharmed(vm, invariant)
    check_whole(image, point)


@both
async def test_what_cannot_be_is_refused(vm, vm_dir, qemu_binary, invariant, at):
    async with (
        daemon(vm_dir, qemu_binary, "63M") as server,
        qmpblock.connect(vm.monitor_path) as controller,
    ):
        [disk] = await controller.disks()
        uri = server.uri("t")
        before = server.image.read_bytes()
        for target, more, error, words in (
            (uri, {}, RequestError, rf"{63 * MIB} bytes.*{SIZE}"),
            (uri.replace("/t?", "/other?"), {}, NBDConnectError, "cannot open the target"),
            (f"nbd+unix:///t?socket={vm_dir}/none", {}, NBDConnectError, "no NBD server"),
            (
                uri,
                {"at": "start", "format": "qcow2", "resume": True},
                UnsupportedError,
                "is not gone on from",
            ),
            (uri, {"layers": "top"}, RequestError, "backing image"),
            (uri, {"at": "pivot"}, UnsupportedError, "cannot go over"),
            (uri, {"tls_creds": "/etc"}, RequestError, "no target has TLS"),
            (str(vm_dir / "f"), {"tls_creds": "/etc"}, RequestError, "no target has TLS"),
            ("nbds://h/t", {}, RequestError, "credentials are needed"),
        ):
            with pytest.raises(error, match=words) as caught:
                async with copy(controller, {disk: target}, **{"at": at} | more):
                    pytest.fail("it copies")
            assert caught.value.standing
        assert server.image.read_bytes() == before
        assert not (vm_dir / "f.partial").exists()
    await unharmed(vm, invariant)


@contextlib.asynccontextmanager
async def disturbed(vm, at, uri, stall, speed=8 * MIB):
    """Copy slowly; the body disturbs it once bytes go there."""
    async with qmpblock.connect(vm.monitor_path, stall=stall) as controller:
        [disk] = await controller.disks()
        async with copy(controller, {disk: uri}, at=at, speed=speed) as job:
            async for seen in job:
                if seen.done > 4 * MIB:
                    break
            yield job
            async for seen in job:
                if seen.ready:
                    break


@both
async def test_a_server_that_stops_answering(vm, vm_dir, qemu_binary, invariant, at):
    async with daemon(vm_dir, qemu_binary) as server:
        with pytest.raises(StalledError) as caught:
            async with disturbed(vm, at, server.uri("t"), stall=4):
                server.pause()
        assert "there is no copy" in str(caught.value.standing)
        await unharmed(vm, invariant)


@both
async def test_a_server_that_dies(vm, vm_dir, qemu_binary, invariant, at):
    async with daemon(vm_dir, qemu_binary) as server:
        with vm.control.subscribe("BLOCK_JOB_ERROR") as failures:
            with pytest.raises(NBDDisconnectedError, match="server closed its end"):  # noqa: PT012
                async with disturbed(vm, at, server.uri("t"), stall=LONG):
                    began = time.monotonic()
                    await server.kill()
            actions = {event["data"]["action"] for event in failures.pending()}
        assert time.monotonic() - began < SOON
        # On 7.2 a mirror does not end by itself: that may not be while QEMU flushes (K34).
        assert actions == {"stop" if at == "end" and vm.version < (8,) else "report"}
        await unharmed(vm, invariant)


@both
@pytest.mark.parametrize("paused", [False, True])
async def test_a_copy_that_is_given_up(vm, vm_dir, qemu_binary, invariant, at, paused):
    class GivenUpError(Exception):
        pass

    async with daemon(vm_dir, qemu_binary) as server:
        with pytest.raises(GivenUpError):  # noqa: PT012
            async with disturbed(vm, at, server.uri("t"), stall=LONG):
                if paused:
                    server.pause()
                    await asyncio.sleep(0.5)
                began = time.monotonic()
                raise GivenUpError
        assert time.monotonic() - began < SOON
        await unharmed(vm, invariant)


async def test_a_server_that_stops_answering_at_the_end(vm, vm_dir, qemu_binary, invariant):
    """The mirror's last flush waits for it, no longer than `wire.HOLD`; the guest does not."""
    async with (
        daemon(vm_dir, qemu_binary) as server,
        qmpblock.connect(vm.monitor_path, stall=LONG) as controller,
    ):
        [disk] = await controller.disks()
        with pytest.raises(StalledError):  # noqa: PT012
            async with copy(controller, {disk: server.uri("t")}, at="end") as job:
                async for seen in job:
                    if seen.ready:
                        break
                server.pause()
                began = time.monotonic()
        assert time.monotonic() - began < SOON
    await unharmed(vm, invariant)


@both
async def test_a_slow_server(vm, vm_dir, qemu_binary, invariant, at):
    """It takes seconds, and the guest does not notice."""
    async with daemon(vm_dir, qemu_binary, rate=24 * MIB) as server:
        point = await copied(vm, at, server.uri("t"))
        await unharmed(vm, invariant)
    check_whole(server.image, point)


@pytest.fixture
async def elsewhere(vm_dir):
    """Serve an image over a wire that can be cut; yields its URI, the wire and the image."""
    image = vm_dir / "target"
    image.write_bytes(GARBAGE * SIZE)
    async with contextlib.AsyncExitStack() as stack:
        number = random.SystemRandom().randrange(256)
        try:
            address, wire = await stack.enter_async_context(serving_elsewhere(image, number))
        except CutOffError as error:
            pytest.skip(f"no network to cut: {error}")
        yield f"nbd://{address}/t", wire, image


@both
async def test_a_wire_that_is_cut(vm, elsewhere, invariant, at):
    """Nobody says so to either end: what was sent is lost."""
    uri, wire, _ = elsewhere
    with pytest.raises(StalledError):
        async with disturbed(vm, at, uri, stall=4):
            set_wire(wire, up=False)
    await unharmed(vm, invariant)


async def test_a_wire_that_is_cut_while_what_is_there_is_compared(vm, elsewhere, invariant):
    """Of a copy of the end, which an export of ours reads there and writes to."""
    uri, wire, _ = elsewhere
    async with qmpblock.connect(vm.monitor_path, stall=4) as controller:
        [disk] = await controller.disks()
        copying = copy(controller, {disk: uri}, at="end", resume=True, speed=8 * MIB)
        with pytest.raises((StalledError, NBDDisconnectedError)):  # noqa: PT012
            async with copying as job:
                async for seen in job:
                    if seen.done > 4 * MIB:
                        break
                assert seen.phase == "comparing"
                set_wire(wire, up=False)
    await unharmed(vm, invariant)


async def test_a_server_that_stops_answering_while_the_vm_is_paused(
    vm, vm_dir, qemu_binary, invariant, monkeypatch
):
    """For the last of what is resumed: the guest goes on at once, in time."""
    real, goes = catchup.CatchUp._take_note, catchup.CatchUp._go_on
    paused, stands = [], []

    async with daemon(vm_dir, qemu_binary) as server:

        async def take_note(self, disk):
            await real(self, disk)
            if self._stands:
                paused.append(time.monotonic())
                server.pause()

        async def go_on(self):
            stood = self._stands
            await goes(self)
            if stood:
                stands.append(time.monotonic() - paused[-1])

        monkeypatch.setattr(catchup.CatchUp, "_take_note", take_note)
        monkeypatch.setattr(catchup.CatchUp, "_go_on", go_on)
        async with qmpblock.connect(vm.monitor_path, stall=20) as controller:
            [disk] = await controller.disks()
            with pytest.raises((StalledError, NBDDisconnectedError)) as caught:  # noqa: PT012
                async with copy(controller, {disk: server.uri("t")}, at="end", resume=True) as job:
                    async for _ in job:
                        pass
        print(f"{time.monotonic() - paused[0]:.1f} s after it stopped: {caught.value}")
        print(f"the VM stood for {max(stands):.3f} s after that")
        assert max(stands) < catchup.HOLD + LONGEST
        await unharmed(vm, invariant)


@both
async def test_a_wire_that_takes_a_megabyte_a_second(vm, elsewhere, invariant, at):
    """The copy would take a minute; some seconds of it do, and then it is given up."""

    class GivenUpError(Exception):
        pass

    uri, wire, _ = elsewhere
    try:
        slow_down(wire, 10**6)
    except CutOffError as error:
        pytest.skip(f"no wire to be slow: {error}")
    with pytest.raises(GivenUpError):  # noqa: PT012
        async with disturbed(vm, at, uri, stall=20, speed=0) as job:
            assert job.progress.status == "running", job.progress
            await asyncio.sleep(3)
            assert job.progress.status == "running", job.progress
            raise GivenUpError
    await unharmed(vm, invariant)


@both
async def test_a_wire_that_is_mended_in_time(vm, elsewhere, invariant, at):
    """The copy is whole."""
    uri, wire, image = elsewhere
    async with contextlib.AsyncExitStack() as stack:
        async with vm.guest.bounds(0) as bounds:
            job = await stack.enter_async_context(disturbed(vm, at, uri, stall=20))
        set_wire(wire, up=False)
        await asyncio.sleep(2)
        set_wire(wire, up=True)
        await job.set_speed(0)  # on a quick machine the guest writes as fast as it was let
        async for seen in job:
            if seen.ready:
                break
        if at == "end":
            async with vm.guest.bounds(0) as bounds:
                await job.complete()
    await unharmed(vm, invariant)
    if at == "end":
        check_whole(image, bounds[0])


CHILD = """
import asyncio, sys
import qmpblock
from qmpblock.copying.copy import copy
async def main(monitor, target, at):
    async with qmpblock.connect(monitor) as vm:
        [disk] = await vm.disks()
        async with copy(vm, {disk: target}, at=at, speed=8 << 20) as job:
            async for seen in job:
                if seen.done > 4 << 20:
                    print("copying", flush=True)
                    await asyncio.sleep(60)
asyncio.run(main(*sys.argv[1:]))
"""


@both
async def test_a_controller_that_is_killed(vm, vm_dir, qemu_binary, invariant, at, monkeypatch):
    sockets = vm_dir / "tmp"
    sockets.mkdir()
    monkeypatch.setenv("TMPDIR", str(sockets))
    async with daemon(vm_dir, qemu_binary) as server:
        command = [sys.executable, "-c", CHILD, vm.monitor_path, server.uri("t"), at]
        async with Controller(command, vm_dir) as child:
            await child.wait_for_output("copying")
            child.kill()
        assert [one for one in os.listdir(sockets) if one.endswith("-wire")]
        async with qmpblock.connect(vm.monitor_path) as controller:
            [recovery] = await clear(controller)
            print(*recovery.steps, sep="\n")
            assert any(step.verb == "clear-wire" for step in recovery.steps)
            assert await clear(controller) == []
        assert [one for one in os.listdir(sockets) if one.endswith("-wire")] == []
        await unharmed(vm, invariant)


async def test_credentials_of_a_controller_that_is_killed(
    vm, vm_dir, invariant, free_port, monkeypatch
):
    image = vm_dir / "target"
    image.write_bytes(GARBAGE * SIZE)
    made = make_credentials(vm_dir / "credentials")
    uri = f"nbds://127.0.0.1:{free_port}/t?tls-hostname={HOST}"
    (made / "client" / "keys.psk").unlink()  # else that is meant
    child_text = CHILD.replace("at=at,", f"at=at, tls_creds='{made / 'client'}',")
    async with serving(image, *tls_options(made, "x509"), port=free_port):
        command = [sys.executable, "-c", child_text, vm.monitor_path, uri, "end"]
        async with Controller(command, vm_dir) as child:
            await child.wait_for_output("copying")
            child.kill()
        left = {one["name"] for one in await vm.execute("qom-list", path="/objects")}
        assert [name for name in left if name.endswith("-wire-tls")]
        async with qmpblock.connect(vm.monitor_path) as controller:
            await clear(controller)
    await unharmed(vm, invariant)
