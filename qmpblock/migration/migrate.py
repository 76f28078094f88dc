"""One live migration, from its look to its last trace; and the way back from each of its phases.

::

    checked     locks at both sides; nothing has begun
    mirroring   disks are copied; they follow the guest
    ready       every disk is as far as the guest
    memory      QEMU migrates; the guest runs at the source
    held        the guest stands; QEMU waits for us
    ended       the mirrors have ended: both sides' disks are the same
    sent        no export is left; QEMU sends the rest
    landed      the source says completed, the destination has all and stands
    handed      the arbiter says "destination": the guest runs there

Until `landed` the source owns the guest, and it goes on there by itself, or is made to, whatever
fails; the destination was started with -S, so it never runs by itself. In `landed` both stand, and
the arbiter (`qmpblock.migration.arbiter`) is what decides, once. From `handed` on there is no way
back. The guest stands from just before `held` on, no longer than `STANDSTILL`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from qmpblock.cancellation import undisturbed
from qmpblock.errors import UNTOUCHED, Error, RequestError
from qmpblock.migration.diskterms import Allocation, DiskTerms, Layers
from qmpblock.migration.homeward import Homeward
from qmpblock.migration.job import MigrationJob
from qmpblock.migration.look import look
from qmpblock.migration.means import MigrationMeans
from qmpblock.migration.outward import Outward
from qmpblock.migration.passage import Passage
from qmpblock.migration.way import check_seen, way_over
from qmpblock.qemu.feed import working

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["migrate"]


@asynccontextmanager
async def migrate(
    source: Connection,
    destination: Connection,
    *,
    memory_only: bool = False,
    speed: int = 0,
    quit_source: bool = False,
    means: MigrationMeans | None = None,
    storage_daemon: bool = False,
    over: str | None = None,
    layers: Layers = "all",
    same_backing: bool = False,
    allocation: Allocation = "thin",
) -> AsyncIterator[MigrationJob]:
    """Have the guest of `source` go on in `destination`, with its disks, while it runs.

    `async with qmpblock.migrate(source, destination) as job:` begins; leaving waits for the end.
    Iterating over `job` yields its progress; `job.result` says what it came to.

    The destination is a QEMU with the same machine and devices, images of its own of the same
    sizes, and `-S -incoming defer`. Its images are overwritten. Never do both run, and the guest
    stands for tens of milliseconds, ten seconds at most: then it goes on at the source.

    Cancelled or failed before the guest is there, it goes on at the source, where nothing is left.
    A destination that was sent anything by then is ended (`quit`); else it waits as before. Once
    the guest is there a cancellation is raised when all is cleaned up, and `job.result` is set.

    :param source: a `VM` by its UNIX monitor, on this host; `destination`: another, likewise, or on
        another host (`ssh://...`).
    :param memory_only: the disks are shared storage: both sides' images are the same files.
    :param speed: bytes a second at most, of all disks, and again of the memory; 0: of the disks no
        limit, of the memory what the VM's migration parameters say.
    :param quit_source: end the source's QEMU when the guest is gone; else it stays, `postmigrate`,
        with an object that says so (`qmpblock-RUN-handover`).
    :param means: what may be done to a busy guest for it to end; None: nothing. Each is said in
        `job.notices` before it takes effect.
    :param storage_daemon: have a `qemu-storage-daemon` on the destination's host, this one or one
        that ssh reaches, hold its images while they are mirrored, not the destination itself. Where
        it fails then on this host, before the mirrors are ended, they stay at the source, paused:
        the next migration to a destination with the same images goes on with them.
    :param over: how disks and memory go: `nbds://HOST[:PORT]` by TCP with TLS, to where the
        destination's QEMU is to listen, each VM with the `tls_creds` that it was connected with;
        `nbd://` without TLS, where both are `insecure`. None: as the monitors do.
    :param layers: what is copied of a disk: `all` that it holds; or of a chain the active layer
        alone (`top`), onto an empty image that lies on the very same backing image.
    :param same_backing: the caller's word that what those images lie on holds what the disks lie
        on, where other files do, or files that cannot be seen from here.
    :param allocation: what has host space at the destination: data alone (`thin`); every byte
        (`full`), of which a qcow2 image has to have it already; or what has it at the source
        (`same`).
    :raise RequestError: the VMs are no such pair; nothing was touched.
    :raise UnsupportedError: likewise; or a storage daemon is not here, or cannot have an image.
    :raise BusyError: a job, or another controller, is at work on a disk.
    :raise JobError: a disk could not be mirrored; the guest is at the source.
    :raise StalledError: nothing moved, or the guest outran it; the guest is at the source.
    :raise Error: the migration failed, in QEMU's words; the guest is at the source, or the error
        says where.
    """
    means = MigrationMeans() if means is None else means
    means.check()
    terms = DiskTerms(not memory_only, layers, same_backing, allocation)
    terms.check()
    if over is not None and storage_daemon:
        raise RequestError("a storage daemon serves by no TCP", standing=UNTOUCHED)
    if memory_only and means.write_blocking_after:
        raise RequestError("no disk is copied whose writes could wait", standing=UNTOUCHED)
    way = None if over is None else way_over(over, source.nbd, destination.nbd)
    check_seen(terms, way)
    plan = await look(source, destination, terms, over=way)
    job = MigrationJob(plan.warnings)
    passage = await Passage.of(
        source, destination, plan, job, means, speed=speed, storage_daemon=storage_daemon, over=way
    )
    outward = Outward(passage)
    try:
        await passage.begin()
        async with (
            _there_or_home(passage, outward, quit_source=quit_source),
            working(outward.go(), job),
        ):
            yield job
    finally:
        job.end()


@asynccontextmanager
async def _there_or_home(
    passage: Passage, outward: Outward, *, quit_source: bool
) -> AsyncIterator[None]:
    """Clean up where the guest is there; where the body failed before that, have it stay."""
    try:
        try:
            yield
        except BaseException as error:
            if not passage.job.gone_over:
                await undisturbed(Homeward(passage).go(error))
                raise
            await undisturbed(outward.finish(quit_source=quit_source))
            if isinstance(error, Error):
                passage.say_handed(error)
            raise
        await undisturbed(outward.finish(quit_source=quit_source))
    finally:
        await undisturbed(passage.close())
