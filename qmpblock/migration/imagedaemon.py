"""ImageDaemon: what a storage daemon is to a migration, whichever host it runs on.

It has the destination's images open, and serves each by NBD, from its start until it has ended;
what starts it and ends it differs (`qmpblock.migration.imageserver`, on this host;
`qmpblock.migration.serverthere`, on another).
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qmpblock.copying.target import NBDTarget
from qmpblock.errors import NBDError, ToolError
from qmpblock.names import export_name
from qmpblock.nbd.client import Client

if TYPE_CHECKING:
    from qmpblock.address import UnixAddress
    from qmpblock.graph.model import DiskDevice
    from qmpblock.migration.imagenodes import ImageNodes

__all__ = ["NAME", "ImageDaemon", "described"]

NAME = "qemu-storage-daemon"


class ImageDaemon(ABC):
    """The storage daemon of one migration: `start`, then `end`.

    :param server: where it serves; `number`: how many images.
    :ivar targets: where each image is found, once it serves.
    :ivar whole: whether it has ended by itself, told to: all that it ever took in is in the images.
    """

    _poll: ClassVar = 0.005

    def __init__(self, run: str, server: UnixAddress, number: int, stall: float) -> None:
        self.whole = False
        self.targets = [NBDTarget(server, export_name(run, one)) for one in range(number)]
        self._stall = stall

    @abstractmethod
    def marks(self) -> tuple[str, ...]:
        """Return what tells later that nobody has written to an image since, of each; or nothing.

        By what the kernel takes down of a file at each write.
        """

    @abstractmethod
    async def start(self) -> None:
        """Start it, and wait until it serves. Not to be cancelled half-way.

        :raise ToolError: it did not start: its words. Nothing is left.
        :raise StalledError: it says nothing; NBDError: likewise. Nothing is left.
        :raise Error: it cannot be started: says why.
        """

    @abstractmethod
    async def end(self) -> str:
        """Have it write all that it holds, and end: its images are nobody's then. Idempotent.

        One that does not is killed: what a mirror that has ended wrote was on stable storage
        by then.

        :return: how it had ended, for people; empty where it did as it was told to.
        :raise StalledError: it does not end, or whether it has is not known.
        """

    @abstractmethod
    def said(self) -> str:
        """Return what it has printed."""

    @abstractmethod
    def _ended(self) -> int | None:
        """Return its exit code; None while it may run."""

    async def flush(self) -> None:
        """Have it write all that it took in: that this failed as it ends nobody would hear.

        :raise NBDError: it could not.
        """
        for target in self.targets:
            client = await Client.connect(target.server, export=target.export, stall=self._stall)
            try:
                await client.flush()
            finally:
                await client.close()

    async def _until_it_serves(self, program: str) -> None:
        """Wait until its last export is there: it greets before that (11.1)."""
        loop, last = asyncio.get_running_loop(), self.targets[-1]
        deadline = loop.time() + self._stall
        while (code := self._ended()) is None:
            try:
                client = await Client.connect(last.server, export=last.export, stall=self._stall)
            except NBDError:
                if loop.time() > deadline:
                    raise
                await asyncio.sleep(self._poll)
            else:
                await client.close()
                return
        raise ToolError([program], code, self.said())


async def described(
    nodes: ImageNodes, run: str, disks: Sequence[DiskDevice]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the words by which it opens and serves the images of disks, and the nodes of these.

    :raise UnsupportedError: an image is of a kind that is not served so.
    """
    words, opened = [], []
    for number, disk in enumerate(disks):
        name = export_name(run, number)
        node = await nodes.chain(disk.chain.layers)
        opened.append(node)
        words += ["--blockdev", json.dumps({**node, "node-name": name})]
        export = {"type": "nbd", "id": name, "name": name, "node-name": name, "writable": True}
        words += ["--export", json.dumps({**export, "allocation-depth": True})]
    return words, opened
