"""qemu-img, for images that no running guest writes to: closed ones and frozen layers.

No image is ever probed for its format, because a guest can forge one: the format is given,
and an image whose backing format is not recorded is refused (design.md, safety rule 3).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpblock import luks
from qmpblock.errors import (
    NotFoundError,
    RequestError,
    StalledError,
    ToolError,
    UnsupportedError,
    printable,
)
from qmpblock.jsonname import as_name, innermost, said_by

if TYPE_CHECKING:
    from qmpblock.extents import AllocationMap

__all__ = ["Contents", "Image", "Key", "QemuImg", "QemuIo", "blockdev", "format_of", "null_data"]

_RECORDS = 1 << 16  # of a map, taken in at a time
_LINE = 1 << 20  # bytes
_PIECE = 4 << 20  # bytes that qemu-io writes at a time; larger ones take new memory each time
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


@dataclass(frozen=True)
class Contents:
    """The bytes of an image file that is yet to be.

    :ivar length: of the file, in bytes.
    :ivar pieces: what is data in it, by its offset; the rest is a hole.
    """

    length: int
    pieces: tuple[tuple[int, bytes], ...] = field(repr=False)

    @classmethod
    def of(cls, fd: int) -> Contents:
        """Read a sparse file."""
        length, at = os.fstat(fd).st_size, 0
        pieces: list[tuple[int, bytes]] = []
        while at < length:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # no data after `at`
            at = os.lseek(fd, start, os.SEEK_HOLE)
            pieces.append((start, os.pread(fd, at - start, start)))
        return cls(length, tuple(pieces))

    def write_to(self, fd: int) -> None:
        """Make an empty file hold them.

        :raise OSError: it cannot.
        """
        os.ftruncate(fd, self.length)
        for at, data in self.pieces:
            view = memoryview(data)
            while view:
                done = os.pwrite(fd, view, at)
                view, at = view[done:], at + done


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
    :param stall: seconds without any output that count as a failure.
    """

    def __init__(self, program: str = "qemu-img", *, stall: float = 60.0) -> None:
        self.program = program
        self.stall = stall

    async def chain(self, path: str, fmt: str) -> tuple[Image, ...]:
        """Follow a closed image's backing links, the active layer first.

        :raise NotFoundError: there is no such file.
        :raise UnsupportedError: a backing format is not recorded and not told by the name,
            or a backing file is not a local file.
        :raise ToolError: qemu-img cannot read one of them.
        """
        images: list[Image] = []
        if path.startswith("-"):  # not an option
            path = f"./{path}"
        while True:
            described = said_by(path)
            if not Path(_file_of(described) or path).exists():
                named = f", the backing file of {printable(images[-1].file)}" if images else ""
                raise NotFoundError(f"there is no image {printable(path)}{named}")
            if any(image.file == path for image in images):
                raise RequestError(f"{printable(path)} is in its own backing chain")
            # Without backing images: `info` opens only the image that it is given.
            given = () if described else ("-f", fmt)
            info = await self._json("info", "--output=json", *given, path)
            images.append(Image(path, fmt, int(info["virtual-size"])))
            backing = info.get("full-backing-filename") or info.get("backing-filename")
            if not backing:
                return tuple(images)
            overlay, path = path, str(backing).removeprefix("file:")
            # QED and QCOW1 headers have no room for it; then the name must tell.
            fmt = str(info.get("backing-filename-format") or "") or _SUFFIXES.get(
                Path(path).suffix.lower(), ""
            )
            if described := said_by(path):
                fmt = str(described.get("driver") or "")
            if not fmt:
                raise UnsupportedError(
                    f"{printable(overlay)} does not record the format of its backing file "
                    f"{printable(path)}, whose name does not tell it either; it is not probed: "
                    "a guest can forge it",
                    remedy="record it: qemu-img rebase -u -f FMT -F BACKING_FMT -b "
                    f"{printable(info.get('backing-filename'))} {printable(overlay)}",
                )
            beyond = any(key.partition(".")[0] == "backing" for key in described)
            if "://" in path or (path.startswith("json:") and (beyond or not _file_of(described))):
                raise UnsupportedError(
                    f"the backing file {printable(path)} is not a local file",
                    remedy="map it through the monitor of a VM that has it open",
                )

    async def map(
        self,
        image: Mapping[str, Any],
        formats: Sequence[str],
        *,
        shared: bool = False,
        part: tuple[int, int] | None = None,
    ) -> AllocationMap:
        """Map an image, described by QEMU's blockdev options.

        :param image: as for blockdev-add, without `node-name`; `"backing": None` leaves
            out what lies below.
        :param formats: of its layers, the active one first.
        :param shared: open it although another process has it open for writing. Only right
            for frozen layers, which nobody writes to.
        :param part: offset and length of the range to map; None: all.
        :raise ToolError: qemu-img failed.
        """
        from qmpblock.extents import AllocationMap

        options = ["-U"] if shared else []
        if part is not None:
            options += [f"--start-offset={part[0]}", f"--max-length={part[1]}"]
        name = as_name(image)
        parts: list[AllocationMap] = []
        pending: list[str] = []

        def take() -> None:
            # One record a line: `[{ ... },`, `{ ... },` and `{ ... }]`.
            text = ",".join(line.strip().strip("[],") for line in pending if line.strip())
            pending.clear()
            records = json.loads(f"[{text}]")
            if records:
                found = AllocationMap.from_qemu_img(records, layers=len(formats), formats=formats)
                parts.append(found)

        # A few megabytes at a time, whatever a guest made of its image.
        async for line in self._lines("map", "--output=json", *options, name, exclusive=not shared):
            pending.append(line)
            if len(pending) >= _RECORDS:
                take()
        take()
        if not parts:
            raise ToolError([self.program, "map"], 0, "it printed no map")
        return AllocationMap.concat(parts).coalesce()

    async def _json(self, *arguments: str) -> Any:
        text = "".join([line async for line in self._lines(*arguments)])
        try:
            return json.loads(text)
        except ValueError:
            raise ToolError(
                [self.program, *arguments], 0, f"its output is no JSON: {printable(text[:200])}"
            ) from None

    async def in_use(self, path: str) -> bool:
        """Whether some QEMU has a file open for writing, by the locks that it puts on it.

        :raise ToolError: qemu-img cannot read the file.
        """
        try:
            # As raw: its content is of no interest, and not looked at.
            await self._json("info", "--output=json", "-f", "raw", path)
        except ToolError as error:
            if "lock" not in error.stderr:
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
        with contextlib.ExitStack() as stack:
            fds = [_in_memory(stack)]
            for number, key in enumerate(keys):
                fds.append(_in_memory(stack, key.text))
                described = (
                    f"secret,id=key{number},file=/proc/self/fd/{fds[-1]},format={key.format}"
                )
                if key.iv:
                    described += f",keyid=key{number - 1},iv={key.iv}"
                command += ["--object", described]
            if data_elsewhere:  # qemu-img insists on a file
                fds.append(_in_memory(stack))
                options = {**options, "data_file": f"/proc/self/fd/{fds[-1]}"}
            if options:
                command += ["-o", ",".join(f"{name}={value}" for name, value in options.items())]
            if backing is not None:
                command += ["-u", "-b", backing[0], "-F", backing[1]]
            command += [f"/proc/self/fd/{fds[0]}", str(size)]

            async def attempt() -> None:
                os.ftruncate(fds[0], 0)
                try:
                    async for _ in self._lines(*command, fds=fds):
                        pass
                except ToolError as error:
                    # Its file has no name that could be deleted, and need not be.
                    lines = error.stderr.splitlines()
                    said = [line for line in lines if "Error when deleting file" not in line]
                    raise ToolError(
                        error.command, error.returncode, "\n".join(said), remedy=error.remedy
                    ) from None

            await luks.retried(attempt)
            return Contents.of(fds[0])

    async def rebase(self, overlay: str, fmt: str, base: str, base_fmt: str) -> None:
        """Have a closed overlay's header name another backing image; no data is copied.

        :param base: empty: none.
        :raise ToolError: qemu-img failed.
        """
        named = ("-F", base_fmt) if base else ()
        command = ("rebase", "-q", "-u", "-f", fmt, "-b", base, *named, overlay)
        async for _ in self._lines(*command):
            pass

    async def commit(self, overlay: str, fmt: str, base: Mapping[str, Any] | None = None) -> None:
        """Copy what a closed overlay holds into its backing image. Can be repeated.

        :param base: how that is opened; None: as the headers say.
        :raise ToolError: qemu-img failed.
        """
        command = ["commit", "-q", "-d"]
        if base is None:
            command += ["-f", fmt, overlay]
        else:
            image = {"driver": fmt, "file": {"driver": "file", "filename": overlay}}
            command += [as_name(image | {"backing": base})]
        async for _ in self._lines(*command):
            pass

    async def _lines(
        self,
        *arguments: str,
        exclusive: bool = True,
        given: str | None = None,
        fds: Sequence[int] = (),
    ) -> AsyncIterator[str]:
        """Run qemu-img and yield what it prints, line by line.

        :param given: what it is to read on stdin.
        :param fds: descriptors that it gets too.

        :raise ToolError: it cannot be started, or fails.
        :raise StalledError: it prints nothing, and does not end, for the stall limit.
        """
        command = [self.program, *arguments]
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL if given is None else asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=_LINE,
                pass_fds=fds,
            )
        except OSError as error:
            raise ToolError(
                command, 127, str(error), remedy="install qemu-img (Debian: qemu-utils)"
            ) from None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            complaints = asyncio.ensure_future(process.stderr.read())
            if given is not None:
                assert process.stdin is not None
                process.stdin.write(given.encode())
                process.stdin.write_eof()
            while True:
                async with asyncio.timeout(self.stall):
                    line = await process.stdout.readline()
                if not line:
                    break
                yield line.decode(errors="replace")
            async with asyncio.timeout(self.stall):
                said = (await complaints).decode(errors="replace")
                code = await process.wait()
        except TimeoutError:
            raise StalledError(
                f"{printable(' '.join(command), 1000)} printed nothing for {self.stall:g} s",
                remedy="look whether the storage of the image hangs",
            ) from None
        except ValueError:
            raise ToolError(command, 0, "it printed a line without an end") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if code:
            raise ToolError(
                command,
                code,
                said,
                remedy="a running VM holds the image; map it through that VM's monitor: "
                "qmpblock map ADDRESS DISK"
                if exclusive and "lock" in said
                else None,
            )


