"""qemu-img convert: what a guest would see of a closed image, into a new one of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from typing import Any

from qmpblock.errors import NoRoomError, ToolError, UnsupportedError, printable
from qmpblock.graph.jsonname import as_name
from qmpblock.host.handed import HandedFiles, MoreFiles
from qmpblock.host.imagechain import blockdev
from qmpblock.host.qemuimg import QemuImg
from qmpblock.host.toolwords import in_use_by_another, lacks_space, progress_in
from qmpblock.host.writers import in_use

__all__ = ["QemuImgConvert"]

_BELOW = "zeros"


class QemuImgConvert(QemuImg):
    """The qemu-img program, converting."""

    async def convert(
        self,
        source: Mapping[str, Any],
        target: str,
        fmt: str,
        *,
        opened: Mapping[str, int],
        progress: Callable[[float], None] | None = None,
        onto: int | None = None,
    ) -> None:
        """Copy what a guest would see of a closed image into an empty one; zeros take no space.

        Or copy what the image itself holds into one that has what lies below. Both are opened with
        the rights of the source's owner. Cancelling ends the program.

        :param source: as for blockdev-add, without `node-name`, with all that lies below it.
        :param target: an image of that format, and of that size, which holds nothing.
        :param opened: descriptors of all of their files, by these names: no name leads anywhere,
            and no header is followed to another file.
        :param progress: is told how much is done, from 0 to 1.
        :param onto: bytes of the target, where that holds all that lies below the source, which is
            to be described without it; None: it is empty.
        :raise UnsupportedError: the owner may not open one of them; or a header names another file.
        :raise InUseError: a running VM has one of them open for writing.
        :raise NoRoomError: there is no space for it.
        :raise ToolError: qemu-img failed.
        :raise StalledError: it did nothing for the stall limit.
        """
        with ExitStack() as stack:
            how: tuple[str, ...] = ("-n", "--target-is-zero")
            if onto is not None:
                # With -B qemu-img leaves out what the image itself does not hold. For that there
                # has to be something below; nothing of it is read.
                zeros = os.memfd_create("qmpblock")
                stack.callback(os.close, zeros)
                os.ftruncate(zeros, onto)
                os.fchmod(zeros, 0o444)  # others may read it, and have not written it
                source = {**source, "backing": blockdev("raw", _BELOW)}
                opened = {**opened, _BELOW: zeros}
                how = ("-n", "-B", _BELOW, "-F", "raw")
            files = stack.enter_context(HandedFiles(opened=opened))
            name = as_name(files.image(source))
            into = files.image(blockdev(fmt, target), writable=1)
            descriptor = str(into["file"]["filename"])
            options = f"driver={fmt},file.driver=file,file.filename={descriptor}"
            words = (*how, "--target-image-opts", name, options)
            try:
                await self._convert(files, words, target, progress)
            except MoreFiles as found:  # nothing was run
                raise UnsupportedError(
                    f"the header of {printable(found.file)} names another file, "
                    f"{printable(found.names[0])}, which is not opened"
                ) from None

    async def _convert(
        self,
        files: HandedFiles,
        words: Sequence[str],
        target: str,
        progress: Callable[[float], None] | None,
    ) -> None:
        try:
            run = self._run(("convert", "-p", *words), files, exclusive=False, separator=b"\r")
            async with aclosing(run) as pieces:
                async for piece in pieces:
                    done = progress_in(piece)
                    if done is not None and progress is not None:
                        progress(done / 100)
        except ToolError as error:
            if in_use_by_another(error.stderr):
                raise in_use("one of the images", error.stderr) from None
            if lacks_space(error.stderr):
                raise NoRoomError(
                    f"there is no room for {printable(target)}: {printable(error.stderr.strip())}"
                ) from None
            raise
