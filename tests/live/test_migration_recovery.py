"""Migrations that are broken off in each phase, and recovered: one side has the guest, whole.

What the model of `tests/migration/` takes for granted of QEMU is seen here: what the two sides
show, and what a move does.
"""

import asyncio
import signal
import sys

import pytest
from brokenoff import PHASES, starting
from chains import cli
from disturbed import nothing_of_ours, until

from qmpblock.errors import BusyError, Error, MonitorHeldError
from qmpblock.migration import arbiter
from qmpblock.migration.journal import journals
from qmpblock.migration.states import STATES, Phase, Side

pytestmark = pytest.mark.live

SHOWS = {state.phase: state for state in STATES}
SOURCE, DESTINATION = [Side.SOURCE], [Side.DESTINATION]
KEPT_OUT = BusyError, MonitorHeldError
WITH_DISKS = (Phase.MIRRORING, Phase.READY, Phase.MEMORY, Phase.HELD, Phase.ENDED)


@pytest.fixture
def broken(start_qemu, vm_dir, qemu_binary, invariant):
    return starting(start_qemu, vm_dir, qemu_binary, invariant)


def no_journal():
    return list(journals()) == []


async def over(pair, side):
    """See that one side alone has the guest, and that nothing of ours is left there."""
    assert await pair.runs() == [side]
    vm, other = pair.source, pair.destination
    if side is Side.DESTINATION:
        vm, other = other, vm
    await asyncio.wait_for(other.wait(), 120)
    await nothing_of_ours(vm)
    assert await vm.execute("query-block-exports") == []
    names = [node["node-name"] for node in await vm.execute("query-named-block-nodes", flat=True)]
    assert not [name for name in names if name.startswith("qmpblock")]
    assert no_journal()


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.value)
async def test_what_two_qemus_show_is_what_the_table_says(broken, phase):
    pair = await broken()
    source, destination = await pair.go(phase)
    assert source in SHOWS[phase].source
    assert destination in SHOWS[phase].destination
    await pair.die()
    recovered = await pair.recover()
    end = DESTINATION if phase is Phase.HANDED else SOURCE
    assert recovered.done is (end == DESTINATION)
    await over(pair, *end)
    assert await pair.recover(pair.source if end == SOURCE else pair.destination) is None


@pytest.mark.parametrize("phase", WITH_DISKS, ids=lambda phase: phase.value)
async def test_the_controller_of_one_with_disks_dies(broken, phase):
    pair = await broken(shared=False)
    await pair.go(phase)
    await pair.die()
    await pair.recover()
    await over(pair, Side.SOURCE)


async def test_it_is_carried_on_where_the_destination_has_it_all(broken):
    pair = await broken(guest=True)
    await pair.go(Phase.LANDED)
    await pair.die()
    recovered = await pair.recover(carry_on=True)
    assert [step.verb for step in recovered.steps] == [
        "claim-destination",
        "mark",
        "cont-destination",
        "finish-destination",
    ]
    await over(pair, Side.DESTINATION)
    await pair.destination.attach_guest()  # it answers there


async def has_all_or_ended(pair):
    there = pair.destination
    return not there.running or await pair.is_(there, ("paused", "completed"))


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.value)
@pytest.mark.parametrize("dies", Side, ids=lambda side: side.value)
async def test_a_qemu_dies_and_then_the_controller(broken, phase, dies):
    pair = await broken()
    await pair.go(phase)
    dead = pair.source if dies is Side.SOURCE else pair.destination
    await dead.kill()
    await pair.die()
    if dies is Side.SOURCE and phase is Phase.SENT:  # it may have sent all of it, or not
        await until(lambda: has_all_or_ended(pair), "what it comes to")
        if pair.destination.running:
            phase = Phase.LANDED
    if dies is Side.DESTINATION and phase is Phase.HANDED:
        with pytest.raises(Error, match="a person has to decide") as asked:
            await pair.recover()
        assert "hold the newest data" in asked.value.remedy
        assert await pair.runs() == []
        await pair.recover(force="source")
        await over(pair, Side.SOURCE)
    elif dies is Side.DESTINATION:
        await pair.recover()
        await over(pair, Side.SOURCE)
    elif phase is Phase.HANDED:
        await pair.recover()
        await over(pair, Side.DESTINATION)
    elif phase is Phase.LANDED:
        with pytest.raises(Error, match="the destination has the whole guest and waits") as asked:
            await pair.recover(pair.destination)
        assert pair.source.monitor_path in asked.value.remedy
        assert await pair.runs() == []
        await pair.recover(pair.destination, force="destination")
        await over(pair, Side.DESTINATION)
    elif dies is Side.SOURCE and phase is Phase.SENT:  # it had not, and the other one ended, too
        await both_ended(pair)
    else:
        await pair.recover()  # where the source's images are what counts
        assert not await pair.runs()
        await asyncio.wait_for(pair.destination.wait(), 120)
        assert no_journal()


async def both_ended(pair):
    """See that a person decides, who alone can know whether the guest ran at the destination."""
    with pytest.raises(Error, match="the destination has ended, too") as asked:
        await pair.recover()
    assert "whether the guest ever ran at the destination" in asked.value.remedy
    await pair.recover(force="source")
    assert not await pair.runs()
    assert no_journal()


