"""Held I/O: which guest devices may wait while a pivot holds what they have asked for.

While the pivot of an active commit is pending the guest's I/O on that disk is held (K5), until
we finalize it. Most devices then just have requests in flight. But some wait for theirs on the
spot, in QEMU's main loop or with its lock held, and so no monitor is served any more: nobody
can finalize the pivot, and QEMU hangs for good (K12). Measured on 7.2.22 and
11.1.2, one access each while a pivot was pending::

    cfi.pflash01   a byte is written             hangs
    floppy         a sector is read, without DMA hangs
    sd-card        a block is written, by PIO    hangs
    ide-hd         a sector is read, by PIO      its request is in flight, the monitor answers

So does a guest's own CPU that programs its pflash in a loop, at the first pivot, on both. (Were
the pivot finalized by QEMU itself it would go on; but then no journal could say which image is
to be trusted.) By the code the same as the first three, not run: cfi.pflash02, at24c-eeprom,
NAND and OneNAND flash, spapr-nvram, e-fuses. So only devices that are known to go on are given a
pivot. A human monitor's `qemu-io` on the disk hangs QEMU just so, and cannot be prevented.

Where the requests that are held wait is another question: of a virtio device with ioeventfd (the
default) in the guest's own queue, of any other in QEMU. Onto some images QEMU 7.2 cannot pivot then
(K26): so no request may wait, and the VM is paused before the pivot begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpblock.errors import UNTOUCHED, CommandError, UnsupportedError, printable
from qmpblock.graph.model import Device
from qmpblock.qemu.monitor import Monitor

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["check_held_io", "must_pause"]

#: Formats that hold no right to write of their own to their file: they pass on the guest's.
_PASSING_ON = frozenset({"luks", "raw"})

#: QOM types whose requests are all asynchronous: those that the tests commit under, and their
#: relatives of the same code.
_ASYNCHRONOUS = frozenset(
    {
        "ide-cd",
        "ide-hd",
        "nvme",
        "nvme-ns",
        "scsi-block",
        "scsi-cd",
        "scsi-hd",
        "virtio-blk-device",
    }
)


async def check_held_io(monitor: Monitor, device: Device, *, remedy: str) -> None:
    """Refuse to hold the I/O of a device that may hang QEMU by waiting for it.

    :param remedy: what to do instead.
    :raise UnsupportedError: it may, or it cannot be told what it is.
    """
    try:
        kind = await monitor.execute("qom-get", {"path": device.qom_path, "property": "type"})
    except CommandError as error:
        raise UnsupportedError(
            f"what kind of device {device.name} is cannot be told: {printable(error.description)}",
            standing=UNTOUCHED,
        ) from None
    if kind not in _ASYNCHRONOUS:
        raise UnsupportedError(
            f"{device.name} is a {printable(kind)}. A pivot holds the device's I/O for a moment, "
            "and of such a device it is not known that QEMU serves its monitor meanwhile: pflash, "
            "floppy and SD card hang QEMU for good, with the guest",
            standing=UNTOUCHED,
            remedy=remedy,
        )


async def must_pause(vm: Connection, device: Device, onto: str) -> bool:
    """Whether the VM has to be paused while a device pivots, or QEMU would abort (K26).

    :param onto: the format of the image that it pivots onto.
    """
    if onto not in _PASSING_ON or not vm.capabilities.pivots_abort_under_queued_writes:
        return False
    return not await _holds_in_its_queue(vm.monitor, device)


async def _holds_in_its_queue(monitor: Monitor, device: Device) -> bool:
    """Whether what a device has been asked for waits in the guest's memory, not in QEMU."""
    path = device.qom_path.removesuffix("/virtio-backend")
    for _ in range(8):  # device, bus, controller; QEMU's trees are not deeper
        try:
            return bool(await monitor.execute("qom-get", {"path": path, "property": "ioeventfd"}))
        except CommandError:
            pass  # this kind of device has no such property; look further up
        try:
            bus = await monitor.execute("qom-get", {"path": path, "property": "parent_bus"})
        except CommandError:
            return False
        path = str(bus).rpartition("/")[0].removesuffix("/virtio-backend")
        if not path.startswith("/machine/"):
            return False
    return False
