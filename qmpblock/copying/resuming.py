"""Going on from a copy that was broken off: what it has not, or has otherwise, is copied, no more.

Nothing is believed of what is there: after a crash no bitmap of QEMU's tells what it holds (F25),
and the guest has gone on. So there is a new point in time, and the copy will be of that::

    point     taken as for any copy of the start; QEMU has the target open
    compare   the point's export with the target's, block by block, in bounded memory; what both
              say that it reads as zeros is not read
    draw      the unequal blocks, as a dirty bitmap of the point's
    copy      a backup job of what the bitmap says

Both are read by QEMU, so that a target may be whatever it can open: encrypted, a block device, or
over a wire.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from qmpblock.copying.comparing import find_unequal
from qmpblock.copying.copytarget import Left
from qmpblock.copying.drawn import draw
from qmpblock.copying.meter import DiskMeters
from qmpblock.copying.targetfile import TargetFile
from qmpblock.copying.windows import CONTEXT
from qmpblock.copying.wiretarget import bounded
from qmpblock.errors import (
    UNTOUCHED,
    Error,
    NBDRequestError,
    UnsupportedError,
    printable,
)
from qmpblock.export.session import Request, exports

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.copying.job import CopyJob
    from qmpblock.copying.plan import CopyPlan
    from qmpblock.nbd import Client
    from qmpblock.qemu.connection import Connection
    from qmpblock.qemu.job import Progress
    from qmpblock.ranges import Ranges

__all__ = ["check_target", "find_left", "give_up", "note_kept", "say_kept"]

_PHASE = "comparing"


def check_target(plan: CopyPlan) -> None:
    """Refuse to go on where nothing tells what is there.

    :raise UnsupportedError: an image was to be where no file is: any could be, or the rest of one.
    """
    if not plan.can_be_resumed:
        raise UnsupportedError(
            f"a {plan.format} copy on {printable(plan.file)} is not gone on from: nothing there "
            "tells that what looks like an image is one that was begun for this disk",
            standing=UNTOUCHED,
            remedy="leave --resume out, which makes it anew; or make the copy raw",
        )


async def find_left(
    vm: Connection, targets: Sequence[CopyTarget], job: CopyJob, *, held: bool
) -> None:
    """Find what each target that is resumed has not, or has otherwise: it is its `left` then.

    The points are there, as the targets' `source`, and QEMU has the targets open; nothing uses
    them. Cancelling stops at once; whoever ends the change removes what was added.

    :param job: is told how far it is.
    :param held: whether QEMU refuses to migrate meanwhile.
    :raise NBDError: one cannot be read; or the point cannot, which was given up.
    """
    resumed = [target for target in targets if target.resumed]
    if not resumed:
        return
    sizes = {target.plan.device.name: target.plan.size for target in resumed}
    meters = DiskMeters(_PHASE, sizes, job)
    for target in resumed:
        tell = meters.of(target.plan.device.name)
        unequal = await _compared(vm, target, tell, job, held=held)
        target.left = Left(unequal.total, target.plan.size)
        await draw(vm, target, unequal, held=held)


async def _compared(
    vm: Connection,
    target: CopyTarget,
    tell: Callable[[Progress], None],
    job: CopyJob,
    *,
    held: bool,
) -> Ranges:
    try:
        async with _exported(vm, target, held=held) as (point, there):
            return await find_unequal(point, there, progress=tell, turn=job.turn)
    except NBDRequestError as error:
        error.message = f"what is there cannot be compared with its disk: {error.message}"
        error.remedy = (
            "where the point had to be given up, because what the guest overwrote had no room, "
            "give it more (--fleece DIRECTORY); if not, look at the storage of the disk and of "
            f"{printable(target.path)}"
        )
        raise


@asynccontextmanager
async def _exported(
    vm: Connection, target: CopyTarget, *, held: bool
) -> AsyncIterator[tuple[Client, Client]]:
    """Yield clients of the point and of the target; no server is waited for at either end."""
    requests = [Request(node, (CONTEXT,)) for node in (target.source, target.node)]
    async with AsyncExitStack() as stack:
        with bounded([target]):
            point, there = await stack.enter_async_context(
                exports(
                    *(vm.monitor, target.plan.device, requests),
                    access=vm.nbd,
                    stall=vm.stall,
                    held=held,
                )
            )
        try:
            yield point, there
        except BaseException:
            target.cut()  # or ending the exports would wait for what it was asked
            raise
        with bounded([target]):
            await stack.aclose()


# -- a copy that failed


async def give_up(targets: Sequence[CopyTarget], job: CopyJob) -> None:
    """Leave of a copy that failed what another one can go on from.

    Nobody uses the targets any more.

    :param job: has it as `kept`.
    """
    job.kept = tuple([left for target in targets if (left := await target.remove()) is not None])


def note_kept(targets: Sequence[CopyTarget], job: CopyJob) -> None:
    """Have a job say what was kept of a copy that failed, by whoever undid it."""
    kept = [file.left_over for file in targets if isinstance(file, TargetFile)]
    job.kept = tuple(path for path in kept if path is not None)


def say_kept(error: Error, job: CopyJob) -> None:
    """Have an error that ended a copy say what was left by `give_up`, if anything was."""
    said = job.kept_words
    if said:
        error.standing = said if error.standing is None else f"{error.standing}; {said}"
