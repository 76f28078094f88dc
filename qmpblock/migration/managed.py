"""A VM whose manager migrates it: refused, with what is to be done by the manager's own means.

libvirt copies disks into images that are there already, under the same names (virsh(1),
`--copy-storage-all`, `--copy-storage-inc`). So the commands that make them are said, too, for these
disks, and those by which it is seen what came of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpblock.chains.owner import is_asked
from qmpblock.errors import Error, UnsupportedError, shell_words
from qmpblock.managers import Work
from qmpblock.migration.diskterms import DiskTerms
from qmpblock.qemu import ownership

if TYPE_CHECKING:
    from qmpblock.graph.model import BlockGraph
    from qmpblock.qemu.connection import Connection

__all__ = ["Going", "Leaving", "ask_manager", "by_virsh"]

_FORMATS = ("qcow2", "raw")  # of what is made by a name, a format and a size alone
_ALLOCATE = ("qmpblock", "allocate")
_LONGEST = 4096  # bytes of a path
_THERE = "THERE"  # for where the destination's files are seen here


@dataclass(frozen=True)
class Going:
    """One disk that libvirt would copy.

    :ivar name: what libvirt calls it.
    :ivar file: of its active layer; `format` and `size`, in bytes, of that.
    :ivar below: file and format of each layer that it lies on, the next one first.
    """

    name: str
    file: str
    format: str
    size: int
    below: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Leaving:
    """A domain that libvirt would migrate.

    :ivar disks: that are written to.
    :ivar stays: whether libvirt knows it, too, when it does not run.
    """

    name: str
    disks: tuple[Going, ...]
    stays: bool


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
        if is_asked(vm) and (leaving := await _leaving(vm, graph)) is not None:
            error.remedy = by_virsh(leaving, terms, tls=tls)
        raise


async def _leaving(vm: Connection, graph: BlockGraph) -> Leaving | None:
    """Return the domain, as far as a command makes images for all of its disks."""
    try:
        known = await vm.monitor.through(lambda lender: lender.targets())
        _, later = await vm.monitor.through(lambda lender: lender.files())
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
        under = tuple((layer.file, layer.format) for layer in below)
        size = disk.chain.active.size
        going.append(Going(names[str(disk.id)], active.file, active.format, size, under))
    domain = (await vm.monitor.execute("query-name")).get("name", "")
    return Leaving(str(domain) or "DOMAIN", tuple(going), stays=later is not None)


def by_virsh(domain: Leaving, terms: DiskTerms, *, tls: bool = False) -> str:
    """Say by which commands libvirt migrates a domain, and what came of it is seen. Pure.

    :param terms: what is to be had of the disks.
    """
    copied = domain.disks if terms.copies else ()
    top = terms.layers == "top" and any(one.below for one in copied)
    address = f"libvirt:{domain.name}"
    steps: list[tuple[str, Sequence[str]]] = []
    if top:
        below = dict.fromkeys(layer for one in copied for layer in one.below)
        what = f"what lies below is at the destination, as here ({_THERE} leads to its files)"
        steps.append((what, [_verify(file, fmt) for file, fmt in below]))
    if copied:
        what = "at the destination, where no file of these names is yet"
        steps.append((what, [_create(one, terms, top=top) for one in copied]))
    steps.append(("here", [_migrate(domain, copied, top=top, tls=tls)]))
    if copied and terms.allocation == "full":
        what = "then there, for libvirt gives host space to data alone"
        steps.append((what, [_line(*_ALLOCATE, address, one.name, "--full") for one in copied]))
    seen = [_line("virsh", "domblklist", domain.name), _line("qmpblock", "disks", address)]
    steps.append(("then there, to see it", seen))
    if copied:
        what = "for a proof of what the disks hold, have --suspend in virsh migrate; then there"
        steps.append((what, [f"{_line('virsh', 'save', domain.name)} STATE"]))
        what = f"here, where {_THERE} leads to the destination's files"
        steps.append((what, [_verify(one.file, one.format) for one in copied]))
        steps.append(("and there, to have the guest go on", ["virsh restore STATE --running"]))
    return "\n".join(f"{what}:\n  " + "\n  ".join(commands) for what, commands in steps)


def _migrate(domain: Leaving, copied: Sequence[Going], *, top: bool, tls: bool) -> str:
    words = ["virsh", "migrate", "--live"]
    if domain.stays:  # else it could be started here again, from what has grown stale
        words += ["--persistent", "--undefinesource"]
    if copied:
        words.append("--copy-storage-inc" if top else "--copy-storage-all")
        words += ["--migrate-disks", ",".join(one.name for one in copied)]
    if tls:
        words.append("--tls")
    return f"{_line(*words, domain.name)} DESTURI"


def _create(disk: Going, terms: DiskTerms, *, top: bool) -> str:
    words = ["qemu-img", "create", "-f", disk.format]
    if terms.allocation == "full" and disk.format != "raw":  # of which libvirt takes it away again
        words += ["-o", "preallocation=falloc"]
    if top and disk.below:
        file, fmt = disk.below[0]
        words += ["-b", file, "-F", fmt]
    return _line(*words, disk.file, str(disk.size))


def _verify(file: str, fmt: str) -> str:
    formats = ("--format", fmt, "--second-format", fmt)
    return _line("qmpblock", "verify", file, f"{_THERE}{file}", *formats)


def _line(*words: str) -> str:
    return shell_words(words)