async def test_both_die_while_the_last_of_it_is_sent(broken):
    pair = await broken()
    await pair.go(Phase.SENT)
    await pair.source.kill()
    await pair.destination.kill()
    await pair.die()
    await both_ended(pair)


async def test_the_command(broken):
    """It asks a person where it must, and does what he says."""
    pair = await broken()
    await pair.go(Phase.LANDED)
    addresses = pair.source.monitor_path, pair.destination.monitor_path
    await pair.die()
    code, out, err = await cli("recover", addresses[0], "--dry-run")
    assert code == 0, err
    assert "would claim-source" in out
    assert (await cli("recover", addresses[1], "--check"))[0] == 4
    await pair.source.kill()
    code, out, err = await cli("recover", *addresses)
    assert (code, out) == (1, "")
    assert "has the whole guest and waits" in err
    assert "--force source, or --force destination" in err
    assert (await cli("recover", *addresses, "--check"))[0] == 4
    code, out, err = await cli("recover", *addresses, "--force", "destination")
    assert code == 0, err
    await over(pair, Side.DESTINATION)
    code, out, err = await cli("recover", *addresses)
    assert code == 2
    assert "no migration of ours" in err


@pytest.mark.parametrize("side", Side, ids=lambda side: side.value)
async def test_by_one_side_alone_the_other_one_is_found(broken, side):
    pair = await broken()
    await pair.go(Phase.HELD if side is Side.DESTINATION else Phase.HANDED)
    await pair.die()
    await pair.recover(pair.source if side is Side.SOURCE else pair.destination)
    await over(pair, Side.DESTINATION if side is Side.SOURCE else Side.SOURCE)


async def test_of_two_recoveries_at_once_one_wins(broken):
    pair = await broken()
    await pair.go(Phase.LANDED)
    await pair.die()
    results = await asyncio.gather(
        pair.recover(pair.source),
        pair.recover(pair.destination, carry_on=True),
        return_exceptions=True,
    )
    for result in results:
        assert not isinstance(result, Exception) or isinstance(result, KEPT_OUT), result
    if all(isinstance(result, Exception) for result in results):
        await pair.recover()  # each was kept out by the other one
    [side] = await pair.runs()
    await over(pair, side)


async def test_the_arbiter_is_taken_once(broken):
    pair = await broken()
    await pair.go(Phase.LANDED)
    monitors = pair.source.control, pair.connections[0].monitor
    claims = await asyncio.gather(
        *(
            arbiter.claim(monitor, pair.run, side)
            for monitor, side in zip(monitors, Side, strict=True)
        )
    )
    assert claims[0] is claims[1]
    assert await arbiter.decided(pair.source.control, pair.run) is claims[0]
    await pair.die()
    await pair.recover()
    await over(pair, claims[0])


async def test_a_living_controller_is_left_alone(broken):
    pair = await broken()
    shown = await pair.go(Phase.HELD)
    await pair.let_go()
    with pytest.raises(BusyError, match="is at work on the migration"):
        await pair.recover()
    assert (await pair.shown(pair.source), await pair.shown(pair.destination)) == shown
    await pair.die()
    planned = await pair.recover(dry_run=True)
    assert [step.verb for step in planned.steps] == ["cancel"]
    assert (await pair.shown(pair.source), await pair.shown(pair.destination)) == shown
    await pair.recover()
    await over(pair, Side.SOURCE)


async def test_a_vm_of_no_migration_of_ours_is_left_alone(broken):
    pair = await broken()
    assert await pair.recover() is None
    assert await pair.runs() == SOURCE
    assert pair.destination.running


KILLED = """\
import asyncio, os, signal, sys
import qmpblock
from qmpblock.migration import recover as module

moves, make = int(sys.argv[1]), module._Recovering._make

async def die(self, move):
    global moves
    moves -= 1
    if not moves and "before" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    await make(self, move)
    if not moves:
        os.kill(os.getpid(), signal.SIGKILL)

module._Recovering._make = die
asyncio.run(qmpblock.recover_migration(*sys.argv[4:], carry_on=sys.argv[2] == "True"))
"""
# The moves of a recovery from there, and where it ends.
RECOVERIES = [
    (Phase.HELD, False, 2, Side.SOURCE),
    (Phase.LANDED, False, 4, Side.SOURCE),
    (Phase.LANDED, True, 4, Side.DESTINATION),
    (Phase.HANDED, False, 2, Side.DESTINATION),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("phase", "carry_on", "move", "end"),
    [
        (phase, carry_on, move, end)
        for phase, carry_on, moves, end in RECOVERIES
        for move in range(1, moves + 1)
    ],
)
async def test_a_recovery_is_killed_at_a_move(broken, phase, carry_on, move, end, when):
    """Then another one, which wishes for nothing else, comes to the same end."""
    pair = await broken()
    await pair.go(phase)
    await pair.die()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", KILLED, str(move), str(carry_on), when),
        *(pair.source.monitor_path, pair.destination.monitor_path),
    )
    assert await process.wait() == -signal.SIGKILL
    side = pair.source if end is Side.SOURCE else pair.destination
    await pair.recover(side, carry_on=carry_on)
    await over(pair, end)
