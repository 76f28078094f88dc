"""qemu-io, for images that are yet to be, or are not used yet."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from qmpblock.errors import ToolError
from qmpblock.graph.jsonname import as_name
from qmpblock.host.contents import Contents
from qmpblock.host.handed import HandedFiles
from qmpblock.host.imagechain import blockdev
from qmpblock.host.program import Program

__all__ = ["QemuIo", "null_data"]

_PIECE = 4 << 20  # bytes that qemu-io writes at a time; larger ones take new memory each time


class QemuIo(Program):
    """The qemu-io program, for images that nobody uses yet."""

    def __init__(self, program: str = "qemu-io", *, stall: float = 60.0) -> None:
        super().__init__(program, stall=stall)

    async def mark_as_data(
        self, contents: Contents, size: int, ranges: Iterable[tuple[int, int]]
    ) -> Contents:
        """Have a qcow2 image hold data in ranges, in a data file that is nowhere.

        As it was made, this is done in memory.

        :param contents: made by `QemuImg.create` with `data_elsewhere`.
        :param size: of the image, in bytes.
        :return: what its file is to hold.
        :raise ToolError: qemu-io failed.
        """
        text = _writing("write -q -P 0", ranges)
        with HandedFiles() as files:
            made = files.memory()
            contents.write_to(made)
            image = {
                "driver": "qcow2",
                "file": {"driver": "file", "filename": f"/proc/self/fd/{made}"},
                "data-file": null_data(size),
            }
            command = ("-t", "unsafe", as_name(image))
            async for line in self._run(command, files, given=text):
                self._check(command, line)
            return Contents.of(made)

    async def store_zeros(
        self,
        path: str,
        fmt: str,
        ranges: Iterable[tuple[int, int]],
        *,
        known: Collection[tuple[int | None, int]],
    ) -> None:
        """Store zeros as data in a closed image, so that they have host space.

        With the rights of its owner. What lies below it is left out: whole clusters only.

        :param known: device (None: any) and inode of the file that is written to.
        :raise ToolError: qemu-io failed: there is no room, say.
        """
        text = _writing("write -P 0", ranges)  # it says each, so that one that hangs is noticed

        def command(files: HandedFiles) -> tuple[str, ...]:
            return "-t", "writeback", as_name(files.image(blockdev(fmt, path), writable=1))

        async for line in self._lines(command, known=known, given=text):
            self._check((path,), line)

    def _check(self, command: Iterable[str], line: str) -> None:
        if "failed" in line:
            raise ToolError([self.program, *command], 1, line.strip())


def _writing(verb: str, ranges: Iterable[tuple[int, int]]) -> str:
    lines = [
        f"{verb} {at} {min(_PIECE, stop - at)}"
        for start, stop in ranges
        for at in range(start, stop, _PIECE)
    ]
    return "\n".join([*lines, "quit", ""])


def null_data(size: int) -> dict[str, Any]:
    """Return the options of a node that reads as zeros, and forgets what is written to it."""
    return {"driver": "null-co", "size": size, "read-zeroes": True}
