"""Asking: a manager that lends its monitor at work on one of its disks, because we asked it.

It counts the layers as we do, and calls each by a name of its own; its job is followed by what it
tells of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from qmpblock.changes import known
from qmpblock.changes.known import NEAR
from qmpblock.errors import Error, GraphError, printable, shell_words
from qmpblock.managers import Manager, Work
from qmpblock.qemu.job import Job, Progress

if TYPE_CHECKING:
    from qmpblock.graph.model import Layer
    from qmpblock.mapping import MappedDisk

__all__ = ["Asking"]

_LOOK = 0.05  # seconds between looks at the manager's chain


class Asking:
    """A disk that its manager is asked to work on.

    :ivar name: what the manager calls it.
    :ivar near: bytes by which the guest may be ahead when it is paused for the rest.
    :param standing: what stands where it cannot.
    :param work: what for, and so how it would be asked by its own command.
    """

    def __init__(self, disk: MappedDisk, name: str, *, standing: str, work: Work) -> None:
        self._disk = disk
        self._vm = disk.vm
        self._standing = standing
        self._work = work
        self.name = name
        self.near = NEAR

    async def layers(self) -> Sequence[tuple[str, str]]:
        """Return the manager's files and names of the disk's layers, which it counts as we do.

        :raise GraphError: it has another chain.
        """
        layers = await self._vm.monitor.through(lambda lender: lender.layers(self.name))
        if len(layers) != len(self._disk.chain.layers):
            files = ", ".join(printable(file) for file, _ in layers)
            address = shell_words([self._vm.monitor.address])
            raise GraphError(
                f"libvirt takes {files} for the chain of {self.name}, and QEMU has another one",
                standing=self._standing,
                remedy=f"compare them: virsh dumpxml DOMAIN; qmpblock disks {address}",
            )
        return layers

    async def agree(self) -> None:
        """Wait until the manager has the chain that QEMU has.

        It notes the end of a job a moment after QEMU has no such job any more; where its daemon was
        started again meanwhile, a longer one (K41).

        :raise GraphError: it still has another one after the stall limit.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._vm.stall
        while True:
            try:
                await self.layers()
            except GraphError:
                if clock() > deadline:
                    raise
            else:
                return
            await asyncio.sleep(_LOOK)

    async def check_dropped(self, leaving: Iterable[Layer], job: str, standing: str) -> None:
        """See that layers are gone, for QEMU and for the manager, whose job it was.

        :param job: what it was, for people; `standing`: what stands where one is not.
        :raise GraphError: one is there still.
        """
        await self._disk.refresh()
        names = {layer.node.name for layer in self._disk.chain.layers}
        left = [layer for layer in leaving if layer.node.name in names]
        if left:
            raise GraphError(
                f"libvirt has ended its {job} of {self.name}, but {printable(left[0].file)} is "
                "still in the chain",
                standing=standing,
                remedy="see why in libvirt's log, then run this again",
            )
        await self.agree()

    def named(self, layer: tuple[str, str]) -> str:
        """Return what names a layer: an empty name would mean another one."""
        file, name = layer
        if not name:
            raise GraphError(
                f"libvirt does not say by what name it knows {printable(file)}",
                standing=self._standing,
                remedy=Manager("libvirt", "", "").way(self._work),
            )
        return name

    async def follow(
        self,
        job: Job,
        phase: str,
        until: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """Wait until the manager has no job on the disk any more, or is where it is to be.

        :param job: to show it by; `phase`: what it does, for people.
        :param until: whether it is there.
        :raise StalledError: it does not move.
        """
        await known.follow(
            self._vm, self.name, lambda now: job.show(Progress("running", phase, *now)), until
        )

    async def catch_up(self, job: Job) -> None:
        """Wait until the manager's job is asked to pivot, and the guest is near.

        :param job: to show it by, and by which it is asked.
        :raise StalledError: the guest writes faster than it copies.
        """
        await known.catch_up(
            self._vm, self.name, job.show, lambda: job.completion_asked, lambda: self.near
        )

    async def is_near(self) -> bool:
        """Whether the guest is still near, where it has to wait until others are."""
        seen = await self._vm.monitor.through(lambda lender: lender.job(self.name))
        return seen is not None and seen[1] - seen[0] <= self.near

    async def give_up(self) -> None:
        """Have the manager give its job up, if it can be reached and has one."""
        with contextlib.suppress(Error):  # it has ended, or cannot be reached
            await self._vm.monitor.through(lambda lender: lender.abort(self.name))

    async def limit(self, speed: int) -> None:
        """Limit the manager's job to `speed` bytes a second from now on; 0 is no limit."""
        await self._vm.monitor.through(lambda lender: lender.limit(self.name, speed))
