"""One overlay: its file, its header, its nodes, made by us; and several taken at one point.

The overlays are made by us, owner and mode as the active image's, so that QEMU has the right
to open them, and it only opens them; why, and what is done where we cannot, is in
`qmpblock.chains.headers`.

For each disk, then for all at once::

    header    in memory; backing name and format explicit, as asked
    file      without a name yet (O_TMPFILE), as it gets that header, and as its record in the
              journal is fsynced; then linked, whole, and fsynced with its directory
    node      of the overlay, with no backing: the recorded one is never opened a second time
    bitmaps   that record in the active layer go on in the overlay
    snapshot  one transaction: bitmaps and overlays of every disk, or nothing
"""

from __future__ import annotations

import errno
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpblock import luks
from qmpblock.cancellation import undisturbed
from qmpblock.chains.headers import CLUSTER, Header, by_qemu_img, make
from qmpblock.chains.look import unless_changed
from qmpblock.chains.plan import SnapshotPlan
from qmpblock.chains.storedbitmaps import check_opened_anew
from qmpblock.changes.backingproof import check_made, check_name
from qmpblock.changes.change import Change
from qmpblock.changes.record import Record
from qmpblock.errors import (
    UNTOUCHED,
    CommandError,
    Error,
    JobError,
    RequestError,
    printable,
)
from qmpblock.export.session import Request, exports
from qmpblock.graph.options import aio_of, cache_options, overlay_options
from qmpblock.graph.places import FileId
from qmpblock.host import imagefiles
from qmpblock.host.contents import Contents
from qmpblock.host.openfiles import OpenFiles
from qmpblock.host.ourfiles import Directory
from qmpblock.host.processes import command_line
from qmpblock.qemu.job import Job
from qmpblock.qemu.refusals import no_file, wrong_key

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = [
    "Item",
    "make_file",
    "make_header",
    "make_overlay",
    "open_directory",
    "prove",
    "take",
]

_EMPTY_FILE = {"driver": "file", "size": 0}
_BLOCK = 4096  # bytes


@dataclass(frozen=True)
class Item:
    """One overlay that is to be made.

    :ivar file: where; `node` and `storage`: what its nodes are called.
    :ivar job: the id of the job that writes its header, where QEMU itself does.
    :ivar cluster: of the overlay, in bytes.
    :ivar local: whether a file made here is there for QEMU.
    :ivar directory: in which it is made, where it is made here.
    :ivar discard: what the guest's discards do to it.
    """

    plan: SnapshotPlan
    file: str
    node: str
    storage: str
    job: str
    backing_name: str
    cluster: int = CLUSTER
    local: bool = True
    discard: str = "unmap"
    directory: Directory | None = None

    def header(self, fmt: str) -> Header:
        """Return what the overlay is to be."""
        return Header(
            fmt,
            self.plan.active.size,
            (self.backing_name, self.plan.active.format),
            self.cluster,
            self.plan.key_secret,
        )

    def node_options(self, backing: str | None, fmt: str = "qcow2") -> dict[str, Any]:
        """Return the whole description of the overlay's node: blockdev-reopen forgets the rest.

        :param backing: the node that it lies on; None for none.
        """
        return overlay_options(
            self.node,
            self.storage,
            self.plan.active.node,
            self.plan.key_secret,
            backing,
            fmt,
            self.discard,
        )


async def make_overlay(
    vm: Connection, change: Change[Record], item: Item, fmt: str, *, local: bool
) -> None:
    """Make one overlay's file, header and node; it lies on nothing yet.

    :param local: whether QEMU sees the same files as this process.
    :raise UnsupportedError: see `check_opened_anew`.
    """
    execute = vm.monitor.execute
    plan, header = item.plan, item.header(fmt)
    await check_opened_anew(vm.monitor, plan.active, item.storage)
    ours = await by_qemu_img(vm, plan.key_secret, local=local)
    contents = await make(vm, header) if ours else Contents(0, ())
    if local:
        made = make_file(change, item, contents)
    else:
        await _have_file_made(vm, item, _whole_blocks(contents.length))
    storage: dict[str, Any] = {
        "driver": "file",
        "node-name": item.storage,
        "filename": item.file,
        "discard": "unmap",
        "cache": cache_options(plan.active.node),
    }
    if plan.active.storage is not None:
        aio = aio_of(command_line(vm.monitor.peer_pid), plan.active.storage)
        if aio is not None:
            storage["aio"] = aio
    await execute("blockdev-add", storage)
    if not ours:
        await _create(vm, item, header)
    elif not local:
        await _send(vm, item, contents)
    if local:
        _sync(item, made)
    assert change.journal is not None  # begin() wrote it
    change.journal.add(created=item.file, format=fmt)
    try:
        await execute("blockdev-add", item.node_options(None, fmt))
    except CommandError as error:
        if ours and plan.key_secret is not None and wrong_key(error):
            error.remedy = (
                f"the secret object {printable(plan.key_secret)} tells of another key than QEMU "
                "holds: its file was changed since. Write the VM's own key into it"
            )
        raise