def _in_memory(stack: contextlib.ExitStack, data: bytes = b"") -> int:
    """Return a file that is in no directory, for as long as the stack lives."""
    fd = os.memfd_create("qmpblock")
    stack.callback(os.close, fd)
    os.write(fd, data)
    return fd


def blockdev(fmt: str, file: str, backing: Sequence[Image] = ()) -> dict[str, Any]:
    """Return blockdev options that open `file`, over exactly `backing`, probing nothing."""
    options: dict[str, Any] = said_by(file) or {
        "driver": fmt,
        "file": {"driver": "file", "filename": file},
    }
    if fmt in _WITH_BACKING:
        options["backing"] = (
            blockdev(backing[0].format, backing[0].file, backing[1:]) if backing else None
        )
    return options


def _file_of(described: Mapping[str, Any]) -> str:
    """Return the local file that such a description is of, or nothing."""
    options = innermost(described)
    local = options.get("driver") in ("file", "host_device")
    return str(options.get("filename") or "") if local else ""


_WITH_BACKING = frozenset({"qcow", "qcow2", "qed", "vmdk"})


class QemuIo(QemuImg):
    """The qemu-io program, for images that nobody else uses."""

    def __init__(self, program: str = "qemu-io", *, stall: float = 60.0) -> None:
        super().__init__(program, stall=stall)

    async def mark_as_data(
        self, path: str, size: int, ranges: Iterable[tuple[int, int]], *, fds: Sequence[int] = ()
    ) -> None:
        """Have a closed qcow2 image hold data in ranges, in a data file that is nowhere.

        :param path: made by `QemuImg.create` with `data_elsewhere`; nothing is flushed.
        :param size: of the image, in bytes.
        :param fds: that `path` is one of, if it is /proc/self/fd/N.
        :raise ToolError: qemu-io failed; there may be no room for the metadata.
        """
        image = {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": path},
            "data-file": null_data(size),
        }
        lines = [
            f"write -q -P 0 {at} {min(_PIECE, stop - at)}"
            for start, stop in ranges
            for at in range(start, stop, _PIECE)
        ]
        text = "\n".join([*lines, "quit", ""])
        name = "json:" + json.dumps(image)
        said = [line async for line in self._lines("-t", "unsafe", name, given=text, fds=fds)]
        wrong = [line for line in said if "failed" in line]
        if wrong:
            raise ToolError([self.program, path], 1, wrong[0])


def null_data(size: int) -> dict[str, Any]:
    """Return the options of a node that reads as zeros, and forgets what is written to it."""
    return {"driver": "null-co", "size": size, "read-zeroes": True}
