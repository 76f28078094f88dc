"""A VM whose manager migrates it: refused, with what is to be done by the manager's own means.

libvirt copies disks into images that are there already, under the same names (virsh(1),
`--copy-storage-all`, `--copy-storage-inc`): the commands that make them are said, too, for these
disks.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpblock.chains.owner import is_asked
from qmpblock.errors import Error, UnsupportedError, printable
from qmpblock.managers import Work
from qmpblock.migration.diskterms import DiskTerms
from qmpblock.qemu import ownership

if TYPE_CHECKING:
    from qmpblock.graph.model import BlockGraph
    from qmpblock.qemu.connection import Connection

__all__ = ["Going", "ask_manager", "virsh_migrate"]

_FORMATS = ("qcow2", "raw")  # of what is made by a name, a format and a size alone


@dataclass(frozen=True)
class Going:
    """One disk that libvirt would copy.

    :ivar name: what libvirt calls it.
    :ivar file: of its active layer; `format` and `size`, in bytes, of that.
    :ivar backing: file and format of what it lies on; None where it lies on nothing.
    """

    name: str
    file: str
    format: str
    size: int
    backing: tuple[str, str] | None = None


async def ask_manager(vm: Connection, terms: DiskTerms, *, tls: bool = False) -> None:
    """Go on only where nobody else owns the chains of the VM that is to be migrated.

    :param tls: whether it was to go by TLS.
    :raise UnsupportedError: somebody does; what does it by his own means.
    """
    graph = await vm.graph()
    disks = graph.disks()
    first = disks[0].chain.active.file if disks else ""
    try:
        await ownership.ask_for_change(vm, Work("migrate", first), graph)
    except UnsupportedError as error:
        if is_asked(vm) and (going := await _going(vm, graph)) is not None:
            domain = (await vm.monitor.execute("query-name")).get("name", "")
            error.remedy = virsh_migrate(str(domain), going, terms, tls=tls)
        raise


async def _going(vm: Connection, graph: BlockGraph) -> list[Going] | None:
    """Return the disks that are written to, as far as a command makes images for all of them."""
    try:
        known = await vm.monitor.through(lambda lender: lender.targets())
    except Error:
        return None  # the command without them is said
    names = {device: name for name, device in known.items()}
    going = []
    for disk in graph.disks():
        if disk.read_only:
            continue
        active, *below = disk.chain.layers
        plain = active.format in _FORMATS and not active.node.encrypted
        if not plain or disk.id not in names or not active.file.startswith("/"):
            return None
        backing = (below[0].file, below[0].format) if below else None
        size = disk.chain.active.size
        going.append(Going(names[str(disk.id)], active.file, active.format, size, backing))
    return going


def virsh_migrate(
    domain: str, disks: Sequence[Going], terms: DiskTerms, *, tls: bool = False
) -> str:
    """Say by which commands libvirt migrates a domain. Pure.

    :param disks: that are written to.
    :param terms: what is to be had of the disks.
    """
    words = ["virsh", "migrate", "--live"]
    made = ""
    if terms.copies and disks:
        top = terms.layers == "top" and any(one.backing for one in disks)
        words.append("--copy-storage-inc" if top else "--copy-storage-all")
        words += ["--migrate-disks", ",".join(one.name for one in disks)]
        lines = "; ".join(_create(one, terms, top=top) for one in disks)
        made = f"at the destination, where no file of these names is: {lines}; then "
    if tls:
        words.append("--tls")
    said = " ".join(shlex.quote(printable(word)) for word in [*words, domain or "DOMAIN"])
    return f"{made}{said} DESTURI"


def _create(disk: Going, terms: DiskTerms, *, top: bool) -> str:
    words = ["qemu-img", "create", "-f", disk.format]
    if terms.allocation == "full":
        words += ["-o", "preallocation=falloc"]
    if top and disk.backing is not None:
        file, fmt = disk.backing
        words += ["-b", file, "-F", fmt]
    return " ".join(shlex.quote(printable(word)) for word in [*words, disk.file, str(disk.size)])
