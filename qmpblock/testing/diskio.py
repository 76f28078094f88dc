"""I/O on the disks of a running VM, as their guest would do it.

Two ways: the tiny guest, where one runs and has a driver for the device; else QEMU's own
`qemu-io` on the human monitor, which goes through the guest device's BlockBackend, so that
everything below it (filters, permissions, iothreads) takes part.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpblock.errors import CommandError, StalledError
from qmpblock.qemu.monitor import Monitor
from qmpblock.testing.images import BuiltDisk, qemu_io_command
from qmpblock.testing.scenario import Operation

if TYPE_CHECKING:
    from qmpblock.testing.guest import TinyGuest

__all__ = ["DiskIO"]

_IO_LIMIT = 60.0  # seconds for one request of qemu-io
_POLL = 0.003  # seconds
_GUEST_KINDS = {"virtio-blk": "blk", "virtio-scsi": "scsi"}


class DiskIO:
    """I/O on the disks of one VM.

    :param monitor: of the VM.
    :param disks: of the VM, in the order of attachment.
    :param stdout: the file that QEMU's stdout goes to.
    :param guest: the tiny guest, if one runs.
    """

    def __init__(
        self,
        monitor: Monitor,
        disks: Sequence[BuiltDisk],
        stdout: Path,
        guest: TinyGuest | None = None,
    ) -> None:
        self._monitor = monitor
        self._disks = tuple(disks)
        self._stdout = stdout
        self._guest = guest
        self._turn = asyncio.Lock()

    async def perform(self, disk: BuiltDisk, operations: Iterable[Operation]) -> None:
        """Do `operations` in order.

        :raise CommandError: one of them failed.
        :raise GuestError: one of them failed in the tiny guest.
        """
        number = await self.guest_number(disk)
        for operation in operations:
            # The guest's write-zeroes request does not allow to unmap.
            if number is None or operation.unmap:
                await self.qemu_io(disk, _aio(operation))
            else:
                await self._by_guest(number, operation)

    async def _by_guest(self, number: int, operation: Operation) -> None:
        assert self._guest is not None  # guest_number() found the disk
        span = (operation.offset, operation.length)
        match operation.verb:
            case "write":
                await self._guest.fill(number, *span, operation.pattern)
            case "zero":
                await self._guest.write_zeroes(number, *span)
            case "discard":
                await self._guest.discard(number, *span)
            case "flush":
                await self._guest.flush(number)
            case _:
                raise ValueError(f"a guest cannot {operation.verb}")

    async def guest_number(self, disk: BuiltDisk) -> int | None:
        """Return what the tiny guest calls a disk; None if no guest runs or it has no driver."""
        kind = _GUEST_KINDS.get(disk.spec.attach.device)
        if self._guest is None or kind is None:
            return None
        alike = [one for one in self._disks if _GUEST_KINDS.get(one.spec.attach.device) == kind]
        seen = [found for found in (await self._guest.hello()).disks if found.kind == kind]
        # Both orders are that of the bus, which is that of the command line.
        position = [one.spec.name for one in alike].index(disk.spec.name)
        return seen[position].number if position < len(seen) else None

    async def qemu_io(self, disk: BuiltDisk, command: str) -> str:
        """Do I/O through the guest device's own backend, without a guest.

        :param command: qemu-io's (`write -P 1 0 64k`), with offsets in bytes.
        :return: what it printed. `aio_...` commands are waited for, too.
        :raise CommandError: the I/O failed.
        :raise StalledError: an `aio_...` command did not end.
        """
        return await self.qemu_io_at(await self.qom_path(disk), command)

    async def qemu_io_at(self, path: str, command: str) -> str:
        """Do I/O likewise, through the backend at a QOM path."""
        async with self._turn:
            # qemu-io prints on QEMU's own stdout, a line at a time; only a wrong PATH is told
            # on the monitor.
            before = self._stdout.stat().st_size
            refused = await self._monitor.execute(
                "human-monitor-command", {"command-line": f'qemu-io -d "{path}" "{command}"'}
            )
            printed = self._printed_since(before)
            deadline = asyncio.get_running_loop().time() + _IO_LIMIT
            while command.startswith("aio_") and not (refused or _is_whole(printed)):
                if asyncio.get_running_loop().time() > deadline:
                    raise StalledError(f"{command} on {path} did not end for {_IO_LIMIT:g} s")
                await asyncio.sleep(_POLL)
                printed = self._printed_since(before)
        done = re.search(r"^(?:wrote|read|discard) (\d+)/(\d+) bytes", printed, re.MULTILINE)
        failed = done is None or done[1] != done[2] or "verification failed" in printed
        if refused or (failed and (command != "flush" or printed)):
            said = (str(refused) + printed).strip()
            raise CommandError("qemu-io", {"path": path, "command": command}, "I/O error", said)
        return printed

    def _printed_since(self, position: int) -> str:
        with self._stdout.open("rb") as file:
            file.seek(position)
            return file.read().decode(errors="replace")

    async def qom_path(self, disk: BuiltDisk) -> str:
        """Return the QOM path of the guest device's block backend.

        A device with an id is found by it; those without follow in the order of attachment.
        """
        # A tray that is empty has no `inserted`.
        blocks = [
            entry for entry in await self._monitor.execute("query-block") if entry.get("inserted")
        ]
        rest = []
        for candidate in self._disks:
            name = candidate.spec.attach.id
            own = [entry for entry in blocks if name is not None and _belongs(entry, name)]
            if not own:
                rest.append(candidate.spec.name)
                continue
            blocks.remove(own[0])
            if candidate.spec.name == disk.spec.name:
                return _absolute(own[0]["qdev"])
        return _absolute(blocks[rest.index(disk.spec.name)]["qdev"])


def _aio(operation: Operation) -> str:
    """Return the qemu-io command that is safe on a running VM.

    QEMU 7.2's `write -z` polls the wrong context on a device in an iothread, and aborts
    (aio_poll: in_aio_context_home_thread); `aio_write -z` does not.
    """
    command = qemu_io_command(operation)
    return f"aio_{command}" if operation.verb == "zero" else command


def _is_whole(printed: str) -> bool:
    """Whether an `aio_...` command has said all: of a success two lines, which come apart."""
    lines = 2 if re.search(r"^(?:wrote|read|discard) ", printed, re.MULTILINE) else 1
    return printed.endswith("\n") and printed.count("\n") >= lines


def _belongs(entry: dict[str, Any], device_id: str) -> bool:
    qdev = str(entry.get("qdev", ""))
    return (
        qdev == device_id
        or qdev.startswith(f"/machine/peripheral/{device_id}/")
        or entry.get("device") == device_id
    )


def _absolute(qdev: str) -> str:
    return qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
