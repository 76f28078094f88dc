"""Disks of the guest that another process serves: QEMU has no block node of them.

A vhost-user device shares the guest's memory with a storage daemon, SPDK or the like, which does
the guest's I/O by itself; a vhost-scsi device does so with the host's kernel. Their images are
open there, so nothing that we could ask or tell this QEMU concerns them. They are found in the
tree of the VM's devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from qmpblock.errors import UNTOUCHED, CommandError, UnsupportedError, printable
from qmpblock.host.processes import command_line
from qmpblock.qemu.monitor import Monitor

__all__ = ["ServedDisk", "check_served_here", "disks_served_elsewhere", "socket_of"]

_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon")
_DRIVERS = ("vhost-user-blk", "vhost-user-scsi", "vhost-scsi")


@dataclass(frozen=True)
class ServedDisk:
    """A guest device whose images another process has.

    :ivar id: its qdev id, or None.
    :ivar driver: of the device (`vhost-user-blk-pci`).
    :ivar socket: by which that process is reached; None for the kernel, or where QEMU does not
        tell.
    """

    id: str | None
    qom_path: str
    driver: str
    socket: str | None

    @property
    def name(self) -> str:
        """What a person calls it: its qdev id, else its QOM path."""
        return self.id or self.qom_path

    def where(self) -> str:
        """Say who serves it."""
        if self.driver.startswith("vhost-scsi"):
            return "the host's kernel"
        return f"the process behind {printable(self.socket or 'a socket that QEMU does not name')}"


async def disks_served_elsewhere(monitor: Monitor) -> tuple[ServedDisk, ...]:
    """Return the guest's disks of which this QEMU has no block node. Only queries."""
    served = []
    chardevs: dict[str, str] | None = None
    for container in _CONTAINERS:
        for item in await monitor.execute("qom-list", {"path": container}):
            driver = str(item["type"]).removeprefix("child<").removesuffix(">")
            if not driver.startswith(_DRIVERS):
                continue
            path, name = f"{container}/{item['name']}", str(item["name"])
            if chardevs is None:
                chardevs = {
                    str(one["label"]): str(one["filename"])
                    for one in await monitor.execute("query-chardev")
                }
            try:
                label = await monitor.execute("qom-get", {"path": path, "property": "chardev"})
            except CommandError:
                label = ""  # vhost-scsi has none
            socket = socket_of(str(label), chardevs, command_line(monitor.peer_pid))
            named = name if container == _CONTAINERS[0] else None
            served.append(ServedDisk(named, path, driver, socket))
    return tuple(served)


def socket_of(label: str, chardevs: dict[str, str], arguments: tuple[str, ...]) -> str | None:
    """Return the path of a chardev's socket. Pure.

    :param chardevs: QEMU's descriptions, by label. Of a socket that it connected to, 7.2 leaves
        the path out; then its command line has it, if that is where the chardev came from.
    """
    path = chardevs.get(label, "").removeprefix("unix:").partition(",")[0]
    if path:
        return path
    for option, value in pairwise(arguments):
        if option.lstrip("-") == "chardev":
            options = dict(_options(value))
            if label and options.get("id") == label:
                return options.get("path")
    return None


def _options(value: str) -> Iterator[tuple[str, str]]:
    for part in value.replace(",,", "\0").split(","):
        key, _, text = part.partition("=")
        yield key, text.replace("\0", ",")


async def check_served_here(monitor: Monitor, name: str) -> None:
    """Refuse a disk that this QEMU knows, but does not serve.

    :param name: which no disk of this QEMU has.
    :raise UnsupportedError: such a one goes by it.
    """
    for disk in await disks_served_elsewhere(monitor):
        if name in (disk.name, disk.qom_path):
            raise UnsupportedError(
                f"{printable(name)} is a {printable(disk.driver)}: {disk.where()} has its images "
                "and does the guest's I/O, and this QEMU has no block node of it",
                standing=UNTOUCHED,
                remedy="work on its images by the means of that process (of a "
                "qemu-storage-daemon: its own monitor)",
            )
