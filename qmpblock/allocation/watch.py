"""Keeping room ahead of a guest that writes, for as long as its VM lives.

QEMU can be told to send BLOCK_WRITE_THRESHOLD once, when a write to a node ends beyond an
offset (block-set-write-threshold; qapi/block-core.json). The offset that is chosen has half of
the room (`qmpblock.allocation.room`) above it. The event is a hint that comes early enough; what is
true is looked up.

A watcher leaves two things in QEMU: the threshold, and a lock of its own (not the disk's: other
work on the disk goes on), whose data names the node and the offsets before they are set. So
whoever finds the lock of a dead watcher can take its threshold away, and nobody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpblock.allocation.room import (
    Place,
    RoomResult,
    Space,
    fill,
    find_place,
    look_at,
    result_of,
    rounded_room,
    threshold,
)
from qmpblock.cancellation import undisturbed
from qmpblock.errors import (
    UNTOUCHED,
    BusyError,
    DisconnectedError,
    Error,
    GraphError,
    NotFoundError,
    RequestError,
    StalledError,
    UnsupportedError,
    printable,
    shell_words,
)
from qmpblock.graph.model import BlockGraph, DiskDevice
from qmpblock.host import imagefiles
from qmpblock.host.processes import start_time
from qmpblock.names import ahead_lock_name, is_of_run, is_ours, lock_name, new_run
from qmpblock.qemu import lock, ownership
from qmpblock.qemu.lock import Holder
from qmpblock.qemu.ownership import Owner
from qmpblock.qemu.threshold import disarm, disarm_dead, set_threshold
from qmpblock.ranges import Ranges
from qmpblock.sizes import Amount

if TYPE_CHECKING:
    from qmpblock.mapping import MappedDisk
    from qmpblock.qemu.monitor import Event, Subscription

__all__ = ["keep_ahead"]

_EVENT = "BLOCK_WRITE_THRESHOLD"
_LOOK = 5.0  # seconds between looks of a watcher that no event wakes
_APART = 1.0  # seconds from one look to the next that an event asks for
_ENDING = 2.0  # seconds from QEMU's last word to the end of its process
_REMEDY = "it keeps this disk's room already; end it, or leave the disk to it"


async def keep_ahead(
    disk: MappedDisk,
    size: int,
    *,
    keep_free: Amount | None = None,
    tell: Callable[[RoomResult], None] | None = None,
) -> None:
    """Keep the room of a disk for as long as its VM lives. See `Disk.keep_ahead`."""
    await _Watcher(disk, rounded_room(size), keep_free, tell).run()


class _Watcher:
    """Keeps the room of one disk.

    ::

        look:   which node has the active layer?     another one: follow it
                less than half of the room left?     reserve up to the whole
                no threshold set?                    set it where half of the room lies above
        wait:   for the event, or five seconds; then look again
    """

    def __init__(
        self,
        disk: MappedDisk,
        size: int,
        keep_free: Amount | None,
        tell: Callable[[RoomResult], None] | None,
    ) -> None:
        self._vm = disk.vm
        self._disk = disk
        self._size = size
        self._keep_free = keep_free
        self._tell = tell
        self._run = new_run()
        self._lock = ahead_lock_name(disk.device)
        self._place: Place | None = None
        self._seen: tuple[object, ...] = ()  # node names, when the place was looked up
        # Of the threshold that may be ours; QEMU takes it away when it sends the event.
        self._offsets: list[int] = []
        self._settled = False  # whether the threshold is set where it should be, if anywhere
        self._until = 0
        self._space = Space(Ranges(), None)
        self._told: tuple[bool, str] | None = None
        self._cost = 0.0  # seconds that reading the graph took

    async def run(self) -> None:
        """Watch until the VM ends.

        :raise Error: this disk cannot be watched, or no more; nothing of ours is left then.
        """
        monitor = self._vm.monitor
        if monitor.by_turns:
            raise UnsupportedError(
                f"the room of a disk is not watched by {monitor.address}: it is had by turns, and "
                "an event tells when room becomes scarce",
                standing=UNTOUCHED,
                remedy="give the VM a second monitor; or run qmpblock apply without --watch, often",
            )
        pid = monitor.peer_pid or 0
        start = start_time(pid)
        with monitor.subscribe(_EVENT, match=self._is_ours) as events:
            try:
                await ownership.ask(monitor, [self._disk.device])
                await lock.acquire(
                    monitor, self._lock, self._holder(), self._undo, stall=0, remedy=_REMEDY
                )
                try:
                    await self._watch(events)
                except DisconnectedError:
                    raise
                except BaseException:
                    await undisturbed(self._end())
                    raise
            except DisconnectedError as error:
                if await undisturbed(_has_ended(pid, start)):
                    return
                lock.abandon(self._run)
                error.standing = f"left in the VM: the lock {self._lock} and a write threshold"
                error.remedy = f"run: qmpblock recover {shell_words([monitor.address])}"
                raise

    def _is_ours(self, event: Event) -> bool:
        data = event.get("data")
        node = data.get("node-name") if isinstance(data, dict) else None
        return self._place is not None and node == self._place.node

    def _holder(self) -> Holder:
        node = self._place.node if self._place is not None else None
        return Holder.me(self._run, node=node, offsets=self._offsets)

    async def _undo(self, dead: Holder) -> None:
        await disarm_dead(self._vm, dead)

    async def _end(self) -> None:
        try:
            if self._place is not None and self._offsets:
                graph = await self._vm.graph()
                await disarm(self._vm, graph, self._place.node, self._offsets)
            await lock.release(self._vm.monitor, self._lock)
        except DisconnectedError:
            raise
        except BaseException:
            lock.abandon(self._run)
            raise

    async def _watch(self, events: Subscription) -> None:
        now = asyncio.get_running_loop().time
        good = now()
        while True:
            began = now()
            try:
                await self._look()
                good = now()
            except GraphError:  # somebody changes the graph just now
                if now() - good > self._vm.stall:
                    raise
                self._settled = False
            try:
                await events.get(_LOOK)
            except StalledError:
                continue
            # A guest that writes far above the room must not have us at it all the time, nor
            # QEMU, whose main loop stands still while it describes its graph.
            await asyncio.sleep(began + max(_APART, 10 * self._cost) - now())
            events.pending()
            self._settled = False

    async def _look(self) -> None:
        if not await self._is_ours_still():
            return
        names = await self._names()
        if (self._place is None or names != self._seen) and not await self._follow(names):
            return
        place = self._place
        assert place is not None  # it was followed
        pid = self._vm.monitor.peer_pid
        if imagefiles.local_path(pid, place.layer) != place.file:
            self._seen = ()  # moved, or another one has its name: look it up again
            return
        try:
            await self._top_up(place)
        except UnsupportedError:
            # An overlay of ours came on top meanwhile, below which the image is only read?
            if await self._names() != names:
                self._seen = ()
                return
            await self._top_up(place)  # or it came and went
        if not self._settled:
            await self._arm(place)

    async def _is_ours_still(self) -> bool:
        """Whether to go on now: not while a migration is under way, whose end is waited for.

        :raise UnsupportedError: it has gone through: the room is the destination's to keep.
        """
        situation = await ownership.look(self._vm.monitor, [self._disk.device])
        if situation.owner not in (Owner.THIS, Owner.LEAVING):
            raise UnsupportedError(
                situation.why,
                standing="what is reserved stays so, and nothing of ours is left in the VM",
                remedy=situation.remedy,
            )
        return situation.owner is Owner.THIS

    async def _names(self) -> tuple[object, ...]:
        """Return the nodes from the disk's root down to its storage: cheap, and tells of most."""
        for stat in await self._vm.monitor.execute("query-blockstats"):
            qdev = stat.get("qdev")
            path = self._disk.device.qom_path
            if qdev is not None and path in (qdev, f"/machine/peripheral/{qdev}"):
                names: list[object] = []
                while isinstance(stat, dict):
                    names.append(stat.get("node-name"))
                    stat = stat.get("parent")
                return tuple(names)
        raise NotFoundError(
            f"{printable(self._disk.name)} is in this VM no more: it was unplugged, or its medium "
            "was taken out",
        )

    async def _graph(self) -> BlockGraph:
        now = asyncio.get_running_loop().time
        began = now()
        graph = await self._vm.graph()
        self._cost = now() - began
        return graph

    async def _follow(self, names: tuple[object, ...]) -> bool:
        """Look up where the room is now; False where it is about to be elsewhere again."""
        graph = await self._graph()
        self._disk.device = graph.device(self._disk.device.qom_path)
        if await self._is_passing(self._disk.device):
            return False
        place = await find_place(self._disk)
        if self._place is None or place.node != self._place.node:
            self._check_foreign(graph, place.node, [])
            if self._place is not None:
                await disarm(self._vm, graph, self._place.node, self._offsets)
            self._offsets = []
        if self._place is None or place.file != self._place.file:
            self._until, self._told = 0, None
        self._place, self._seen, self._settled = place, names, False
        return True

    async def _is_passing(self, device: DiskDevice) -> bool:
        """Whether the active layer is an overlay of ours that will be gone in a while."""
        holder = await lock.read(self._vm.monitor, lock_name(device))
        if holder is None:
            return False
        # Of a lock that cannot be read, any overlay of ours may be.
        run = holder.run if isinstance(holder, Holder) else ""
        name = device.chain.active.node.name
        return is_of_run(name, run) if run else is_ours(name)

    def _check_foreign(self, graph: BlockGraph, name: str, ours: list[int]) -> None:
        node = graph.nodes.get(name)
        if node is not None and node.write_threshold not in (0, *ours):
            raise BusyError(
                f"somebody has set a write threshold on {printable(name)}, at "
                f"{node.write_threshold}: QEMU has one for each node",
                standing="it was left as it is, and nothing of ours is left in the VM",
                remedy="end whoever uses it (libvirt does, for its block threshold events), or "
                f'take it away: block-set-write-threshold {{"node-name": "{printable(name)}", '
                '"write-threshold": 0}',
            )

    async def _top_up(self, place: Place) -> None:
        """Reserve up to the whole where less than half is left, and tell."""
        half = self._size // 2
        first = self._told is None
        space = await look_at(place, self._size if first else half, self._until)
        reserved, after, error = 0, space, None
        if first or space.room.total < half:
            try:
                reserved, after = await fill(place, space, self._size, self._keep_free)
            except RequestError:
                raise
            except Error as failure:  # no space: there may be some in a while
                error = failure
                after = await look_at(place, self._size, self._until)
            if reserved:
                self._settled = False
                self._until = max(self._until, after.end + after.room.total)
        result = result_of(self._disk, place, self._size, space, reserved, after)
        if not after.known:  # what we know of it, then
            result = replace(result, before=space.room.total, room=after.room.total)
        state = result.full, "" if error is None else error.message
        if self._tell is not None and (reserved or state != self._told):
            self._tell(replace(result, error=error))
        self._told = state
        self._space = after

    async def _arm(self, place: Place) -> None:
        offset = threshold(self._space.room, self._size // 2)
        if offset is None:
            return  # there is no more to come, or no space: the next look tries again
        graph = await self._graph()
        self._check_foreign(graph, place.node, self._offsets)
        node = graph.nodes.get(place.node)
        if node is None:
            self._seen = ()  # gone since: look it up again
            return
        if node.write_threshold != offset:
            # The record comes first: killed in between, there is nothing that it does not name.
            self._offsets = [*self._offsets[-1:], offset]
            await lock.update(self._vm.monitor, self._lock, self._holder())
            await set_threshold(self._vm, place.node, offset)
            self._offsets = [offset]
        self._settled = True


async def _has_ended(pid: int, start: int | None) -> bool:
    """Whether a process that said its last word comes to its end."""
    deadline = asyncio.get_running_loop().time() + _ENDING
    while pid and start is not None and start_time(pid) == start:
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.05)
    return bool(pid) and start is not None
