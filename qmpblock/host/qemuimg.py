"""qemu-img, for images that no running guest writes to: closed ones and frozen layers.

No image is ever probed for its format (`qmpblock.host.imagechain`), nor is anything opened but
what is handed over, with the rights of the image's owner, or of the user of the QEMU that has it
open (`qmpblock.host.handed`).
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from qmpblock import luks
from qmpblock.errors import (
    NotFoundError,
    RequestError,
    ToolError,
    UnsupportedError,
    printable,
)
from qmpblock.graph.jsonname import as_name, said_by
from qmpblock.host.contents import Contents
from qmpblock.host.handed import (
    HandedFiles,
    User,
    has_servers,
)
from qmpblock.host.imagechain import Image, ImageInfo, backing_of, blockdev
from qmpblock.host.program import Program
from qmpblock.host.toolwords import in_use_by_another

if TYPE_CHECKING:
    from qmpblock.extents.allocationmap import AllocationMap

__all__ = ["Key", "QemuImg", "handed_keys"]

_T = TypeVar("_T")

_RECORDS = 1 << 16  # of a map, taken in at a time
_LINE = 1 << 20  # bytes
_DOCUMENT = 16 << 20  # characters
_LONGEST = 400  # images of a chain; QEMU's own JSON reader takes 1024 levels


@dataclass(frozen=True)
class Key:
    """What a `secret` object of QEMU's holds; never shown.

    :ivar text: its data, in its format (`raw`, `base64`).
    :ivar iv: where the data is encrypted, by the key before this one: its initialisation
        vector; empty where it is not.
    """

    text: bytes = field(repr=False)
    format: str = "raw"
    iv: str = ""


def handed_keys(files: HandedFiles, keys: Sequence[Key]) -> list[str]:
    """Return the words by which one of QEMU's programs has keys as `key<N>`, N counted from 0."""
    words = []
    for number, key in enumerate(keys):
        fd = files.memory(key.text)
        described = f"secret,id=key{number},file=/proc/self/fd/{fd},format={key.format}"
        if key.iv:
            described += f",keyid=key{number - 1},iv={key.iv}"
        words += ["--object", described]
    return words


