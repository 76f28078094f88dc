"""What is copied begins to go to storage while more is copied.

QEMU writes to the page cache, from which the kernel takes its time to write on: of a copy of 1 GiB
all can be there still when its last byte is, and waits for the flush at the end; the guest's own
flushes wait with it. So the kernel is asked all the time to go on with what is there::

    without     copying ---------|flush ------|
    with        copying ----------|flush|
                 storing ---------|

It is only sooner: what makes a copy whole is the flush at its end, and that is as it was. So where
this cannot be had, nobody minds; and where storage hangs, nobody waits for it but for a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from qmpblock.cancellation import undisturbed
from qmpblock.copying.devicetarget import DeviceTarget
from qmpblock.copying.targetfile import TargetFile
from qmpblock.errors import Error, StalledError, printable
from qmpblock.host.writeback import begin_writeback

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget

__all__ = ["store", "storing"]

_PAUSE = 0.05  # seconds between two times
_PATIENCE = 1.0  # seconds in which a thread has ended, where storage does not hang
_LOOK = 0.002  # seconds


@asynccontextmanager
async def storing(targets: Iterable[CopyTarget]) -> AsyncIterator[None]:
    """Have what is written to files and devices go to storage, as far as it is there.

    While this lasts; cancelling ends that, too.
    """
    stop = threading.Event()
    threads = [
        # Of its own, and a daemon: what hangs in the kernel keeps nobody else.
        threading.Thread(target=_store, args=(target, stop), name="storing", daemon=True)
        for target in targets
        if isinstance(target, TargetFile | DeviceTarget)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        await undisturbed(_ended(threads))


async def store(target: TargetFile | DeviceTarget, patience: float) -> float:
    """Have what a target holds by now on stable storage; return the seconds that it took.

    Cancelling waits for nothing that hangs in the kernel.

    :raise StalledError: it took longer than `patience` seconds.
    :raise Error: it cannot be.
    """
    failed: list[OSError] = []

    def sync() -> None:
        try:
            fd = target.look_into()
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=sync, name="storing", daemon=True)
    began = time.monotonic()
    thread.start()
    while thread.is_alive():
        if time.monotonic() - began > patience:
            raise StalledError(
                f"{printable(target.path)} has not been brought to stable storage for "
                f"{patience:g} s",
                remedy="look whether its storage hangs",
            )
        await asyncio.sleep(_LOOK)
    if failed:
        raise Error(
            f"{printable(target.path)} cannot be brought to stable storage: {failed[0].strerror}"
        )
    return time.monotonic() - began


def _store(target: TargetFile | DeviceTarget, stop: threading.Event) -> None:
    with contextlib.suppress(OSError):  # it is gone, or no kernel's file system: see above
        fd = target.look_into()
        try:
            while not stop.wait(_PAUSE):
                begin_writeback(fd)
        finally:
            os.close(fd)


async def _ended(threads: Sequence[threading.Thread]) -> None:
    """Wait until they have let go of the files; not for what hangs."""
    for _ in range(int(_PATIENCE / _LOOK)):
        if not any(thread.is_alive() for thread in threads):
            return
        await asyncio.sleep(_LOOK)
