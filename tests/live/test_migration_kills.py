"""`qmpblock.migrate`, killed in each phase, and recovered: no acknowledged write is lost."""

import asyncio
import contextlib
import os
import signal

import pytest
from disturbed import nothing_of_ours, writes_on
from migrating import dies_in, machine, migrated, storage_daemons, stressed
from migrationkills import SHAPES, TELLING, THEIRS, Matrix
from migrationoutcomes import (
    ASKED,
    DESTINATION,
    HERE,
    INTERRUPTED,
    OUTCOMES,
    PHASES,
    SOURCE,
    THERE,
    WIRE,
    WIRE_CUT,
)
from rounds import rounds

import qmpblock
from qmpblock.errors import DisconnectedError, UndecidedError
from qmpblock.migration.journal import journals
from qmpblock.migration.passage import Passage
from qmpblock.testing import Tools, build, parse_scenario

pytestmark = pytest.mark.live

NAMES = [phase.value for phase in PHASES]
CELLS = [(struck, phase) for struck in OUTCOMES for phase in PHASES if struck != WIRE]


@contextlib.contextmanager
def killing(monkeypatch, wanted, vm):
    """Have a QEMU killed as soon as a migration of this process enters a phase."""
    enter = Passage.enter

    async def kill(self, phase, **how):
        await enter(self, phase, **how)
        if phase is wanted:
            await vm.kill()

    with monkeypatch.context() as patch:
        patch.setattr(Passage, "enter", kill)
        yield


@pytest.fixture
def begun(start_qemu, start_destination, vm_dir, qemu_binary, invariant):
    """Start a pair of which any may end."""

    async def start(*, shared=False, image=None):
        built = await build(
            parse_scenario(machine(), "source"), vm_dir / "source", Tools.of(qemu_binary)
        )
        source = await stressed(await start_qemu(built, guest=True))
        destination = await start_destination(source, shared=shared, image=image)
        for vm in (source, destination):
            vm.expect_exit()
            invariant.forget(vm)
        return source, destination

    return start


@pytest.fixture
def killed(begun):
    """Start a pair whose controller is killed in a phase."""

    async def start(phase, *, shared=False, daemon=False, image=None, **options):
        source, destination = await begun(shared=shared, image=image)
        options |= {"memory_only": shared, "storage_daemon": daemon}
        await dies_in(phase, source, destination, **options)
        return source, destination

    return start


async def whole(vm, other):
    """See that the guest goes on in that VM alone, and reads back all that it wrote."""
    assert (await vm.execute("query-status"))["running"]
    await asyncio.wait_for(other.wait(), 120)
    await nothing_of_ours(vm)
    assert await vm.execute("query-block-exports") == []
    assert list(journals()) == []
    guest = vm.guest or await vm.attach_guest()
    await writes_on(guest)
    end = await guest.stop_stress(0)
    assert (end.bad, end.errors) == (0, 0), end
    assert await guest.check(0) > 0


@pytest.mark.parametrize("carry_on", [False, True], ids=["undo", "continue"])
@pytest.mark.parametrize("phase", NAMES)
async def test_a_controller_is_killed(killed, phase, carry_on):
    source, destination = await killed(phase)
    recovered = await qmpblock.recover_migration(destination.monitor_path, carry_on=carry_on)
    if phase == "handed" or (phase == "landed" and carry_on):
        assert recovered.done is True
        await whole(destination, source)
    else:
        assert recovered.done is False
        await whole(source, destination)


async def test_the_one_is_killed_that_has_handed_it_over(killed):
    """One of those above, in every run: nobody but a recovery has the guest go on then."""
    source, destination = await killed("handed")
    recovered = await qmpblock.recover_migration(destination.monitor_path)
    assert recovered.done is True
    await whole(destination, source)


@pytest.mark.parametrize("phase", ["memory", "held", "sent", "landed", "handed"])
async def test_a_controller_is_killed_on_shared_storage(killed, phase):
    source, destination = await killed(phase, shared=True)
    recovered = await qmpblock.recover_migration(source.monitor_path)
    if recovered.done:
        await whole(destination, source)
    else:
        await whole(source, destination)
    assert recovered.done is (phase == "handed")


@pytest.mark.parametrize("dies", [False, True], ids=["lives", "dies"])
@pytest.mark.parametrize("phase", NAMES)
async def test_a_controller_with_a_storage_daemon_is_killed(
    killed, phase, dies, vm_dir, start_destination
):
    source, destination = await killed(phase, daemon=True)
    left = storage_daemons(vm_dir)
    assert len(left) == (phase in ("ready", "memory", "held", "ended"))
    for pid in left if dies else ():
        os.kill(pid, signal.SIGKILL)
    recovered = await qmpblock.recover_migration(source.monitor_path)
    assert storage_daemons(vm_dir) == []
    assert recovered.done is (phase == "handed")
    if recovered.done:
        await whole(destination, source)
        return
    await whole(source, destination)
    destination = await start_destination(source)
    await migrated(source, destination, storage_daemon=True)
    guest = await destination.attach_guest()
    assert await guest.check(0) > 0


