"""qemu-img check, of an image that nobody has open: what a QEMU that was killed has left of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qmpblock import luks
from qmpblock.errors import ToolError, printable
from qmpblock.graph.jsonname import as_name
from qmpblock.host.handed import HandedFiles
from qmpblock.host.imagechain import blockdev
from qmpblock.host.qemuimg import Key, QemuImg, handed_keys
from qmpblock.host.toolwords import in_use_by_another
from qmpblock.host.writers import in_use

if TYPE_CHECKING:
    from qmpblock.graph.places import FileId

__all__ = ["QemuImgCheck"]

_CORRUPT, _LEAKS = 2, 3  # exit codes, as its manual has them


class QemuImgCheck(QemuImg):
    """The qemu-img program, checking."""

    async def fault(self, path: str, fmt: str, *, opened: Mapping[str, int]) -> str | None:
        """Say what is wrong with an image's tables; None: nothing. It is not written to.

        With the rights of its owner; what lies below it is not opened. Clusters that nothing uses
        are no fault. Cancelling ends the program.

        :param opened: its descriptor, by that name, which leads nowhere.
        :raise UnsupportedError: its owner may not open it.
        :raise InUseError: somebody has it open for writing.
        :raise StalledError: it did nothing for the stall limit.
        :raise ToolError: qemu-img could not look.
        """

        def command(files: HandedFiles) -> Sequence[str]:
            return ("check", as_name(files.image(blockdev(fmt, path))))

        said: list[str] = []
        try:
            async for line in self._lines(command, opened=opened):
                said.append(line.strip())
        except ToolError as error:
            if in_use_by_another(error.stderr):
                raise in_use(path, error.stderr) from None
            if error.returncode not in (_CORRUPT, _LEAKS):
                raise
            return printable(" ".join(said)) if error.returncode == _CORRUPT else None
        return None

    async def free_leaks(self, path: str, fmt: str, file: FileId, keys: Sequence[Key] = ()) -> None:
        """Give back the clusters that nothing uses, and see that the image is sound otherwise.

        With the rights of its owner; what lies below it is not opened. Cancelling ends the
        program, and harms nothing.

        :param file: that it must be.
        :param keys: the one that encrypts it (LUKS in qcow2), after those that encrypt it in turn.
        :raise ToolError: the image is damaged: nothing is written to it; or qemu-img failed.
        :raise UnsupportedError: it is another file, or its owner may not open it.
        :raise InUseError: somebody has it open.
        :raise StalledError: it did nothing for the stall limit.
        """
        options = dict(blockdev(fmt, path))
        if keys:
            options["encrypt"] = {"format": "luks", "key-secret": f"key{len(keys) - 1}"}

        def command(files: HandedFiles) -> Sequence[str]:
            name = as_name(files.image(options, writable=1))
            return ("check", "-q", "-r", "leaks", *handed_keys(files, keys), name)

        async def attempt() -> None:
            async for _ in self._lines(command, known={(file.device, file.inode)}):
                pass

        try:
            await luks.retried(attempt)
        except ToolError as error:
            if in_use_by_another(error.stderr):
                raise in_use(path, error.stderr) from None
            error.remedy = f"if {printable(path)} is damaged, remove it, and copy anew"
            raise
