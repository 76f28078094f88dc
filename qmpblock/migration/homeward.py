"""The way home: the guest goes on at the source, from whatever phase. It is not interrupted.

::

    a destination that does not answer: every wire is cut first (K32)
    a storage daemon is ended: what it holds is of no use any more
    a guest that the migration paused goes on, as soon as that is over
    memory ...   the stream is cut, and migrate_cancel where the guest is held for us (K35), until
                 the guest runs; of a source that says completed: the arbiter,
                 "source", then cont
    mirroring .. mirrors cancelled, the destination's exports ended (K1), nodes and locks removed;
                 or, with a storage daemon, kept for another attempt (`qmpblock.migration.kept`)
    the destination is as it was; or is ended (quit), where it was sent anything
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from qmpblock.copying.wire import hold_of
from qmpblock.errors import CommandError, DisconnectedError, Error, StalledError, shell_words
from qmpblock.migration import arbiter, wayback
from qmpblock.migration.passage import HANDED
from qmpblock.migration.states import Phase, Side
from qmpblock.migration.stream import OVER
from qmpblock.names import handover_name
from qmpblock.qemu.runstate import OF_ITS_OWN, STOPPED_ITSELF

if TYPE_CHECKING:
    from qmpblock.migration.passage import Passage

__all__ = ["Homeward"]

_LOOK = 0.02
_POWERED_OFF = "guest-shutdown"  # why QEMU shuts down, in its word
#: What a source shows that has its guest again: `postmigrate`, where that had stopped before (F42).
_AT_HOME = OF_ITS_OWN | {"postmigrate"}
_KEPT = (
    "the disks' mirrors stay, paused, for another attempt (to a destination with the same images "
    "it copies what the guest writes meanwhile, no more; qmpblock recover takes them away)"
)
_STANDING = {
    "": "is at the source",
    "running": "runs at the source",
    "suspended": "is at the source, suspended as it was",
}
_STOPPED = "is at the source, stopped as somebody had it"

_log = logging.getLogger(__name__)


class Homeward:
    """What is done to have the guest stay. `go`."""

    def __init__(self, passage: Passage) -> None:
        self._passage = passage
        self._claimed = False
        self._hold = hold_of(passage.source)

    async def go(self, error: BaseException) -> None:
        """Have the guest go on at the source, and leave nothing, or mirrors; say so in the error.

        :param error: why.
        :raise Error: it does not, or something is left: the error says what.
        """
        try:
            await self._go(error)
        except StalledError as failed:
            if not self._passage.job.gone_over:
                self._say_silent(failed)
            raise

    def _say_silent(self, failed: StalledError) -> None:
        """Say what stands where the source does not do what it is told to."""
        failed.standing = (
            "the migration was broken off, and the destination was not continued; the source has "
            "not done all that it was told to, and its guest may stand"
        )
        failed.remedy = (
            "have the source's QEMU answer (is its process stopped? does its storage hang?), then "
            f"run: qmpblock recover {shell_words([self._passage.source.monitor.address])}"
        )

    async def _go(self, error: BaseException) -> None:
        passage = self._passage
        # Where the guest stands, whether the destination answers is not waited for.
        stood = (
            passage.stream.stands
            or passage.pause.stands
            or not passage.job.phase.before(Phase.HELD)
        )
        answers = not stood and await passage.landing.answers()
        lost = passage.source.monitor.closed
        keeps = isinstance(error, Error) and not lost and passage.may_keep
        if not answers or lost:
            passage.stream.cut()
            if not keeps:
                passage.storage.cut()
        if not (lost or passage.stream.begun):
            await passage.pause.end()
        fate = "" if keeps else await self._end_images()
        if lost:
            await self._lost(error)
            return
        kept = False
        try:
            if passage.stream.begun:
                await self._bring_back()
                await passage.pause.end()
            kept = keeps and await self._keep()
        finally:
            if not kept:
                fate = fate or await self._end_images()
        if not kept:
            await passage.storage.break_off()
        if answers or (stood and await passage.landing.answers()):
            with contextlib.suppress(Error):  # it has just ended, say
                await passage.landing.end_exports()
                if not passage.landing.spoilt:
                    await passage.bitmaps.restore(passage.landing.vm)
        await passage.stream.restore()
        await passage.bitmaps.restore(passage.source)
        if not kept:
            await passage.change.undo()
        stands = await passage.landing.give_up()
        keeper = ""
        if passage.landing.gone:
            # If it was needed: nobody else can run any more.
            await arbiter.withdraw(passage.source.monitor, passage.record.run)
        elif self._claimed:
            keeper = f" but the object {handover_name(passage.record.run)}, which keeps others of "
            keeper += "ours from continuing the destination"
        passage.settled = True
        if isinstance(error, Error):  # whatever was said, before it was undone
            left = _KEPT if kept else f"nothing of ours is left{keeper}"
            guest = await self._guest()
            error.standing = f"the guest {guest}, where {left}; {stands}{fate}"

    async def _guest(self) -> str:
        """Say where it is, and whether it runs."""
        shown = ""
        with contextlib.suppress(DisconnectedError):  # it has just ended
            shown, _ = await self._within(self._passage.stream.state()) or ("", "")
        if shown in _STANDING:
            return _STANDING[shown]
        # 7.2 shows `postmigrate` of any that had stopped before it was held (F42).
        passage = self._passage
        itself = {shown, passage.stream.shown, passage.shows} & STOPPED_ITSELF
        if not itself:
            return _STOPPED
        return f"is at the source, as it stopped itself ({', '.join(itself)})"

    async def _keep(self) -> bool:
        """Leave the mirrors for another attempt; return whether they are left."""
        try:
            return await self._passage.keep()
        except Error as error:
            _log.debug("the mirrors are not kept: %s", error)
            return False

    async def _end_images(self) -> str:
        """End the storage daemon; return what there is to be said of it."""
        try:
            fate = await self._passage.landing.end_images()
        except StalledError as error:
            self._cut()
            return f"; {error.message}"
        return fate and f"; {fate}"

    def _cut(self) -> None:
        self._passage.stream.cut()
        self._passage.storage.cut()

    async def _bring_back(self) -> None:
        """Wait until the guest goes on at the source, which is told to give up the migration.

        :raise Error: it does not, or must not.
        """
        passage = self._passage
        began = time.monotonic()
        # One that is on its way cannot be called back now: the guest might stand for ever (K35).
        passage.stream.cut()
        while True:
            state = await self._within(passage.stream.state())
            if state is not None and state[1] == "pre-switchover":
                await self._within(passage.stream.cancel())
            if state == ("postmigrate", "completed"):
                await self._reclaim()
                return
            if state is not None and state[0] in _AT_HOME and state[1] in OVER:
                return
            late = time.monotonic() - began
            if late > self._hold:
                self._cut()
            if late > self._hold + passage.source.stall:
                raise StalledError(
                    f"the guest does not go on at the source: {state or 'its monitor is silent'}"
                )
            await asyncio.sleep(_LOOK)

    async def _within(
        self, command: Coroutine[Any, Any, tuple[str, str] | None]
    ) -> tuple[str, str] | None:
        """Give a command some seconds, then cut every wire: QEMU may wait for one (K32)."""
        try:
            async with asyncio.timeout(self._hold):
                return await command
        except TimeoutError:
            self._cut()
        except CommandError as error:
            _log.debug("while the guest is brought back: %s", error)
        return None

    async def _reclaim(self) -> None:
        """Have the guest go on at a source that had sent it away; nobody else may, by the arbiter.

        :raise Error: somebody has had it go on at the destination.
        """
        passage = self._passage
        said = await arbiter.claim(passage.source.monitor, passage.record.run, Side.SOURCE)
        if said is not Side.SOURCE:
            passage.job.enter(Phase.HANDED)
            raise Error(
                "another controller has had the guest go on at the destination meanwhile",
                standing=HANDED,
                remedy="end the source (quit), and never continue it",
            )
        self._claimed = True
        # First the one that must not run: where both have the same images, it has them locked.
        await passage.landing.give_up()
        if not passage.stopped:
            await wayback.cont(passage.source)

    async def _lost(self, error: BaseException) -> None:
        """Say what stands where the source cannot be reached any more."""
        passage = self._passage
        said = error if isinstance(error, DisconnectedError) else DisconnectedError("lost")
        off = passage.stream.shutdown
        if passage.job.phase is Phase.LANDED:
            await passage.change.after_disconnect(said)
            said.standing = "all of the guest is at the destination, which stands (paused)"
            said.remedy = (
                "if the source's QEMU has certainly ended, continue the destination (cont); else "
                "reach the source, and see whether it runs"
            )
            return
        stands = await passage.landing.give_up()
        await passage.change.after_disconnect(said)
        said.standing = f"{said.standing}; {stands}"
        if await passage.source_has_ended():
            # By itself, with its guest, mostly. Where that cannot be at the destination, either,
            # there is nothing that a recovery could find out.
            passage.settled = passage.landing.gone or passage.job.phase.before(Phase.SENT)
            said.standing = f"the source's QEMU has ended, and its images lack nothing; {stands}"
            if off:
                said.message = f"the source's QEMU was shut down meanwhile ({off})"
            if off == _POWERED_OFF:
                said.message = "the guest has powered itself off, and its QEMU has ended with it"
            when = "when it is to run again" if off else "unless the guest shut itself down"
            said.remedy = f"{when}, start it again from these" + (
                "; those at the destination hold a part" if passage.plan.copied else ""
            )
        if isinstance(error, Error):
            error.message = said.message if off else error.message
            error.standing, error.remedy = said.standing, said.remedy
