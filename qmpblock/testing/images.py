"""Images: the files of a scenario, made by the tested QEMU's own qemu-img and qemu-io.

Every file is opened by a full description (`json:{...}`): the format of each layer and the
chain are as the scenario says, nothing is probed and no header is trusted. Images are made
from base to active, each with its content before the next one exists (vmdk records the
state of its backing image).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmpblock import luks
from qmpblock.errors import ToolError
from qmpblock.testing.scenario import Disk, Image, Operation, Scenario

__all__ = ["BuiltDisk", "BuiltImage", "BuiltScenario", "Tools", "build", "find_qemu"]

_QCOW2_BACKING_FORMAT = 0xE2792ACA  # type of a header extension
_DIGEST_BLOCK = 64 << 10  # bytes; finer than any hole that matters, coarse enough to be quick


def find_qemu() -> str:
    """Return the QEMU under test: $QMPBLOCK_QEMU, else the one in the path.

    :raise ToolError: there is none.
    """
    wanted = os.environ.get("QMPBLOCK_QEMU") or "qemu-system-x86_64"
    binary = shutil.which(wanted)
    if binary is None:
        raise ToolError(
            [wanted],
            127,
            "no such program",
            remedy="install QEMU (qemu-system-x86), or name one in QMPBLOCK_QEMU",
        )
    return binary


@dataclass(frozen=True, slots=True)
class Tools:
    """The qemu-img and qemu-io that belong to one QEMU."""

    img: str
    io: str

    @classmethod
    def of(cls, qemu: str | None = None) -> Tools:
        """Find those beside the program `qemu` (None: the QEMU under test), else the system's.

        :raise ToolError: one is missing.
        """
        beside = Path(qemu or find_qemu()).resolve().parent
        programs = []
        for name in ("qemu-img", "qemu-io"):
            program = shutil.which(name, path=str(beside)) or shutil.which(name)
            if program is None:
                raise ToolError([name], 127, "no such program", remedy="install qemu-utils")
            programs.append(program)
        return cls(*programs)

    async def run(self, *command: str, stdin: str = "") -> str:
        """Run one of them and return what it printed. Cancelling kills it.

        :raise ToolError: it failed; the command, its exit code and stderr are inside.
        """
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await process.communicate(stdin.encode())
        except BaseException:
            if process.returncode is None:
                process.kill()
            await process.wait()
            raise
        assert process.returncode is not None  # communicate() waited
        if process.returncode != 0:
            # qemu-io reports a failed request on stdout.
            said = err.decode(errors="replace") + out.decode(errors="replace")[-2000:]
            raise ToolError(command, process.returncode, said)
        return out.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """An image that exists.

    :param secret: the passphrase, as (id of the secret object, data).
    :param faults: blkdebug's `inject-error` rules for its file, in a running VM only.
    :param slow: bytes a second that its file does, in a running VM only; None: no limit.
    """

    spec: Image
    path: Path
    backing: BuiltImage | None = None
    data_file: Path | None = None
    secret: tuple[str, str] | None = None
    faults: tuple[Mapping[str, Any], ...] = ()
    slow: int | None = None

    def chain(self) -> list[BuiltImage]:
        """Return this image and everything below it, this one first."""
        layers, layer = [], self
        while True:
            layers.append(layer)
            if layer.backing is None:
                return layers
            layer = layer.backing

    def describe(
        self,
        *,
        node: str | None = None,
        discard: str | None = "unmap",
        detect_zeroes: str = "off",
        live: bool = False,
    ) -> dict[str, Any]:
        """Return the blockdev description of the whole chain, for `-blockdev` or `json:`.

        :param node: the active layer's node name; the others get `NODE-1`, `NODE-2`, ...
            from the top, each file `...-file`. None: no names.
        :param discard: of the active layer; also `detect_zeroes`.
        :param live: for a running VM: with `faults` and `slow`.
        """
        # From the bottom up: 150 layers are no reason to recurse.
        below: dict[str, Any] | None = None
        chain = self.chain()
        for depth in range(len(chain) - 1, -1, -1):
            name = node if node is None or depth == 0 else f"{node}-{depth}"
            below = chain[depth]._describe_layer(name, below, discard if depth == 0 else None)
            if live:
                below["file"] = chain[depth]._hamper(name, below["file"])
        assert below is not None  # a chain has at least one layer
        if detect_zeroes != "off":
            below["detect-zeroes"] = detect_zeroes
        return below

    def _describe_layer(
        self, node: str | None, backing: dict[str, Any] | None, discard: str | None
    ) -> dict[str, Any]:
        def named(suffix: str) -> dict[str, Any]:
            return {} if node is None else {"node-name": node + suffix}

        # Said even where it is -blockdev's default: qemu-io's is the other one.
        unmap = {} if discard is None else {"discard": discard}
        layer: dict[str, Any] = {"driver": self.spec.format, **named(""), **unmap}
        layer["file"] = {"driver": "file", **named("-file"), "filename": str(self.path), **unmap}
        if self.data_file is not None:
            layer["data-file"] = {
                "driver": "file",
                **named("-data"),
                "filename": str(self.data_file),
                **unmap,
            }
        if self.secret is not None and self.spec.format == "luks":
            layer["key-secret"] = self.secret[0]
        elif self.secret is not None:
            layer["encrypt"] = {"format": "luks", "key-secret": self.secret[0]}
        if backing is not None:
            layer["backing"] = backing
        return layer

    def _hamper(self, node: str | None, file: dict[str, Any]) -> dict[str, Any]:
        def named(suffix: str) -> dict[str, Any]:
            return {} if node is None else {"node-name": node + suffix}

        if self.faults:
            rules = [dict(rule) for rule in self.faults]
            file = {"driver": "blkdebug", **named("-faults"), "image": file, "inject-error": rules}
        if self.slow is not None:
            group = self.slow_group()
            file = {"driver": "throttle", **named("-slow"), "throttle-group": group, "file": file}
        return file

    def slow_group(self) -> str:
        """Return the id of the throttle group that `slow` needs."""
        return "slow-" + hashlib.sha256(self.spec.file.encode()).hexdigest()[:8]

    def secrets(self) -> dict[str, str]:
        """Return the secret objects that the chain needs: id to data."""
        return dict(layer.secret for layer in self.chain() if layer.secret is not None)

    def _arguments(self, *, discard: str = "unmap", detect_zeroes: str = "off") -> list[str]:
        described = self.describe(discard=discard, detect_zeroes=detect_zeroes)
        return [*secret_arguments(self.secrets()), "json:" + json.dumps(described)]

    async def map(self, tools: Tools) -> list[dict[str, Any]]:
        """Return what `qemu-img map --output=json` prints for the chain. It must be closed.

        :raise ToolError: qemu-img failed.
        """
        printed = await tools.run(tools.img, "map", "--output=json", *self._arguments())
        records: list[dict[str, Any]] = json.loads(printed)
        return records

    async def check(self, tools: Tools) -> None:
        """Run `qemu-img check` on this image (not on those below), where its format has one.

        :raise ToolError: it is damaged, or leaks clusters.
        """
        if self.spec.format in ("qcow2", "qed", "vdi", "vhdx", "parallels", "vmdk"):
            await tools.run(tools.img, "check", *self._arguments())

    async def digest(self, tools: Tools) -> str:
        """Return a hash of the whole content that a guest sees. The chain must be closed.

        Zeros count the same however they are stored, so disks of 1 TiB are quick. A copy of
        the data is written beside the image meanwhile.

        :raise ToolError: qemu-img failed.
        """
        with tempfile.TemporaryDirectory(dir=self.path.parent) as scratch:
            raw = Path(scratch) / "content.raw"
            await tools.run(tools.img, "convert", "-O", "raw", *self._arguments(), str(raw))
            return await asyncio.to_thread(content_digest, raw)

    async def apply(
        self,
        operations: Iterable[Operation],
        tools: Tools,
        *,
        discard: str = "unmap",
        detect_zeroes: str = "off",
    ) -> None:
        """Do `operations` to the closed image, in order.

        :raise ToolError: one of them failed.
        """
        batch: list[str] = []
        for operation in operations:
            if operation.verb == "snapshot":
                await self._run_io(batch, tools, discard, detect_zeroes)
                batch = []
                await tools.run(tools.img, "snapshot", "-c", operation.name, *self._arguments())
            elif operation.verb == "fallocate":
                await self._run_io(batch, tools, discard, detect_zeroes)
                batch = []
                _fallocate(self.path, operation.offset, operation.length)
            else:
                batch.append(qemu_io_command(operation))
        await self._run_io(batch, tools, discard, detect_zeroes)

    async def _run_io(
        self, commands: Sequence[str], tools: Tools, discard: str, detect_zeroes: str
    ) -> None:
        if commands:
            arguments = self._arguments(discard=discard, detect_zeroes=detect_zeroes)
            # Unsafe: qemu-io's own default flushes after every write.
            await tools.run(
                tools.io, "-t", "unsafe", *arguments, stdin="\n".join([*commands, "quit", ""])
            )


@dataclass(frozen=True, slots=True)
class BuiltDisk:
    """A disk whose images exist."""

    spec: Disk
    active: BuiltImage

    async def replay(self, tools: Tools) -> None:
        """Do to the closed image what happens to the attached one: the guest's later writes.

        With copy-on-read also what QEMU's own look for a partition table at start copies
        (hd_geometry_guess reads sector 0; nvme has no geometry).
        """
        attach = self.spec.attach
        if "copy-on-read" in attach.filters and attach.device != "nvme":
            wrapped = {"driver": "copy-on-read", "file": self.active.describe()}
            secrets = secret_arguments(self.active.secrets())
            await tools.run(tools.io, *secrets, "-c", "read 0 512", "json:" + json.dumps(wrapped))
        await self.active.apply(
            self.spec.guest,
            tools,
            discard=attach.discard,
            detect_zeroes=attach.detect_zeroes,
        )


@dataclass(frozen=True, slots=True)
class BuiltScenario:
    """A scenario whose images exist in `directory`."""

    scenario: Scenario
    directory: Path
    disks: tuple[BuiltDisk, ...]
    tools: Tools

    def disk(self, name: str) -> BuiltDisk:
        """Return the disk of that name.

        :raise KeyError: there is none.
        """
        return {disk.spec.name: disk for disk in self.disks}[name]

    async def replayed(self, directory: Path) -> BuiltScenario:
        """Make the same images anew in `directory` and do the guest's writes to them.

        A copy of the files would lose what `cp` does not see (holes, reserved blocks,
        absolute backing names); a scenario is deterministic, so making it twice is exact.
        """
        again = await build(self.scenario, directory, self.tools)
        for disk in again.disks:
            await disk.replay(self.tools)
        return again


async def build(scenario: Scenario, directory: Path, tools: Tools | None = None) -> BuiltScenario:
    """Make every image of `scenario` in `directory`, which is made if it is not there.

    :raise ToolError: a tool failed; what exists so far stays for inspection.
    """
    tools = tools or Tools.of()
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    images: dict[str, BuiltImage] = {}
    disks = []
    for disk in scenario.disks:
        for image in disk.images:
            secret_id = f"secret-{len(images)}"
            images[image.file] = await _build_image(image, directory, images, secret_id, tools)
        disks.append(BuiltDisk(disk, images[disk.active.file]))
    return BuiltScenario(scenario, directory, tuple(disks), tools)


async def _build_image(
    image: Image,
    directory: Path,
    images: Mapping[str, BuiltImage],
    secret_id: str,
    tools: Tools,
) -> BuiltImage:
    built = BuiltImage(
        spec=image,
        path=directory / image.file,
        backing=None if image.backing is None else images[image.backing],
        data_file=None if image.data_file is None else directory / image.data_file,
        secret=None if image.secret is None else (secret_id, image.secret),
    )
    options = dict(image.options)
    if built.data_file is not None:
        options["data_file"] = str(built.data_file)
    if image.secret is not None:
        prefix = "" if image.format == "luks" else "encrypt."
        options[f"{prefix}key-secret"] = secret_id
        options[f"{prefix}iter-time"] = "10"  # ms; the default of two seconds is for secrets
    command = [tools.img, "create", "-q", "-f", image.format]
    command += secret_arguments(built.secrets())
    if options:
        command += ["-o", ",".join(f"{key}={_escape(value)}" for key, value in options.items())]
    if built.backing is not None:
        command += _backing_arguments(image, built.backing)
    size = max(512, image.size - image.size % 512)
    if image.secret is None:
        await tools.run(*command, str(built.path), str(size))
    else:
        await _create_encrypted((*command, str(size)), built.path, tools)
    if image.backing is not None and not image.backing_format and image.format == "qcow2":
        _forget_backing_format(built.path)
    if size != image.size:
        os.truncate(built.path, image.size)
    await built.apply(image.content, tools)
    return built


def _backing_arguments(image: Image, backing: BuiltImage) -> list[str]:
    arguments = []
    if image.backing_name == "relative":
        arguments += ["-b", backing.path.name]
    elif image.backing_name == "absolute":
        arguments += ["-b", str(backing.path)]
    else:
        arguments += ["-b", "json:" + json.dumps(backing.describe(discard=None))]
    arguments += ["-F", backing.spec.format]
    if image.format == "qcow2":
        # The scenario gives the size, and an encrypted or oddly named backing image need not
        # be opened by what the header says.
        arguments.append("-u")
    return arguments


_encrypted: dict[tuple[str, ...], list[tuple[int, bytes]]] = {}


async def _create_encrypted(command: tuple[str, ...], path: Path, tools: Tools) -> None:
    """Create an encrypted image, or copy one that this process created with the same command.

    Creating one takes two seconds (the key derivation is timed), and each has a new key: what
    was never written reads differently in each, so that no two could be compared.
    """
    if command not in _encrypted:
        *options, size = command

        async def create() -> None:
            await tools.run(*options, str(path), size)

        await luks.retried(create)
        _encrypted[command] = list(_data(path))
        return
    with path.open("wb") as file:
        for offset, data in _encrypted[command]:
            file.seek(offset)
            file.write(data)
            file.truncate(offset + len(data))


def _data(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of the data in a sparse file; the last one ends where it ends."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        done = 0
        while done < size:
            try:
                start = os.lseek(file.fileno(), done, os.SEEK_DATA)
            except OSError:  # ENXIO: no data after `done`
                break
            done = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            file.seek(start)
            yield start, file.read(done - start)
        if done < size:
            yield size, b""


def _forget_backing_format(path: Path) -> None:
    """Remove the backing format from a new qcow2 header, as images of old times lack it.

    qemu-img has refused to make such images since 6.1. The record is the first of the header
    extensions (QEMU docs/interop/qcow2.txt), so an end mark in its place removes it.
    """
    with path.open("r+b") as file:
        version, length = struct.unpack(">4xI92xI", file.read(104))
        start = 72 if version == 2 else length
        file.seek(start)
        (kind,) = struct.unpack(">I", file.read(4))
        if kind != _QCOW2_BACKING_FORMAT:
            raise ToolError([str(path)], 1, "its first header extension is no backing format")
        file.seek(start)
        file.write(bytes(8))


def secret_arguments(secrets: Mapping[str, str]) -> list[str]:
    return [
        argument
        for name, data in secrets.items()
        for argument in ("--object", f"secret,id={name},data={_escape(data)}")
    ]


def _escape(value: str) -> str:
    """Double the commas of an option's value, as QEMU's option syntax wants."""
    return value.replace(",", ",,")


def qemu_io_command(operation: Operation) -> str:
    """Return the qemu-io command for a write, zero, discard, compress or flush."""
    span = f"{operation.offset} {operation.length}"
    match operation.verb:
        case "write":
            return f"write -P {operation.pattern} {span}"
        case "compress":
            return f"write -c -P {operation.pattern} {span}"
        case "zero":
            return f"write -z {'-u ' if operation.unmap else ''}{span}"
        case "discard":
            return f"discard {span}"
        case "flush":
            return "flush"
        case _:
            raise ValueError(f"qemu-io cannot do {operation.verb}")


def _fallocate(path: Path, offset: int, length: int) -> None:
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), offset, length)


def content_digest(path: Path) -> str:
    """Hash a raw file's size and the blocks in it that are not all zero."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"size {size}\n".encode())
        done = 0
        while done < size:
            try:
                start = os.lseek(file.fileno(), done, os.SEEK_DATA)
            except OSError:  # ENXIO: no data after `done`
                break
            done = start - start % _DIGEST_BLOCK
            file.seek(done)
            block = file.read(_DIGEST_BLOCK)
            if block.count(0) != len(block):
                digest.update(f"{done}\n".encode())
                digest.update(block)
            done += len(block)
    return digest.hexdigest()