async def test_a_controller_is_killed_that_gives_images_host_space(killed):
    """Of the node that keeps zeros from taking it back nothing is left."""
    source, destination = await killed("ready", allocation="full", image="raw")
    recovered = await qmpblock.recover_migration(source.monitor_path)
    assert recovered.done is False
    await whole(source, destination)


async def test_a_storage_daemon_is_all_that_is_left(killed, vm_dir):
    source, destination = await killed("held", daemon=True)
    [left] = storage_daemons(vm_dir)
    os.kill(left, signal.SIGSTOP)
    await source.kill()
    await destination.kill()
    recovered = await qmpblock.recover_migration(source.monitor_path)
    assert recovered.done is False
    assert storage_daemons(vm_dir) == []
    assert list(journals()) == []


@pytest.mark.parametrize("phase", ["mirroring", "memory", "held"])
async def test_the_destination_falls_silent_besides(killed, phase):
    """The wires were the controller's, and ended with it: nothing waits for the destination."""
    source, destination = await killed(phase)
    os.kill(destination.pid, signal.SIGSTOP)
    recovered = await qmpblock.recover_migration(source.monitor_path)
    assert recovered.done is False
    await nothing_of_ours(source)
    await writes_on(source.guest)
    os.kill(destination.pid, signal.SIGCONT)
    await destination.kill()


async def runs(vm):
    """Whether a guest runs in it."""
    try:
        return vm.running and (await vm.execute("query-status"))["running"]
    except DisconnectedError:  # it is ending, and its process is not gone yet
        await vm.wait(30)
        return False


@pytest.mark.parametrize("struck", INTERRUPTED)
async def test_struck_at_some_command(
    struck, ssh_host, start_qemu, start_destination, vm_dir, qemu_binary
):
    """One point of the kill matrix, which `make soak` goes through whole."""
    _, chance = rounds(1)
    where = (start_qemu, start_destination, vm_dir, qemu_binary)
    how = {"host": ssh_host} if struck == WIRE_CUT else {"storage_daemon": "daemon" in struck}
    async with Matrix(*where, **how) as matrix:
        number, moment = chance.choice(list(matrix.points()))
        await matrix.strike(struck, number, moment)
    print(f"{moment} command {number}: {dict(matrix.outcomes)}")


@pytest.mark.parametrize("shape", SHAPES)
async def test_another_shape_struck_at_some_command(
    shape, start_qemu, start_destination, vm_dir, qemu_binary
):
    """Likewise."""
    _, chance = rounds(1)
    struck = chance.choice(TELLING)
    where = (start_qemu, start_destination, vm_dir, qemu_binary)
    async with Matrix(*where, shape=SHAPES[shape]) as matrix:
        number, moment = chance.choice(list(matrix.points()))
        await matrix.strike(struck, number, moment)
    print(f"{struck} {moment} command {number}: {dict(matrix.outcomes)}")


@pytest.mark.parametrize("shape", [None, "shared"])
async def test_somebody_else_at_some_command(
    shape, start_qemu, start_destination, vm_dir, qemu_binary
):
    """Somebody takes a snapshot, say, before or after a command of ours: gone over, or not."""
    _, chance = rounds(1)
    where = (start_qemu, start_destination, vm_dir, qemu_binary)
    async with Matrix(*where, shape=SHAPES.get(shape)) as matrix:
        theirs = chance.choice(list(THEIRS))
        number, moment = chance.choice(list(matrix.points()))
        await matrix.strike(theirs, number, moment)
    print(f"{theirs} {moment} command {number}: {dict(matrix.outcomes)}")


@pytest.mark.parametrize(("struck", "phase"), CELLS, ids=str)
async def test_who_has_the_guest(struck, phase, killed, begun, vm_dir, monkeypatch):
    """What the table in docs/migration.md says of it."""
    if struck == "source":
        source, destination = await begun()
        with contextlib.suppress(qmpblock.Error), killing(monkeypatch, phase, source):
            await migrated(source, destination)
    else:
        source, destination = await killed(phase.value, daemon="daemon" in struck)
        for pid in storage_daemons(vm_dir) if "daemon" in struck else ():
            os.kill(pid, signal.SIGKILL)
        hangs = "hangs" in struck
        for side, vm in (("source", source), ("destination", destination)):
            if (side in struck and not hangs) or struck == "all":
                await vm.kill()
        if hangs:
            os.kill(destination.pid, signal.SIGSTOP)
        addresses = source.monitor_path, destination.monitor_path
        outcome = ""
        try:
            recovered = await qmpblock.recover_migration(*addresses, stall=10)
        except UndecidedError as error:
            print(error)
            outcome = ASKED
        if hangs:
            os.kill(destination.pid, signal.SIGCONT)
    if struck == "source":
        assert not source.running
        outcome = DESTINATION if await runs(destination) else HERE
    elif not outcome:
        vm, held = (destination, THERE) if recovered.done else (source, HERE)
        alive = DESTINATION if recovered.done else SOURCE
        outcome = alive if await runs(vm) else held
        if not hangs:
            other = source if recovered.done else destination
            assert not await runs(other)
    assert outcome == OUTCOMES[struck][phase]
