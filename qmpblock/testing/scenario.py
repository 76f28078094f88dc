"""Scenarios: one YAML file says which images exist, how they are attached, what is written.

A scenario is read into frozen dataclasses; nothing is created here. Reading is strict: an
unknown key, a missing one, a size that is none, a range outside its image is a
`ScenarioError` that names the file, the line and the key. docs/testing.md is the reference
of the format; fixtures/ holds examples of everything in it.

No scalar has an implicit type (YAML's `off` would be False, `0x10` an int): every value is
read as the text that stands there, and each key knows what it wants.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

from qmpblock.errors import RequestError
from qmpblock.testing._yaml import Mapping, ScenarioError, parse_size, read_mapping
from qmpblock.testing.operations import Operation, read_operations

__all__ = [
    "Attachment",
    "Disk",
    "Drawing",
    "Image",
    "Operation",
    "Requirement",
    "Scenario",
    "ScenarioError",
    "load_scenario",
    "load_scenarios",
    "parse_scenario",
    "parse_size",
]

Format = Literal["raw", "qcow2", "qed", "vmdk", "qcow", "vdi", "vpc", "vhdx", "parallels", "luks"]
Device = Literal["virtio-blk", "virtio-scsi", "ide", "nvme", "usb-storage"]
Machine = Literal["pc", "q35", "microvm"]
Style = Literal["blockdev", "drive", "drive-if"]
Filter = Literal["throttle", "copy-on-read"]
IOThread = Literal["none", "one", "per-queue"]

BACKED_FORMATS = frozenset({"qcow2", "qed", "vmdk", "qcow"})
_COMPRESSED_FORMATS = frozenset({"qcow2", "qcow"})
_FILE_NAME = re.compile(r"[^/\0]+")
_ID = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Requirement:
    """Which QEMU versions a test or scenario is for, and why.

    :param text: comma-separated comparisons, all of which must hold: `">= 8.0, < 10"`.
    :raise RequestError: `text` is not such a list.
    """

    text: str
    reason: str = ""

    _COMPARISON = re.compile(r"\s*(>=|<=|==|<|>)\s*(\d+(?:\.\d+){0,2})\s*")

    def __post_init__(self) -> None:
        for part in self.text.split(","):
            if not self._COMPARISON.fullmatch(part):
                raise RequestError(
                    f"{part.strip()!r} is not a comparison with a QEMU version",
                    remedy='write, for example, ">= 8.0" or ">= 8.0, < 10"',
                )

    def allows(self, version: tuple[int, ...]) -> bool:
        """Whether QEMU `version` (major, minor, micro) meets it.

        A comparison looks at as many numbers as it names: `== 7.2` holds for 7.2.22.
        """
        for part in self.text.split(","):
            match = self._COMPARISON.fullmatch(part)
            assert match is not None  # __post_init__
            wanted = tuple(int(number) for number in match[2].split("."))
            shown = version[: len(wanted)]
            holds = {
                ">=": shown >= wanted,
                "<=": shown <= wanted,
                "==": shown == wanted,
                "<": shown < wanted,
                ">": shown > wanted,
            }[match[1]]
            if not holds:
                return False
        return True


@dataclass(frozen=True, slots=True)
class Image:
    """One image file.

    :param file: its name in the scenario's directory.
    :param size: virtual size in bytes.
    :param options: qemu-img's creation options (`-o`), as (name, value).
    :param backing: the file name of its backing image; None for none.
    :param backing_name: how the backing image is recorded in the header.
    :param backing_format: whether its format is recorded beside it.
    :param secret: the passphrase of an encrypted image.
    :param data_file: name of qcow2's external data file.
    :param content: what is done to it, in order, before the next image is made.
    """

    file: str
    format: Format
    size: int
    options: tuple[tuple[str, str], ...] = ()
    backing: str | None = None
    backing_name: Literal["relative", "absolute", "json"] = "relative"
    backing_format: bool = True
    secret: str | None = None
    data_file: str | None = None
    content: tuple[Operation, ...] = ()


@dataclass(frozen=True, slots=True)
class Attachment:
    """How a disk is attached.

    :param device: the guest device.
    :param id: its qdev id (`-drive if=...`: the drive's id); None for none.
    :param style: `blockdev`, `drive` (legacy, if=none) or `drive-if` (legacy, if=ide|virtio).
    :param node_names: whether every node has a name of ours (`blockdev` only).
    :param filters: above the format node, the device's root first.
    """

    device: Device = "virtio-blk"
    id: str | None = None
    style: Style = "blockdev"
    node_names: bool = True
    filters: tuple[Filter, ...] = ()
    iothread: IOThread = "none"
    discard: Literal["ignore", "unmap"] = "ignore"
    detect_zeroes: Literal["off", "on", "unmap"] = "off"


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk: its own images from base to active, its attachment, the guest's later writes."""

    name: str
    images: tuple[Image, ...]
    attach: Attachment
    guest: tuple[Operation, ...] = ()

    @property
    def active(self) -> Image:
        """The image that guest writes land in."""
        return self.images[-1]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture of a disk before and after an allocation, as in the 2011 proposal.

    A row is one layer, base first, without the implicit zeros; a cell is one block: a space
    for absent, `0` for explicit zeros, a letter for data. A scenario with a drawing takes
    its images' content from `before`; a letter is also the byte that is written.

    :param block: bytes that one cell stands for.
    :param before: one row for each image.
    :param after: the rows that are wanted afterwards.
    :param offset: where to allocate; with `length` in bytes.
    :param full: zeros get host space too.
    :param independent: the backing images are dropped afterwards.
    """

    block: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    offset: int
    length: int
    full: bool
    independent: bool

    def content(self, row: str) -> tuple[Operation, ...]:
        """Return what makes an image hold `row`."""
        return tuple(
            Operation("zero", index * self.block, self.block)
            if cell == "0"
            else Operation("write", index * self.block, self.block, ord(cell))
            for index, cell in enumerate(row)
            if cell != " "
        )


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything one file says. `name` is the file's name without its suffix."""

    name: str
    about: str
    disks: tuple[Disk, ...]
    machine: Machine = "pc"
    requires: Requirement | None = None
    empty_tray: bool = False
    drawing: Drawing | None = None

    def __str__(self) -> str:
        return self.name

    def images(self) -> Iterator[Image]:
        """Every image, in the order in which they are made."""
        for disk in self.disks:
            yield from disk.images


def load_scenarios(directory: Path | str, pattern: str = "*.yaml") -> list[Scenario]:
    """Read every scenario of a directory, sorted by name.

    :raise ScenarioError: one of them is wrong, or there is none.
    """
    paths = sorted(Path(directory).glob(pattern))
    if not paths:
        raise ScenarioError(f"no scenario matches {Path(directory) / pattern}")
    return [load_scenario(path) for path in paths]


def load_scenario(path: Path | str) -> Scenario:
    """Read one scenario from a file.

    :raise ScenarioError: it cannot be read, or what it says is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"cannot read {path}: {error}") from None
    return parse_scenario(text, path.stem, source=str(path))


def parse_scenario(text: str, name: str, *, source: str = "<text>") -> Scenario:
    """Read one scenario from YAML text.

    :param source: what errors call it.
    :raise ScenarioError: what it says is wrong.
    """
    top = read_mapping(text, source)
    about = top.text("about")
    machine = cast(Machine, top.choice("machine", get_args(Machine), "pc"))
    drawing = _drawing(top.mapping("drawing")) if "drawing" in top else None
    if "disks" in top:
        disks = tuple(
            _disk(entry, f"d{index}", machine) for index, entry in enumerate(top.mappings("disks"))
        )
    else:
        disks = (_disk(top, "d0", machine, whole=True),)
    if drawing is not None:
        disks = (_drawn(top, disks, drawing),)
    scenario = Scenario(
        name=name,
        about=about,
        disks=disks,
        machine=machine,
        requires=_requirement(top.mapping("requires")) if "requires" in top else None,
        empty_tray=top.flag("empty_tray", False),
        drawing=drawing,
    )
    if scenario.empty_tray and machine == "microvm":
        top.refuse("empty_tray", "microvm has no bus for a CD-ROM drive")
    top.finish()
    _check_together(top, scenario)
    return scenario


def _requirement(entry: Mapping) -> Requirement:
    text, reason = entry.text("qemu"), entry.text("reason")
    entry.finish()
    try:
        return Requirement(text, reason)
    except RequestError as error:
        raise entry.error("qemu", error.message) from None


def _disk(entry: Mapping, name: str, machine: str, *, whole: bool = False) -> Disk:
    if not whole:
        name = entry.text("name", name)
        if not _ID.fullmatch(name):
            entry.refuse("name", "must begin with a letter and hold only letters, digits, _ . -")
    images: list[Image] = []
    for index, item in enumerate(entry.mappings("images")):
        images.append(_image(item, name, index, images[-1] if images else None))
    attach = (
        _attachment(entry.mapping("attach"), f"v{name}", machine)
        if "attach" in entry
        else Attachment(id=f"v{name}")
    )
    size = images[-1].size
    guest = read_operations(entry, "guest", ("write", "zero", "discard", "flush"), size)
    if not whole:
        entry.finish()
    return Disk(name, tuple(images), attach, guest)


def _image(entry: Mapping, disk: str, index: int, previous: Image | None) -> Image:
    format_ = cast(Format, entry.choice("format", get_args(Format), "qcow2"))
    file = entry.text("file", f"{disk}-{index}.{format_}")
    if not _FILE_NAME.fullmatch(file) or file in (".", ".."):
        entry.refuse("file", "must be a file name without a directory")
    size = entry.size("size", previous.size if previous else None)
    if size <= 0 or (size % 512 and format_ != "raw"):
        entry.refuse("size", "must be a positive multiple of 512 (raw: of 1)")
    backing: str | None = previous.file if previous else None
    if "backing" in entry:
        named = entry.text("backing")
        backing = None if named == "none" else named
    if backing is not None and format_ not in BACKED_FORMATS:
        where = "backing" if "backing" in entry else "format"
        entry.refuse(where, f"{format_} cannot have a backing image")
    options = tuple(entry.texts("options").items())
    secret = entry.text("secret", "") or None
    encrypted = format_ == "luks" or any(key == "encrypt.format" for key, _ in options)
    if encrypted != (secret is not None):
        entry.refuse("secret", "goes with, and only with, luks or the option encrypt.format")
    data_file = entry.text("data_file", "") or None
    if data_file is not None and format_ != "qcow2":
        entry.refuse("data_file", f"{format_} cannot have a data file")
    image = Image(
        file=file,
        format=format_,
        size=size,
        options=options,
        backing=backing,
        backing_name=cast(
            Literal["relative", "absolute", "json"],
            entry.choice("backing_name", ("relative", "absolute", "json"), "relative"),
        ),
        backing_format=entry.flag("backing_format", True),
        secret=secret,
        data_file=data_file,
        content=read_operations(
            entry,
            "content",
            ("write", "zero", "discard", "compress", "fallocate", "snapshot"),
            size,
        ),
    )
    _check_content(entry, image)
    entry.finish()
    return image


def _check_content(entry: Mapping, image: Image) -> None:
    verbs = {operation.verb for operation in image.content}
    if "compress" in verbs and image.format not in _COMPRESSED_FORMATS:
        entry.refuse("content", f"{image.format} cannot hold compressed clusters")
    if "snapshot" in verbs and image.format != "qcow2":
        entry.refuse("content", f"{image.format} cannot hold internal snapshots")
    if "fallocate" in verbs and image.format != "raw":
        entry.refuse("content", "fallocate is for raw images")
    if image.format == "raw" and image.size % 512:
        for operation in image.content:
            if operation.end % 512:
                entry.refuse("content", "must be aligned to 512 bytes where the size is not")


def _attachment(entry: Mapping, default_id: str, machine: str) -> Attachment:
    device = cast(Device, entry.choice("device", get_args(Device), "virtio-blk"))
    style = cast(Style, entry.choice("style", get_args(Style), "blockdev"))
    wanted_id = entry.text("id", default_id)
    if wanted_id != "none" and not _ID.fullmatch(wanted_id):
        entry.refuse("id", "must begin with a letter and hold only letters, digits, _ . -")
    filters = tuple(cast(Filter, name) for name in entry.choices("filters", get_args(Filter)))
    attachment = Attachment(
        device=device,
        id=None if wanted_id == "none" else wanted_id,
        style=style,
        node_names=entry.flag("node_names", style == "blockdev"),
        filters=filters,
        iothread=cast(IOThread, entry.choice("iothread", get_args(IOThread), "none")),
        discard=cast(
            Literal["ignore", "unmap"], entry.choice("discard", ("ignore", "unmap"), "ignore")
        ),
        detect_zeroes=cast(
            Literal["off", "on", "unmap"],
            entry.choice("detect_zeroes", ("off", "on", "unmap"), "off"),
        ),
    )
    if attachment.node_names and style != "blockdev":
        entry.refuse("node_names", "a legacy -drive names no nodes")
    if style == "drive-if" and device not in ("ide", "virtio-blk"):
        entry.refuse("device", "-drive if= knows ide and virtio here")
    if style == "drive-if" and attachment.iothread != "none":
        entry.refuse("iothread", "-drive if= cannot give its device an iothread")
    if attachment.iothread != "none" and device not in ("virtio-blk", "virtio-scsi"):
        entry.refuse("iothread", f"{device} cannot run in an iothread")
    if attachment.iothread == "per-queue" and device != "virtio-blk":
        entry.refuse("iothread", "per-queue is for virtio-blk")
    if machine == "microvm" and (
        device not in ("virtio-blk", "virtio-scsi") or style == "drive-if"
    ):
        entry.refuse("device", "microvm has virtio-mmio only")
    entry.finish()
    return attachment


def _drawing(entry: Mapping) -> Drawing:
    before, after = _rows(entry, "before"), _rows(entry, "after")
    if len({len(row) for row in before + after}) != 1:
        entry.refuse("after", "every row of a drawing must have the same number of blocks")
    block = entry.size("block")
    whole = block * len(before[0])
    drawing = Drawing(
        block=block,
        before=before,
        after=after,
        offset=entry.size("offset", 0),
        length=entry.size("length", whole),
        full=entry.flag("full", False),
        independent=entry.flag("independent", False),
    )
    if drawing.offset + drawing.length > whole:
        entry.refuse("length", f"must stay inside the {whole} bytes that are drawn")
    entry.finish()
    return drawing


def _rows(entry: Mapping, key: str) -> tuple[str, ...]:
    rows = []
    for line in entry.text(key).splitlines():
        if not re.fullmatch(r"(\|[ 0A-Z])+\|", line.strip()):
            entry.refuse(key, f"{line!r} is not a row such as |X| |0|")
        rows.append(line.strip()[1::2])
    if len(rows) < 2 or set(rows[0]) != {"0"}:
        entry.refuse(key, "must begin with the row of implicit zeros, and have a layer below it")
    return tuple(rows[1:])


def _drawn(top: Mapping, disks: tuple[Disk, ...], drawing: Drawing) -> Disk:
    disk, rows = disks[0], drawing.before
    if len(disks) != 1 or len(disk.images) != len(rows):
        top.refuse("drawing", "goes with one disk that has an image for each row of `before`")
    if any(image.content or image.size != drawing.block * len(rows[0]) for image in disk.images):
        top.refuse("drawing", "says the content; the images say none, and have its size")
    images = tuple(
        replace(image, content=drawing.content(row))
        for image, row in zip(disk.images, rows, strict=True)
    )
    return replace(disk, images=images)


def _check_together(top: Mapping, scenario: Scenario) -> None:
    files: set[str] = set()
    for image in scenario.images():
        if image.backing is not None and image.backing not in files:
            top.refuse(None, f"the backing image {image.backing!r} is not one that stands before")
        for name in filter(None, (image.file, image.data_file)):
            if name in files:
                top.refuse(None, f"two images have the file name {name!r}")
            files.add(name)
    names = [disk.name for disk in scenario.disks]
    ids = [disk.attach.id for disk in scenario.disks if disk.attach.id is not None]
    if len(set(names)) != len(names) or len(set(ids)) != len(ids):
        top.refuse("disks", "two disks have the same name or id")
