"""Watching: the room of every disk of a policy is kept ahead (`qmpblock.allocation.watch`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qmpblock.address import MonitorAddress, parse_monitor
from qmpblock.allocation.room import RoomResult
from qmpblock.allocation.watch import keep_ahead
from qmpblock.cancellation import task_group
from qmpblock.errors import UNTOUCHED, Error, RequestError
from qmpblock.policy.file import DiskPolicy, Policy
from qmpblock.policy.run import Connect, as_error, connect_to

if TYPE_CHECKING:
    from qmpblock.vm import VM

__all__ = ["Watch", "Watched"]


@dataclass(frozen=True)
class Watched:
    """How the watch of one disk's room went.

    :ivar last: the room when it was last told of; None where it never began.
    :ivar top_ups: how often something was reserved; `reserved`: how much, in bytes.
    :ivar error: why it ended, or, while its VM lives, why there is less room than wanted.
    """

    policy: DiskPolicy
    name: str
    last: RoomResult | None = None
    top_ups: int = 0
    reserved: int = 0
    error: Error | None = None


class Watch:
    """Keeps the room of every disk for which a policy wants some: `Disk.keep_ahead` for many.

    :param connect: makes a VM of an address; by default `qmpblock.connect`.
    :param tell: is called when something was reserved, or cannot be.
    :param ended: is called when the watch of a disk ends: its VM has ended, or it failed.
    :ivar disks: what there is to say of each, in the policy's order.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        connect: Connect | None = None,
        tell: Callable[[Watched], None] | None = None,
        ended: Callable[[Watched], None] | None = None,
    ) -> None:
        self.disks = {one: Watched(one, one.disk) for one in policy.disks if one.ahead is not None}
        self._connect = connect or connect_to
        self._tell = tell
        self._ended = ended
        if not self.disks:
            raise RequestError(
                f"{policy.source}: no disk has `ahead`, so there is nothing to watch",
                standing=UNTOUCHED,
            )

    async def run(self) -> None:
        """Watch until every VM has ended. One disk's failure does not end the others' watch.

        Cancelling it ends all of them; nothing of ours is left.
        """
        vms: dict[MonitorAddress, list[DiskPolicy]] = {}
        for wanted in self.disks:  # a monitor serves one client, however its address is written
            vms.setdefault(parse_monitor(wanted.address), []).append(wanted)
        async with task_group() as group:
            for disks in vms.values():
                group.create_task(self._vm(disks[0].address, disks))

    async def _vm(self, address: str, disks: list[DiskPolicy]) -> None:
        try:
            async with self._connect(address) as vm, task_group() as group:
                for wanted in disks:
                    group.create_task(self._disk(vm, wanted))
        except Error as error:  # the connection; what happens to a disk is seen to there
            for wanted in disks:
                self._end(wanted, error)

    async def _disk(self, vm: VM, wanted: DiskPolicy) -> None:
        assert wanted.ahead is not None  # else it is not watched

        def tell(result: RoomResult) -> None:
            last = self.disks[wanted]
            now = replace(
                last,
                last=result,
                top_ups=last.top_ups + bool(result.reserved),
                reserved=last.reserved + result.reserved,
                error=result.error,
            )
            self.disks[wanted] = now
            if self._tell is not None:
                self._tell(now)

        error: Error | None = None
        try:
            disk = await vm.disk(wanted.disk)
            self.disks[wanted] = replace(self.disks[wanted], name=disk.name)
            size = wanted.ahead.of(disk.size) or 1
            await keep_ahead(disk, size, keep_free=wanted.keep_free, tell=tell)
        except (Error, OSError) as failure:
            error = as_error(failure)
        self._end(wanted, error)

    def _end(self, wanted: DiskPolicy, error: Error | None) -> None:
        if error is not None:
            self.disks[wanted] = replace(self.disks[wanted], error=error)
        if self._ended is not None:
            self._ended(self.disks[wanted])
