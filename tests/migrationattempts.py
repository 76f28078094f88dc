"""One guest whose migration is broken off again and again, at any moment, and then made."""

import asyncio
import contextlib
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from disturbed import nothing_of_ours
from migrating import arrived, machine, migrated

from qmpblock.errors import DisconnectedError
from qmpblock.migration.passage import Passage
from qmpblock.migration.states import Phase

#: Those in which it is broken off; it comes to no other, for one guest is to stay.
PHASES = tuple(phase for phase in Phase if phase.before(Phase.HANDED))


@dataclass
class Tally:
    """What became of some attempts, to be printed.

    :ivar broken_off: how many, by the phase that they had come to.
    :ivar held: after each, how many bytes of memory the source's QEMU had.
    """

    broken_off: Counter[str] = field(default_factory=Counter)
    held: list[int] = field(default_factory=list)

    def __str__(self):
        return f"{len(self.held)} rounds: {dict(self.broken_off)}"


async def broken_off_then_made(begin, start_destination, monkeypatch, chance, count):
    """Have a guest that writes survive so many attempts, and then go over; return them."""
    source = await begin(machine(2, device=chance.choice(["virtio-blk", "virtio-scsi"])))
    destination = await start_destination(source)
    tally = Tally()
    for _ in range(count):
        destination.expect_exit()
        phase, kill = chance.choice(PHASES), chance.random() < 0.2
        with entered(monkeypatch, phase) as come:
            running = asyncio.create_task(migrated(source, destination))
            await asyncio.wait({running, come}, return_when=asyncio.FIRST_COMPLETED)
            if phase not in (Phase.HELD, Phase.ENDED, Phase.SENT):  # which are over in no time
                await asyncio.wait({running}, timeout=chance.uniform(0, 0.1))
            if kill:
                await destination.kill()
            running.cancel()
            await asyncio.wait({running})
        shown = (await source.execute("query-status"))["status"]
        assert shown == "running", (phase, kill, running.exception())
        assert await source.execute("query-jobs") == []
        await nothing_of_ours(source)
        done = await source.guest.progress()
        assert (done.bad, done.errors) == (0, 0)
        tally.broken_off[phase.value] += 1
        tally.held.append(resident(source))
        waits = None
        with contextlib.suppress(DisconnectedError):  # it has been told to end, or was killed
            waits = (await destination.execute("query-status"))["status"]
        if waits != "inmigrate":
            await destination.close()
            destination = await start_destination(source)
    await arrived(source, destination, await migrated(source, destination))
    return tally


@contextlib.contextmanager
def entered(monkeypatch, phase):
    """Yield a future that comes when a migration enters a phase; none is handed over meanwhile."""
    come = asyncio.get_running_loop().create_future()
    before = Passage.enter

    async def enter(self, now, **how):
        await before(self, now, **how)
        if now is phase and not come.done():
            come.set_result(None)
            await asyncio.sleep(0)
        if now is Phase.LANDED:
            await asyncio.Event().wait()

    if phase is Phase.CHECKED:  # in which it is from the beginning
        come.set_result(None)
    with monkeypatch.context() as patch:
        patch.setattr(Passage, "enter", enter)
        yield come


def resident(vm):
    """Return how much memory a QEMU holds, in bytes."""
    fields = Path(f"/proc/{vm.pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
