"""A guest that stops by itself on the way stays as it stopped, wherever it ends; whoever dies."""

import asyncio
import contextlib

import pytest
from disturbed import nothing_of_ours, until, writes_on
from migrating import arrived, at, dies_in, machine, migrated, stays

import qmpblock
from qmpblock.errors import UnsupportedError
from qmpblock.migration.journal import journals
from qmpblock.migration.outward import Outward
from qmpblock.testing.faults import small_file_system

pytestmark = pytest.mark.live

MIB = 1 << 20
PANICS = ["-device", "pvpanic", "-action", "panic=pause"]
PANIC = "o/b 0x505 1"  # what its driver writes there
SLEEP = "o/h 0x604 0x2400"  # to the chip: S3
NO_SHUTDOWN = ["-no-shutdown"]


def told(vm, line):
    """Return what tells a VM's human monitor."""

    async def tell():
        await vm.execute("human-monitor-command", command_line=line)

    return tell


async def shown(vm):
    return (await vm.execute("query-status"))["status"]


async def stopped(vm, *states):
    """See that the guest is there as it stopped, with nothing of ours."""
    assert await shown(vm) in states
    await nothing_of_ours(vm)
    assert list(journals()) == []


@pytest.fixture
async def small(vm_dir):
    """Yield a small file system, on which the source's disks are to lie."""
    async with contextlib.AsyncExitStack() as stack:
        mounting = small_file_system(vm_dir / "source", 24 * MIB)
        try:
            place = await stack.enter_async_context(mounting)
        except UnsupportedError as error:
            pytest.skip(str(error))
        yield place


async def test_a_full_disk(small, begin, start_destination, monkeypatch):
    """The request that failed goes along, and is tried again where there is room."""
    source = await begin(machine(image="raw"))
    destination = await start_destination(source)

    async def fill():
        with (small / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(64 << 10))

        async def failed():
            return await shown(source) == "io-error"

        await until(failed, "a write that finds no room")

    with at(monkeypatch, "memory", fill):
        result = await migrated(source, destination)
    assert (result.destination, result.resumed) == ("io-error", None)
    assert result.notices[-1].text.endswith("it stopped itself at the source (io-error)")
    await stopped(destination, "io-error")
    await destination.execute("cont")
    await arrived(source, destination, result)


async def test_what_was_sent_tells_where_nothing_else_does(begin, start_destination, monkeypatch):
    source = await begin(extra=PANICS)
    destination = await start_destination(source, extra=PANICS)

    async def unseen(self):
        pass

    with monkeypatch.context() as patch, at(monkeypatch, "memory", told(source, PANIC)):
        patch.setattr(Outward, "_say_stopped", unseen)
        result = await migrated(source, destination)
    assert result.destination == "guest-panicked"
    await stopped(destination, "guest-panicked")


@pytest.mark.parametrize("phase", ["ready", "held", "landed"])
async def test_it_stays_so_at_the_source(phase, begin, start_destination, invariant, monkeypatch):
    source = await begin(extra=PANICS)
    await invariant.begin(source)
    destination = await start_destination(source, extra=PANICS)
    destination.expect_exit()

    async def fail():
        raise qmpblock.Error("broken off")

    with (
        at(monkeypatch, "copying" if phase == "ready" else "memory", told(source, PANIC)),
        at(monkeypatch, phase, fail),
        pytest.raises(qmpblock.Error, match="broken off") as failed,
    ):
        await migrated(source, destination)
    assert "as it stopped itself (guest-panicked)" in failed.value.standing
    await stopped(source, "guest-panicked", "postmigrate")
    await source.execute("cont")
    await stays(source, invariant)


@pytest.mark.parametrize("carry_on", [False, True], ids=["undo", "continue"])
@pytest.mark.parametrize("phase", ["memory", "held", "ended", "sent", "landed", "handed"])
async def test_after_kill_9(phase, carry_on, begin, start_destination, invariant):
    source = await begin(extra=PANICS)
    destination = await start_destination(source, extra=PANICS)
    for vm in (source, destination):
        vm.expect_exit()
        invariant.forget(vm)
    await dies_in(phase, source, destination, stop="memory", by=PANIC)
    recovered = await qmpblock.recover_migration(source.monitor_path, carry_on=carry_on)
    assert recovered.done is (phase == "handed" or (phase == "landed" and carry_on))
    left, other = (destination, source) if recovered.done else (source, destination)
    await asyncio.wait_for(other.wait(), 20)
    await stopped(left, "guest-panicked", "postmigrate")
    assert await qmpblock.recover_migration(left.monitor_path) is None
    await left.execute("cont")
    await writes_on(left.guest or await left.attach_guest())


@pytest.mark.parametrize(
    ("phase", "options"),
    [("copying", []), ("memory", []), ("copying", NO_SHUTDOWN), ("memory", NO_SHUTDOWN)],
    ids=["copying", "memory", "copying, QEMU stays", "memory, QEMU stays"],
)
async def test_one_that_powers_off_ends_it(options, phase, begin, start_destination, monkeypatch):
    source = await begin(extra=options)
    destination = await start_destination(source, extra=options)
    source.expect_exit()
    destination.expect_exit()
    with (
        at(monkeypatch, phase, source.guest.power_off),
        pytest.raises(qmpblock.Error, match="the guest has powered itself off") as failed,
    ):
        await migrated(source, destination)
    print(failed.value)
    if options:
        assert "as it stopped itself (shutdown)" in failed.value.standing
        await stopped(source, "shutdown", "postmigrate")
    else:
        assert "its images lack nothing" in failed.value.standing
        await asyncio.wait_for(source.wait(), 20)
    if destination.running:
        await stopped(destination, "inmigrate")
    assert list(journals()) == []


async def test_one_that_sleeps(begin, start_destination, monkeypatch, qemu_version):
    """Before QEMU 9.0 a migration wakes it."""
    source = await begin(extra=NO_SHUTDOWN)
    destination = await start_destination(source, extra=NO_SHUTDOWN)
    with (
        source.control.subscribe("WAKEUP") as woken,
        at(monkeypatch, "memory", told(source, SLEEP)),
    ):
        result = await migrated(source, destination)
        if qemu_version < (9,):
            await woken.get(10)
            assert result.destination != "suspended"
            return
        assert woken.pending() == []
    assert result.destination == "suspended"
    await stopped(destination, "suspended")
    await destination.execute("system_wakeup")

    async def awake():
        return await shown(destination) != "suspended"

    await until(awake, "a guest that is awake")


async def test_one_that_sleeps_already_is_to_be_woken_first(begin, start_destination):
    source = await begin(extra=NO_SHUTDOWN)
    destination = await start_destination(source, extra=NO_SHUTDOWN)
    await told(source, SLEEP)()
    with pytest.raises(UnsupportedError, match="says suspended") as refused:
        await migrated(source, destination)
    assert refused.value.remedy == "wake it first (system_wakeup)"


async def test_one_that_starts_again_goes_over(begin, start_destination, monkeypatch):
    source = await begin()
    destination = await start_destination(source)
    with at(monkeypatch, "memory", source.guest.reset):
        result = await migrated(source, destination)
    assert result.destination == "running"
    guest = await destination.attach_guest()
    await guest.write(0, 0, 4096, seq=1, seed=7)
    await nothing_of_ours(destination)
