"""qemu-img, for images that no running guest writes to: closed ones and frozen layers.

No image is ever probed for its format, because a guest can forge one: the format is given,
and an image whose backing format is not recorded is refused (design.md, safety rule 3).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpblock.errors import NotFoundError, RequestError, ToolError, UnsupportedError, printable

if TYPE_CHECKING:
    from qmpblock.extents import AllocationMap

__all__ = ["Image", "QemuImg", "blockdev", "format_of"]

_SUFFIXES = {
    ".img": "raw",
    ".luks": "luks",
    ".parallels": "parallels",
    ".qcow": "qcow",
    ".qcow2": "qcow2",
    ".qed": "qed",
    ".raw": "raw",
    ".vdi": "vdi",
    ".vhd": "vpc",
    ".vhdx": "vhdx",
    ".vmdk": "vmdk",
}


@dataclass(frozen=True)
class Image:
    """One image of a chain on disk.

    :ivar file: its path, resolved against the image that names it.
    :ivar format: as given or recorded, never probed.
    :ivar size: virtual size in bytes.
    """

    file: str
    format: str
    size: int


def format_of(path: str) -> str:
    """Tell a format from a file name's suffix, which no guest can write.

    :raise RequestError: the suffix tells nothing.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise RequestError(
            f"the name {printable(path)} does not tell the image's format, and its content is "
            "not asked: a guest can forge it",
            remedy=f"give --format FMT, or use one of the suffixes {' '.join(sorted(_SUFFIXES))}",
        )
    return _SUFFIXES[suffix]


class QemuImg:
    """The qemu-img program.

    :param program: its name or path.
    """

    def __init__(self, program: str = "qemu-img") -> None:
        self.program = program

    async def chain(self, path: str, fmt: str) -> tuple[Image, ...]:
        """Follow a closed image's backing links, the active layer first.

        :raise NotFoundError: there is no such file.
        :raise UnsupportedError: a backing format is not recorded and not told by the name,
            or a backing file is not a local file.
        :raise ToolError: qemu-img cannot read one of them.
        """
        images: list[Image] = []
        while True:
            if not Path(path).exists():
                named = f", the backing file of {printable(images[-1].file)}" if images else ""
                raise NotFoundError(f"there is no image {printable(path)}{named}")
            if any(image.file == path for image in images):
                raise RequestError(f"{printable(path)} is in its own backing chain")
            # Without backing images: `info` opens only the image that it is given.
            info = await self._json("info", "--output=json", "-f", fmt, path)
            images.append(Image(path, fmt, int(info["virtual-size"])))
            backing = info.get("full-backing-filename") or info.get("backing-filename")
            if not backing:
                return tuple(images)
            overlay, path = path, str(backing).removeprefix("file:")
            # QED and QCOW1 headers have no room for it; then the name must tell.
            fmt = str(info.get("backing-filename-format") or "") or _SUFFIXES.get(
                Path(path).suffix.lower(), ""
            )
            if not fmt:
                raise UnsupportedError(
                    f"{printable(overlay)} does not record the format of its backing file "
                    f"{printable(path)}, whose name does not tell it either; it is not probed: "
                    "a guest can forge it",
                    remedy="record it: qemu-img rebase -u -f FMT -F BACKING_FMT -b "
                    f"{printable(info.get('backing-filename'))} {printable(overlay)}",
                )
            if path.startswith("json:") or "://" in path:
                raise UnsupportedError(
                    f"the backing file {printable(path)} is not a local file",
                    remedy="map it through the monitor of a VM that has it open",
                )

    async def map(
        self, image: Mapping[str, Any], formats: Sequence[str], *, shared: bool = False
    ) -> AllocationMap:
        """Map an image, described by QEMU's blockdev options.

        :param image: as for blockdev-add, without `node-name`; `"backing": None` leaves
            out what lies below.
        :param formats: of its layers, the active one first.
        :param shared: open it although another process has it open for writing. Only right
            for frozen layers, which nobody writes to.
        :raise ToolError: qemu-img failed.
        """
        from qmpblock.extents import AllocationMap

        options = ["-U"] if shared else []
        records = await self._json(
            "map", "--output=json", *options, "json:" + json.dumps(image), exclusive=not shared
        )
        return AllocationMap.from_qemu_img(records, layers=len(formats), formats=formats)

    async def _json(self, *arguments: str, exclusive: bool = True) -> Any:
        command = [self.program, *arguments]
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise ToolError(
                command, 127, str(error), remedy="install qemu-img (Debian: qemu-utils)"
            ) from None
        try:
            out, err = await process.communicate()
        except BaseException:
            process.kill()
            await process.wait()
            raise
        said = err.decode(errors="replace")
        if process.returncode:
            raise ToolError(
                command,
                process.returncode or 0,
                said,
                remedy="a running VM holds the image; map it through that VM's monitor: "
                "qmpblock map ADDRESS DISK"
                if exclusive and "lock" in said
                else None,
            )
        try:
            return json.loads(out)
        except ValueError:
            raise ToolError(command, 0, f"its output is no JSON: {printable(out[:200])}") from None


def blockdev(fmt: str, file: str, backing: Sequence[Image] = ()) -> dict[str, Any]:
    """Return blockdev options that open `file`, over exactly `backing`, probing nothing."""
    options: dict[str, Any] = {"driver": fmt, "file": {"driver": "file", "filename": file}}
    if fmt in _WITH_BACKING:
        options["backing"] = (
            blockdev(backing[0].format, backing[0].file, backing[1:]) if backing else None
        )
    return options


_WITH_BACKING = frozenset({"qcow", "qcow2", "qed", "vmdk"})
