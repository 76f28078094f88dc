"""qemu-img compare, for two closed images whose owner may read both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from qmpblock.errors import ToolError
from qmpblock.graph.jsonname import as_name
from qmpblock.host.handed import HandedFiles, MoreFiles
from qmpblock.host.qemuimg import QemuImg
from qmpblock.host.toolwords import in_use_by_another, mismatch_in, progress_in
from qmpblock.host.writers import in_use

__all__ = ["QemuImgCompare"]

_SECTOR = 512  # bytes; qemu-img says no more of where it found a difference
_DIFFERENT = 1  # exit code, as its manual has it; what fails is more


class QemuImgCompare(QemuImg):
    """The qemu-img program, comparing: the cheapest way where it can open both images."""

    async def compare(
        self,
        first: Mapping[str, Any],
        second: Mapping[str, Any],
        *,
        progress: Callable[[float], None] | None = None,
    ) -> int | None:
        """Compare what a guest would see of two images; of a longer one's rest, that it is zeros.

        Both are opened with the rights of the first one's owner. Cancelling ends the program.

        :param first: as for blockdev-add, without `node-name`; nothing writes to it.
        :param second: the same.
        :param progress: is told how much is done, from 0 to 1.
        :return: None where they are equal; else an offset, in bytes, at most 512 before the first
            byte that differs.
        :raise NotFoundError: there is no such file.
        :raise UnsupportedError: the owner may not open one of them.
        :raise InUseError: a running VM has one of them open for writing.
        :raise ToolError: qemu-img failed.
        :raise StalledError: it did nothing for the stall limit.
        """
        more: dict[str, Sequence[str]] = {}
        while True:
            with HandedFiles(more=more) as files:
                names = [as_name(files.image(image)) for image in (first, second)]
                try:
                    return await self._compare(files, names, progress)
                except MoreFiles as found:  # nothing was run
                    more[found.file] = found.names

    async def _compare(
        self, files: HandedFiles, names: Sequence[str], progress: Callable[[float], None] | None
    ) -> int | None:
        said = ""
        try:
            run = self._run(("compare", "-p", *names), files, exclusive=False, separator=b"\r")
            async with aclosing(run) as pieces:
                async for piece in pieces:
                    done = progress_in(piece)
                    if done is not None and progress is not None:
                        progress(done / 100)
                    said = (said + piece)[-1000:]
        except ToolError as error:
            place = mismatch_in(said) if error.returncode == _DIFFERENT else None
            if place is not None:
                return place - place % _SECTOR
            if in_use_by_another(error.stderr):
                raise in_use("one of the images", error.stderr) from None
            raise
        return None
