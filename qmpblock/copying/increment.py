"""What an increment holds: what dirty bitmaps of the disk say, as one of what is copied.

They go on recording, and by now they may have more than was written before the instant that is
copied: that is copied too, as it was then, which is what the image below has already. So nothing
has to be taken at that very instant, and nothing is cleared: a copy that fails has cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmpblock.copying.comparing import GRAIN
from qmpblock.errors import CommandError, GraphError
from qmpblock.names import left_bitmap
from qmpblock.qemu.refusals import not_found

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.qemu.connection import Connection

__all__ = ["draw_increments"]


async def draw_increments(vm: Connection, targets: Sequence[CopyTarget]) -> None:
    """Have the bitmap of each target that is an increment say what it is to hold.

    The instant has passed: what was written before it is in the bitmaps.

    :raise GraphError: one is not there: somebody has changed the disk since it was looked at.
    """
    for target in targets:
        plan = target.plan
        if plan.since is None:
            continue
        node, name = plan.device.chain.active.node.name, left_bitmap(target.node)
        made = {"name": name, "granularity": GRAIN, "disabled": True}
        await vm.monitor.execute("block-dirty-bitmap-add", {"node": target.source, **made})
        every = [{"node": node, "name": one} for one in plan.since.bitmaps]
        try:
            await vm.monitor.execute(
                "block-dirty-bitmap-merge",
                {"node": target.source, "target": name, "bitmaps": every},
            )
        except CommandError as error:
            if not not_found(error):
                raise
            raise GraphError(
                f"the dirty bitmap of what the copy of {plan.device.name} is to lie on is not on "
                "its active layer any more: somebody took a snapshot, or removed it",
                remedy="make the backup again: of that disk it will be full",
            ) from error
        target.bitmap = name