async def prove(vm: Connection, change: Change[Record], items: list[Item]) -> None:
    """See, at the last moment, that overlays are ours and that their headers lead back.

    :raise Error: somebody has changed files meanwhile; nothing final was done.
    """
    graph = await vm.graph()
    files = OpenFiles(vm.monitor.peer_pid)
    places = files.places(graph.nodes.values())
    made = change.journal.made() if change.journal is not None else {}
    for item in items:
        check_name(files, places, item.backing_name, item.file, item.plan.active)
        check_made(places.get(item.storage), item.file, made.get(item.file))


async def _create(vm: Connection, item: Item, header: Header) -> None:
    """Have QEMU write a header."""

    async def attempt() -> None:
        if header.key_secret is not None:  # what an attempt left is half a header
            await _run_create(vm, item.job, {**_EMPTY_FILE, "filename": item.file})
        await _run_create(vm, item.job, header.job(item.storage))

    await luks.retried(attempt)


async def _run_create(vm: Connection, job_id: str, options: dict[str, Any]) -> None:
    job = Job(vm.monitor, job_id, "create")
    try:
        await vm.monitor.execute("blockdev-create", {"job-id": job_id, "options": options})
        error = await undisturbed(job.wait_concluded())
        await job.dismiss()
    finally:
        job.end()
    if error is not None:
        raise JobError(job_id, "create", error)


async def make_header(vm: Connection, change: Change[Record], item: Item, fmt: str) -> None:
    """Make one overlay's file, whole and on stable storage, for whoever has QEMU open it."""
    _sync(item, make_file(change, item, await make(vm, item.header(fmt))))
    assert change.journal is not None  # begin() wrote it
    change.journal.add(created=item.file, format=fmt)


def make_file(change: Change[Record], item: Item, contents: Contents) -> FileId:
    """Make the overlay's file, in such an order that it is never there unrecorded.

    It has the owner and the mode of the active image, so that QEMU can open it. Where the file
    system allows it, it is never there half-written either.

    :return: which one it is.
    """
    assert change.journal is not None  # begin() wrote it
    assert item.directory is not None  # it is made here
    journal, files = change.journal, list[FileId]()

    def record(made: FileId) -> None:
        files.append(made)
        journal.add(made=item.file, dev=made.device, ino=made.inode)

    like = imagefiles.status_of(change.vm.monitor.peer_pid, item.plan.active)
    try:
        os.close(item.directory.make(Path(item.file).name, record, contents.write_to, like=like))
    except OSError as error:
        raise _cannot_make(Path(item.file), error) from None
    return files[0]


def open_directory(file: str) -> Directory:
    """Open the directory in which a file is to be made.

    :raise Error: it cannot be opened.
    """
    try:
        return Directory(posixpath.dirname(file))
    except OSError as error:
        raise _cannot_make(Path(file), error, standing=UNTOUCHED) from None


def _cannot_make(path: Path, error: OSError, *, standing: str | None = None) -> Error:
    if error.errno == errno.EEXIST:
        return RequestError(f"{printable(path)} exists already; an overlay is always a new file")
    return Error(f"cannot make {printable(path)}: {error.strerror}", standing=standing)


async def _have_file_made(vm: Connection, item: Item, size: int) -> None:
    """Have QEMU make the file on its host, if there is none: creating would empty it."""
    probe = {"driver": "file", "node-name": item.storage, "filename": item.file}
    try:
        await vm.monitor.execute("blockdev-add", {**probe, "read-only": True})
    except CommandError as error:
        if not no_file(error):
            raise
    else:
        await vm.monitor.execute("blockdev-del", {"node-name": item.storage})
        raise RequestError(
            f"{printable(item.file)} exists already on the VM's host; an overlay is always a new "
            "file"
        )
    await _run_create(vm, item.job, {**_EMPTY_FILE, "filename": item.file, "size": size})


async def _send(vm: Connection, item: Item, contents: Contents) -> None:
    """Write an image into its file on the VM's host."""
    request = Request(item.storage, (), writable=True)
    async with exports(vm.monitor, None, [request], access=vm.nbd, stall=vm.stall) as (client,):
        for at, data in contents.pieces:  # each begins at a page of memory
            await client.write(at, data.ljust(_whole_blocks(len(data)), b"\0"))
        await client.flush()


def _whole_blocks(length: int) -> int:
    """Round up to what any storage can write."""
    return -(-length // _BLOCK) * _BLOCK


def _sync(item: Item, made: FileId) -> None:
    assert item.directory is not None  # it is made here
    try:
        fd = item.directory.open(Path(item.file).name, made)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        item.directory.sync()
    except OSError as error:
        raise Error(f"cannot write {printable(item.file)}: {error.strerror}") from None


async def take(vm: Connection, items: list[Item]) -> None:
    """Have every disk go on in its overlay, at one point, or none.

    :raise GraphError: somebody else has changed a chain meanwhile.
    """
    actions: list[dict[str, Any]] = []
    for item in items:
        actions += [
            {
                "type": "block-dirty-bitmap-add",
                "data": {
                    "node": item.node,
                    "name": bitmap.name,
                    "granularity": bitmap.granularity,
                    "persistent": bitmap.persistent,
                },
            }
            for bitmap in item.plan.bitmaps
        ]
    for item in items:
        data = {"node": item.plan.active.node.name, "overlay": item.node}
        actions.append({"type": "blockdev-snapshot", "data": data})
    async with unless_changed(vm, [item.plan.device for item in items]):
        await vm.monitor.execute("transaction", {"actions": actions})