class QemuImg(Program):
    """The qemu-img program."""

    def __init__(self, program: str = "qemu-img", *, stall: float = 60.0) -> None:
        super().__init__(program, stall=stall)

    async def chain(self, path: str, fmt: str, *, by_headers: bool = False) -> tuple[Image, ...]:
        """Follow a closed image's backing links, the active layer first.

        Each is opened with the rights of whoever owns the one that names it.

        :param by_headers: let the headers of plain qcow2 images count, which takes one process
            for all, where qemu-img takes one each. It does not look whether QEMU could open them:
            for whoever has qemu-img open them all next, and hears it then.
        :raise NotFoundError: there is no such file.
        :raise UnsupportedError: a backing format is not recorded and not told by the name,
            or a backing file is not a local file, or the owner of the image that names it may
            not come to it.
        :raise ToolError: qemu-img cannot read one of them.
        """
        images: list[Image] = []
        owner: User | None = None  # of the image before; where there is none, of this one
        read: list[tuple[ImageInfo, User]] = []
        if by_headers and fmt == "qcow2" and not said_by(path):
            read = await self._read_headers(path)
        while True:
            if len(images) == _LONGEST:
                raise RequestError(f"more than {_LONGEST} images are in this backing chain")
            if any(image.file == path for image in images):
                raise RequestError(f"{printable(path)} is in its own backing chain")
            try:
                if fmt == "qcow2" and len(images) < len(read):
                    info, next_owner = read[len(images)]
                else:
                    info, next_owner = await self._info(path, fmt, owner)
            except NotFoundError as error:
                if images:
                    error.message += f", the backing file of {printable(images[-1].file)}"
                raise
            images.append(Image(path, fmt, info.size, owner))
            owner = next_owner
            if not info.backing:
                return tuple(images)
            path, fmt = backing_of(path, info)

    async def _read_headers(self, path: str) -> list[tuple[ImageInfo, User]]:
        """Read the headers of a qcow2 image, and of those below it, as far as they are plain."""

        def command(files: HandedFiles) -> Sequence[str]:
            files.follow(path)
            return ("info",)

        headers = []
        async with aclosing(self._lines(command)) as lines:
            async for line in lines:
                size, backing, fmt, uid, gid = line.rstrip("\n").split("\0")
                info = ImageInfo(int(size), backing, fmt)
                headers.append((info, User(int(uid), int(gid))))
        return headers

    async def _info(self, path: str, fmt: str, opener: User | None) -> tuple[ImageInfo, User]:
        """Read an image's header as some user, and return whose the image is.

        :param opener: None: its owner.
        """
        more: dict[str, Sequence[str]] = {}
        said = opener is not None
        info, owner = await self._read_info(blockdev(fmt, path), opener, more, said=said)
        if opener not in (None, owner):  # what it names besides, it names for its owner
            for file, names in list(more.items()):
                for name in names:
                    beside = (
                        posixpath.join(posixpath.dirname(file), name) if fmt == "vmdk" else name
                    )
                    await self._read_info(blockdev("raw", beside), owner, more, said=True)
        return info, owner

    async def _read_info(
        self,
        options: Mapping[str, Any],
        user: User | None,
        more: dict[str, Sequence[str]],
        *,
        said: bool,
    ) -> tuple[ImageInfo, User]:
        owners = []

        def command(files: HandedFiles) -> Sequence[str]:
            name = as_name(files.image(options, said=said))
            owners.append(files.owner)
            return ("info", "--output=json", name)

        text = ""
        async with aclosing(self._lines(command, user=user, more=more)) as lines:
            async for line in lines:
                text += line
                if len(text) > _DOCUMENT:
                    break
        try:
            told = json.loads(text)
            info = ImageInfo(
                int(told["virtual-size"]),
                str(told.get("backing-filename") or ""),
                str(told.get("backing-filename-format") or ""),
            )
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            raise ToolError(
                [self.program, "info", as_name(options)],
                0,
                f"it printed no information: {printable(text, 200)}",
            ) from None
        return info, owners[-1]

    async def map(
        self,
        image: Mapping[str, Any],
        formats: Sequence[str],
        *,
        shared: bool = False,
        part: tuple[int, int] | None = None,
        vm: int | None = None,
        opener: User | None = None,
        known: Collection[tuple[int | None, int]] | None = None,
    ) -> AllocationMap:
        """Map an image, described by QEMU's blockdev options.

        :param image: as for blockdev-add, without `node-name`; `"backing": None` leaves
            out what lies below.
        :param formats: of its layers, the active one first.
        :param shared: open it although another process has it open for writing. Only right
            for frozen layers, which nobody writes to.
        :param part: offset and length of the range to map; None: all.
        :param vm: the process of the VM that has it open, whose user's rights are used; None:
            those of the image's owner.
        :param opener: see `Image`.
        :param known: device (None: any) and inode of the image's file, if that is known.
        :raise NotFoundError: there is no such file.
        :raise UnsupportedError: one of its files cannot be opened, and why.
        :raise ToolError: qemu-img failed.
        """
        from qmpblock.extents.allocationmap import AllocationMap

        options = ["-U"] if shared else []
        if part is not None:
            options += [f"--start-offset={part[0]}", f"--max-length={part[1]}"]
        parts: list[AllocationMap] = []
        pending: list[str] = []

        def take() -> None:
            # One record a line: `[{ ... },`, `{ ... },` and `{ ... }]`.
            text = ",".join(line.strip().strip("[],") for line in pending if line.strip())
            pending.clear()
            try:
                records = json.loads(f"[{text}]")
                if records:
                    parts.append(
                        AllocationMap.from_qemu_img(records, layers=len(formats), formats=formats)
                    )
            except UnsupportedError:
                raise
            except (RecursionError, RequestError, ValueError) as error:
                raise self._no_map(error) from None

        # A few megabytes at a time, whatever a guest made of its image.
        def command(files: HandedFiles) -> Sequence[str]:
            name = as_name(files.image(image, said=opener is not None))
            return ("map", "--output=json", *options, name)

        lines = self._lines(command, vm=vm, user=opener, known=known, exclusive=not shared)
        async for line in lines:
            pending.append(line)
            if len(pending) >= _RECORDS:
                take()
        take()
        try:
            return AllocationMap.concat(parts).coalesce()
        except RequestError as error:
            raise self._no_map(error) from None

    def _no_map(self, error: Exception) -> ToolError:
        why = f"it printed no map: {printable(error, 200)}"
        return ToolError([self.program, "map"], 0, why)

    async def in_use(self, path: str) -> bool:
        """Whether some QEMU has a file open for writing, by the locks that it puts on it.

        :raise ToolError: qemu-img cannot read the file.
        """
        try:
            # As raw: its content is of no interest, and not looked at.
            await self._info(path, "raw", None)
        except ToolError as error:
            if not in_use_by_another(error.stderr):
                raise
            return True
        return False

    async def create(
        self,
        fmt: str,
        size: int,
        options: Mapping[str, str | int],
        *,
        backing: tuple[str, str] | None = None,
        keys: Sequence[Key] = (),
        data_elsewhere: bool = False,
    ) -> Contents:
        """Make an empty image, and return what its file is to hold; no file is made.

        It is made in memory, and no other image is opened. So nothing is left of it, whatever
        dies, and no key is written to a disk.

        :param options: of the format, whatever its defaults are.
        :param backing: the name and the format to record of its backing image.
        :param keys: the one that encrypts the image, after those that encrypt it in turn; the
            image's option `key-secret` (`encrypt.key-secret`) is `key<N>`, N counted from 0.
        :param data_elsewhere: its data lies in another file (qcow2), which whoever opens it names.
        :raise ToolError: qemu-img failed; no key is in it.
        """
        command = ["create", "-q", "-f", fmt]
        with HandedFiles() as files:
            made = files.memory()
            command += handed_keys(files, keys)
            if data_elsewhere:  # qemu-img insists on a file
                options = {**options, "data_file": f"/proc/self/fd/{files.memory()}"}
            if options:
                command += ["-o", ",".join(f"{name}={value}" for name, value in options.items())]
            if backing is not None:
                command += ["-u", "-b", backing[0], "-F", backing[1]]
            command += [f"/proc/self/fd/{made}", str(size)]

            async def attempt() -> None:
                os.ftruncate(made, 0)
                try:
                    async for _ in self._run(command, files):
                        pass
                except ToolError as error:
                    # Its file has no name that could be deleted, and need not be.
                    lines = error.stderr.splitlines()
                    said = [line for line in lines if "Error when deleting file" not in line]
                    raise ToolError(
                        error.command, error.returncode, "\n".join(said), remedy=error.remedy
                    ) from None

            await luks.retried(attempt)
            return Contents.of(made)

    async def rebase(
        self,
        overlay: str,
        fmt: str,
        base: str,
        base_fmt: str,
        *,
        known: Collection[tuple[int | None, int]] | None,
    ) -> None:
        """Have a closed overlay's header name another backing image; no data is copied.

        With the rights of its owner.

        :param base: empty: none.
        :param known: device (None: any) and inode of what may be written to; None: of any.
        :raise UnsupportedError: the overlay is another file.
        :raise ToolError: qemu-img failed.
        """
        named = ("-F", base_fmt) if base else ()

        def command(files: HandedFiles) -> Sequence[str]:
            name = as_name(files.image(blockdev(fmt, overlay), writable=1))
            return ("rebase", "-q", "-u", "-b", base, *named, name)

        async for _ in self._lines(command, known=known):
            pass

    async def commit(
        self,
        overlay: str,
        fmt: str,
        base: Mapping[str, Any],
        *,
        known: Collection[tuple[int | None, int]] | None,
    ) -> None:
        """Copy what a closed overlay holds into its backing image. Can be repeated.

        With the rights of that one's owner.

        :param base: how it is opened, with all that lies below it.
        :param known: device (None: any) and inode of what may be written to; None: of any.
        :raise UnsupportedError: one is another file.
        :raise ToolError: qemu-img failed.
        """

        def command(files: HandedFiles) -> Sequence[str]:
            below = files.image(base, writable=1)
            image = files.image(blockdev(fmt, overlay), writable=1) | {"backing": below}
            return ("commit", "-q", "-d", as_name(image))

        async for _ in self._lines(command, network=has_servers(base), known=known):
            pass
