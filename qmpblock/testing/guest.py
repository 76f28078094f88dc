"""The tiny guest's serial line, from the harness's side.

The guest is the machine's firmware (`firmware/`, its README has the protocol). The harness
listens on a UNIX socket and QEMU connects to it, so that the first line is never missed::

    async with GuestConsole.listen(directory / "serial") as console:
        process = await start_qemu(*guest_arguments(console.path), ...)
        guest = await TinyGuest.ready(console)
        await guest.write(0, offset=0, length=65536, seq=1, seed=7)

One command is outstanding at a time; each carries a number that its answer repeats, so a
late answer to a command that was given up is not taken for another's. Offsets and lengths
are bytes, multiples of 512.

Every wait has a stall limit: so many seconds without a line from the guest (which sends
signs of life while it works on a long command). A guest whose disk is held, because QEMU
drains or a job waits to be finalized, is silent: give such a command a longer limit.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self, TypeVar

from qmpblock.errors import RangeError, RequestError, printable
from qmpblock.testing.guest_console import GuestConsole, GuestError
from qmpblock.testing.guest_protocol import (
    GuestDisk,
    GuestHello,
    Latency,
    StressProgress,
    parse_check,
    parse_checksum,
    parse_ejected,
    parse_hello,
    parse_latency,
    parse_progress,
)
from qmpblock.testing.stamps import SECTOR, Bounds, StressSpec, checksum

__all__ = [
    "FIRMWARE",
    "GuestConsole",
    "GuestDisk",
    "GuestError",
    "GuestHello",
    "Latency",
    "StressProgress",
    "StressSpec",
    "TinyGuest",
    "checksum",
    "guest_arguments",
]

FIRMWARE = Path(__file__).parent / "firmware" / "guest.rom"
VERSION = 3
"""Of the protocol; the guest's greeting says its own."""

STALL = 30.0
"""Seconds of silence that fail a wait, unless the caller says otherwise."""

T = TypeVar("T")

_POLL = 0.2
"""Seconds between looks at a stress run that is waited for."""


def guest_arguments(
    serial_path: str | os.PathLike[str],
    memory_mib: int = 16,
    machine: str = "pc",
    accel: str | None = None,
) -> list[str]:
    """Return the QEMU options of a machine whose firmware is the tiny guest.

    Devices apart from the guest's serial line are the caller's to add.

    :param serial_path: the socket that a `GuestConsole` listens on.
    :param memory_mib: at least 16; what is above is for `TinyGuest.dirty`.
    :param machine: `pc`, `q35` or `microvm`, with options if need be (`q35,smm=off`).
    :param accel: default: the environment's QMPBLOCK_ACCEL, or else tcg.
    :raises RangeError: too little memory.
    """
    if memory_mib < 16:
        raise RangeError(f"the tiny guest needs 16 MiB of memory, not {memory_mib}")
    path = os.fspath(serial_path).replace(",", ",,")
    return [
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-accel", accel or os.environ.get("QMPBLOCK_ACCEL") or "tcg"),
        # Room for a second CPU: where there can be only one, TCG before 8.1 drops the guest's
        # memory barriers, and now and then QEMU misses a request of its disk (K10).
        *("-smp", "1,maxcpus=2"),
        *("-m", str(memory_mib), "-machine", machine, "-bios", str(FIRMWARE)),
        *("-chardev", f"socket,id=guest-serial,path={path}", "-serial", "chardev:guest-serial"),
    ]


