"""qemu-io, for images that are yet to be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qmpblock.errors import ToolError
from qmpblock.graph.jsonname import as_name
from qmpblock.host.contents import Contents
from qmpblock.host.handed import HandedFiles
from qmpblock.host.qemuimg import QemuImg

__all__ = ["QemuIo", "null_data"]

_PIECE = 4 << 20  # bytes that qemu-io writes at a time; larger ones take new memory each time


class QemuIo(QemuImg):
    """The qemu-io program, for images that are yet to be."""

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
        lines = [
            f"write -q -P 0 {at} {min(_PIECE, stop - at)}"
            for start, stop in ranges
            for at in range(start, stop, _PIECE)
        ]
        text = "\n".join([*lines, "quit", ""])
        with HandedFiles() as files:
            made = files.memory()
            contents.write_to(made)
            image = {
                "driver": "qcow2",
                "file": {"driver": "file", "filename": f"/proc/self/fd/{made}"},
                "data-file": null_data(size),
            }
            command = ("-t", "unsafe", as_name(image))
            said = [line async for line in self._run(command, files, given=text)]
            wrong = [line for line in said if "failed" in line]
            if wrong:
                raise ToolError([self.program, *command], 1, wrong[0])
            return Contents.of(made)


def null_data(size: int) -> dict[str, Any]:
    """Return the options of a node that reads as zeros, and forgets what is written to it."""
    return {"driver": "null-co", "size": size, "read-zeroes": True}