class TinyGuest:
    """The tiny guest of one VM, driven over its console.

    Methods raise GuestError when the guest refuses or its disk fails the request (`status`
    says how), or when the line closes, and StalledError when it is silent for `stall`
    seconds. Cancelling a method leaves the guest working on the command; the next one waits
    until it is done with it.
    """

    def __init__(self, console: GuestConsole) -> None:
        self.console = console
        self._number = 0
        self._turn = asyncio.Lock()

    @classmethod
    async def ready(cls, console: GuestConsole, *, stall: float = STALL) -> Self:
        """Wait until the guest has started.

        :raises GuestError: QEMU went away before that, or the guest is another version.
        :raises StalledError: nothing was heard.
        """
        guest = cls(console)
        await guest._greeting(stall, fresh=True)
        return guest

    @classmethod
    async def attach(cls, console: GuestConsole, *, stall: float = STALL) -> Self:
        """Take over a guest that runs already: after a migration, on the destination's line.

        The VM must run, for the guest has to answer.
        """
        guest = cls(console)
        await console.wait("a connection", lambda: console.connected or None, stall)
        await guest.hello(stall=stall)
        return guest

    async def close(self) -> None:
        """Close the console. Idempotent."""
        await self.console.close()

    async def _greeting(self, stall: float, *, fresh: bool = False) -> GuestHello:
        text = await self.console.wait("its start", self.console.take_ready, stall, fresh=fresh)
        return self._parsed("*READY", text, parse_hello)

    def _parsed(self, what: str, text: str, parse: Callable[[str], T]) -> T:
        try:
            value = parse(text)
        except ValueError as error:
            raise GuestError(
                f"the guest's answer to {what!r} makes no sense: {error}", self.console.transcript
            ) from error
        if isinstance(value, GuestHello) and value.version != VERSION:
            raise GuestError(
                f"the guest speaks version {value.version} of its protocol, not {VERSION}: "
                "another firmware is loaded",
                self.console.transcript,
            )
        return value

    async def _ask(self, command: str, parse: Callable[[str], T], stall: float) -> T:
        async with self._turn:
            self._number += 1
            number = self._number
            await self.console.send(f"{number} {command}")
            ok, rest = await self.console.wait(
                f"the answer to {command!r}", lambda: self.console.take_answer(number), stall
            )
        if not ok:
            status = re.search(r" status=(\d{1,10})", rest)
            raise GuestError(
                f"the guest refused {command!r}: {printable(rest)}",
                self.console.transcript,
                status=int(status[1]) if status else None,
            )
        return self._parsed(command, rest, parse)

    async def _do(self, command: str, stall: float) -> None:
        await self._ask(command, lambda _: None, stall)

    async def hello(self, *, stall: float = STALL) -> GuestHello:
        """Return the guest's disks, their sizes as they are now."""
        return await self._ask("hello", parse_hello, stall)

    async def rescan(self, *, stall: float = STALL) -> GuestHello:
        """Look for disks that were plugged, forget those that were unplugged."""
        return await self._ask("rescan", parse_hello, stall)

    async def eject(self, *, stall: float = STALL) -> int:
        """Grant the unplugs that `device_del` asked for; return how many there were."""
        return (await self._ask("eject", parse_ejected, stall))[0]

    async def write(
        self, disk: int, offset: int, length: int, *, seq: int, seed: int, stall: float = STALL
    ) -> None:
        """Write stamped sectors: the bytes of `stamps.stamped`."""
        extent = _sectors(offset, length)
        await self._do(f"write {disk} {extent} {_u32(seq, 'seq')} {_u32(seed, 'seed')}", stall)

    async def fill(
        self, disk: int, offset: int, length: int, byte: int, *, stall: float = STALL
    ) -> None:
        """Fill a range with one byte, as `qemu-io -c "write -P BYTE OFFSET LENGTH"` does."""
        await self._do(f"fill {disk} {_sectors(offset, length)} {byte}", stall)

    async def read(self, disk: int, offset: int, length: int, *, stall: float = STALL) -> int:
        """Read a range; return its checksum (see `checksum`)."""
        return await self._ask(f"read {disk} {_sectors(offset, length)}", parse_checksum, stall)

    async def flush(self, disk: int, *, stall: float = STALL) -> None:
        """Flush: what was written before is on stable storage when it returns."""
        await self._do(f"flush {disk}", stall)

    async def discard(self, disk: int, offset: int, length: int, *, stall: float = STALL) -> None:
        """Discard a range, in requests of at most 1 GiB."""
        await self._do(f"discard {disk} {_sectors(offset, length)}", stall)

    async def write_zeroes(
        self, disk: int, offset: int, length: int, *, stall: float = STALL
    ) -> None:
        """Write zeroes without transferring them, in requests of at most 1 GiB."""
        await self._do(f"zero {disk} {_sectors(offset, length)}", stall)

    async def stress(self, spec: StressSpec, *, stall: float = STALL) -> None:
        """Start a stress run and return; one a disk, several disks at once if you like."""
        area = f"{spec.offset // SECTOR} {spec.blocks} {spec.sectors_per_block}"
        load = f"{spec.queue_depth} {spec.total} {spec.seed} {spec.flush_every}"
        kind = f"{spec.rate} {spec.read_percent} {sum(1 << disk for disk in spec.group)}"
        self.console.take_done(spec.disk)  # of an earlier run
        await self._do(f"stress {spec.disk} {area} {load} {kind}", stall)

    async def stress_in_step(
        self, *specs: StressSpec, stall: float = STALL
    ) -> tuple[StressSpec, ...]:
        """Start runs on several disks that keep step, for `stamps.check_one_instant`.

        None issues a write that is more than the queue depth beyond what any of them has
        acknowledged; the first write waits until all have begun.

        :return: the specs, with their group.
        :raise RangeError: a disk is named twice, or the queue depths differ.
        """
        group = tuple(spec.disk for spec in specs)
        if len(set(group)) < len(group) or len({spec.queue_depth for spec in specs}) > 1:
            raise RangeError("runs in step are on one disk each, with the same queue depth")
        grouped = tuple(replace(spec, group=group) for spec in specs)
        for spec in grouped:
            await self.stress(spec, stall=stall)
        return grouped

    @asynccontextmanager
    async def bounds(self, *disks: int, stall: float = STALL) -> AsyncIterator[dict[int, Bounds]]:
        """Ask the guest how far it was before something was done, and how far it is after that.

            async with guest.bounds(0) as bounds:
                await make_a_snapshot()
            check_point_in_time(data, spec, bounds[0])

        The mapping, by the guest's number of the disk, is filled when the block is left.

        :param disks: the guest's numbers of the disks that are written to.
        :raise RequestError: none are named.
        """
        if not disks:
            raise RequestError("name the disks whose bounds are wanted, such as bounds(0)")
        before = {disk: await self.progress(disk, stall=stall) for disk in disks}
        bounds: dict[int, Bounds] = {}
        yield bounds
        for disk in disks:
            now = await self.progress(disk, stall=stall)
            bounds[disk] = Bounds(acked=before[disk].acked, issued=now.issued)

    async def progress(self, disk: int = 0, *, stall: float = STALL) -> StressProgress:
        """Return how far the disk's stress run is."""
        return await self._ask(f"progress {disk}", parse_progress, stall)

    async def latency(self, disk: int = 0, *, stall: float = STALL) -> Latency:
        """Return the stress run's latencies since this was last asked, and begin anew."""
        return await self._ask(f"latency {disk}", parse_latency, stall)

    async def stop_stress(self, disk: int = 0, *, stall: float = STALL) -> StressProgress:
        """End the disk's stress run and wait for what is in flight."""
        return await self._ask(f"stop {disk}", parse_progress, stall)

    async def finish_stress(self, disk: int = 0, *, stall: float = STALL) -> StressProgress:
        """Wait until the disk's stress run has ended by itself.

        :raises StalledError: no request of it was completed for `stall` seconds.
        """
        loop = asyncio.get_running_loop()
        last, moved = None, loop.time()
        while True:
            now = await self.progress(disk, stall=stall)
            if not now.running:
                return now
            done = (now.acked, now.issued, now.flushed, now.reads)
            if done != last:
                last, moved = done, loop.time()
            elif loop.time() - moved > stall:
                raise await self.console.stalled(
                    f"the stress run on the guest's disk {disk} completed nothing for {stall:g} s",
                    str(now),
                )
            await asyncio.sleep(_POLL)

    async def check(self, disk: int = 0, *, stall: float = STALL) -> int:
        """Read every block of the ended stress run back, against the table in guest RAM.

        :return: how many blocks were checked.
        :raises GuestError: some are wrong (`progress` says the first).
        """
        checked, bad = await self._ask(f"check {disk}", parse_check, stall)
        if bad:
            raise GuestError(
                f"{bad} of {checked} blocks of the guest's disk {disk} do not hold what was "
                f"acknowledged: {await self.progress(disk, stall=stall)}",
                self.console.transcript,
            )
        return checked

    async def dirty(self, mib: int, *, stall: float = STALL) -> None:
        """Write to every page of so many MiB of RAM, from 16 MiB up, something new."""
        await self._do(f"dirty {mib}", stall)

    async def power_off(self, *, stall: float = STALL) -> None:
        """Switch the machine off, as a guest does: QEMU emits SHUTDOWN with guest true.

        QEMU then ends, unless it was started with `-no-shutdown`; waiting for that is the
        caller's.
        """
        await self._do("off", stall)

    async def reset(self, *, stall: float = STALL) -> GuestHello:
        """Reset the machine and wait until the guest has started again."""
        self.console.take_ready()
        await self._do("reset", stall)
        return await self._greeting(stall)


def _sectors(offset: int, length: int) -> str:
    """Return `LBA COUNT` of a range in bytes.

    :raises RangeError: it is not made of whole sectors.
    """
    if offset < 0 or length <= 0 or offset % SECTOR or length % SECTOR:
        raise RangeError(
            f"the guest writes whole sectors: offset {offset} and length {length} must be "
            f"multiples of {SECTOR}"
        )
    return f"{offset // SECTOR} {length // SECTOR}"


def _u32(value: int, name: str) -> int:
    if not 0 <= value < 1 << 32:
        raise RangeError(f"{name} {value} does not fit into 32 bits")
    return value
