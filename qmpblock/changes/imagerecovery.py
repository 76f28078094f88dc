"""Recovery of images after QEMU died in the middle of a change (`recover_images`).

The journals on this host, or beside the images, say what the images' headers cannot: which image
holds the newest data, and how it is opened.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmpblock.changes.journal import Journal
from qmpblock.changes.operations import StagedCommit
from qmpblock.changes.record import PIVOTED, Record
from qmpblock.changes.survey import survey, unproven
from qmpblock.changes.verdict import ImageVerdict
from qmpblock.errors import (
    UNTOUCHED,
    BusyError,
    Error,
    NotFoundError,
    ToolError,
    UnsupportedError,
    printable,
    shell_words,
)
from qmpblock.graph.jsonname import from_text, innermost
from qmpblock.graph.opened import is_nested
from qmpblock.graph.places import FileId
from qmpblock.host import ourfiles
from qmpblock.host.imagechain import blockdev
from qmpblock.host.keycommand import keyed
from qmpblock.host.processes import is_running
from qmpblock.host.qemuimg import QemuImg
from qmpblock.host.toolwords import in_use_by_another, lacks_key, lacks_space
from qmpblock.names import journal_beside, partial_file

__all__ = ["ImageRecovery", "holds_nothing", "is_about", "recover_images", "recover_journal"]

_log = logging.getLogger(__name__)
_QCOW2, _CRYPT = b"QFI\xfb", slice(32, 36)  # the field crypt_method
_INSIDE = re.compile(r"/proc/\d+/root(/.+)", re.DOTALL)


@dataclass(frozen=True)
class ImageRecovery:
    """What a change that QEMU's end interrupted means for the images.

    :ivar what: what it was about, for people.
    :ivar removed: files that were (in a dry run: would be) removed.
    :ivar opened: the options that open the image to start from, where it is another one than
        before, and its file name and format do not suffice; else empty.
    """

    what: str
    run: str
    verdict: ImageVerdict
    removed: tuple[str, ...]
    opened: str = ""

    def describe(self) -> str:
        """Say what is to be done, for people."""
        text = f"start the VM from {_list(self.verdict.start)}: {self.verdict.why}."
        if self.opened:
            text += f" Its name does not suffice; it was open as {printable(self.opened, 4000)}."
        if self.verdict.stale:
            text += f" Never use or commit {_list(self.verdict.stale)} again: stale."
        for overlay, base in self.verdict.commit:
            text += f" {printable(overlay)} is committed into {printable(base)} and removed."
        if self.removed:
            text += f" Removed: {_list(self.removed)}."
        if self.verdict.kept:
            kept = _list([partial_file(file) for file in self.verdict.kept])
            text += (
                f" What was copied is kept in {kept}: the same copy with --resume goes on from it."
            )
        return text


def _list(files: Sequence[str]) -> str:
    return ", ".join(printable(file) for file in files)


async def recover_images(
    images: Sequence[str | os.PathLike[str]], *, dry_run: bool = False, believe: bool = False
) -> list[ImageRecovery]:
    """Say which image to start from, after QEMU died in the middle of a change of ours.

    Finds the change's journal in the state directory or beside the image. Overlays that
    nothing was ever written to are removed, then the journal; no image is changed.

    :param images: any image of the chain; the active one is best.
    :param dry_run: change nothing.
    :param believe: a journal beside an image, too, that no key of this installation proves: only
        where nobody who is not trusted can write to that directory.
    :return: one for each change that was interrupted; none where the images are safe.
    :raise NotFoundError: there is no such image, and no journal is about one.
    :raise RecordError: a journal that may be about them cannot be read, or not be proven to be
        ours; nothing was touched.
    :raise BusyError: the QEMU that the change was made in still runs.
    """
    names = [os.path.realpath(image) for image in images]
    for image, name in zip(images, names, strict=True):
        if not Path(name).exists() and not is_about(name):
            raise NotFoundError(f"there is no image {printable(os.fspath(image))}")
    seen = survey(tuple(names))
    for error in seen.unreadable:
        if error.files is None or _is_about(error.files, names):
            raise error
    for path, why in seen.distrusted:
        _log.warning("the journal %s is not believed: %s", printable(path), why)
    if seen.unproven and not believe:
        raise unproven(seen.unproven[0])  # it lies beside one of them
    recoveries = []
    for journal in (*seen.journals, *(seen.unproven if believe else ())):
        record = journal.record
        if not _is_about((*record.images, *record.files), names):
            continue
        if is_running(record.vm.pid, record.vm.start, record.vm.boot):
            raise BusyError(
                f"the VM still runs (process {record.vm.pid}) in which {record.describe()} was "
                "not finished",
                standing=UNTOUCHED,
                remedy=f"run: qmpblock recover {shell_words([record.vm.monitor])}",
            )
        if not record.vm.pid:  # a TCP monitor: the locks on the images tell
            await _check_unused(record)
        recoveries.append(await recover_journal(journal, dry_run=dry_run))
    return recoveries


def is_about(image: str) -> bool:
    """Whether a change that was not finished is about an image, which may be gone by now.

    As far as the journals say that can be read.
    """
    name = os.path.realpath(image)
    seen = survey((name,))
    return any(
        _is_about((*journal.record.images, *journal.record.files), [name])
        for journal in (*seen.journals, *seen.unproven)
    )


def _is_about(files: Iterable[str], names: Iterable[str]) -> bool:
    files = tuple(files)
    # What only the VM saw under its name lies here under another one, which ends in that.
    inside = [match[1] for file in files if (match := _INSIDE.fullmatch(file))]
    known = {os.path.realpath(file) for file in files if not _INSIDE.fullmatch(file)}
    return any(name in known or any(name.endswith(end) for end in inside) for name in names)


async def _check_unused(record: Record) -> None:
    """See that no QEMU has the images open for writing.

    :raise BusyError: one has.
    """
    for file in filter(os.path.exists, (*record.images, *record.files)):
        if await QemuImg().in_use(file):
            raise BusyError(
                f"{printable(file)} is in use: the VM in which {record.describe()} was not "
                "finished still runs, or another has been started",
                standing=UNTOUCHED,
                remedy=f"run: qmpblock recover {shell_words([record.vm.monitor])}",
            )


async def recover_journal(journal: Journal, *, dry_run: bool = False) -> ImageRecovery:
    """Do what `recover_images` does, for one journal whose QEMU is gone.

    :raise ToolError: an overlay cannot be looked at; nothing was removed.
    """
    record = journal.record
    empty = {}
    formats: dict[str, str] = {}
    for entry in journal.entries:  # a file that was made anew has no header yet
        formats.pop(str(entry.get("made")), None)
        if "created" in entry:
            formats[str(entry["created"])] = str(entry.get("format", ""))
    made = journal.made()
    for file, identity in made.items():
        path = Path(file)
        with contextlib.suppress(FileNotFoundError), ourfiles.Directory(path.parent) as directory:
            if directory.holds(path.name, FileId(*identity)):
                empty[file] = file not in formats or await holds_nothing(
                    file, formats[file], identity
                )
    verdict = record.verdict(journal.entries, empty)
    if not journal.complete and (
        # Where the image is not on this host, all is in the one journal that there is.
        verdict.commit or (verdict.uncertain and os.path.lexists(record.home))
    ):
        raise Error(
            f"whether {printable(record.top_file)} or {printable(record.base_file)} is newer "
            "cannot be told: the journal that says so, beside the image, cannot be read",
            standing=UNTOUCHED,
            remedy=f"look for {journal_beside(printable(record.home), record.run)}, which "
            "must belong to this user or root, and be writable for nobody else",
        )
    if verdict.commit:
        assert isinstance(record, StagedCommit)  # no other has an overlay that comes home
        _check_same_files(record)
    if not dry_run:
        for overlay, base in verdict.commit:
            assert isinstance(record, StagedCommit)
            fmt = formats.get(overlay) or "qcow2"
            await _commit(record, overlay, fmt, base, made[overlay])
            # Killed here, and the VM started: the overlay must not be committed again.
            with contextlib.suppress(Error):  # no room: then it goes the sooner
                journal.mark(**{PIVOTED: True})
            ourfiles.remove(overlay, FileId(*made[overlay]))
        for file in verdict.unused:
            ourfiles.remove(file, FileId(*made[file]))
        for file in verdict.kept:
            ourfiles.keep(file, FileId(*made[file]), partial_file(file))
        if not verdict.waits:
            journal.remove()
    return ImageRecovery(record.describe(), record.run, verdict, verdict.unused, verdict.opened)


def _check_same_files(record: StagedCommit) -> None:
    """See that what an overlay would be committed into is what it was taken of.

    By inode only: a device may have another number after the host was started again.

    :raise Error: it was replaced since, by a copy or a backup say; nothing was touched.
    """
    for file, inode in record.written:
        try:
            same = Path(file).stat().st_ino == inode
        except FileNotFoundError:
            same = False
        if not same:
            raise Error(
                f"{printable(file)} is not the file any more that {printable(record.top_file)} was "
                "made over: it has been removed or replaced since. The overlay holds only what the "
                "guest wrote last, and in another image that would be corruption",
                standing=f"nothing was touched; {printable(record.top_file)} is kept",
                remedy="put the file itself back at its name, and run this again. If only an exact "
                "copy of it is left, one that was made after QEMU had ended: qemu-img rebase -u "
                "-F FMT -b COPY OVERLAY, then qemu-img commit OVERLAY",
            )


async def _commit(
    record: StagedCommit, overlay: str, fmt: str, base: str, made: tuple[int, int]
) -> None:
    """Bring an overlay home.

    :param made: its device and inode.
    """
    tool = QemuImg()
    how = from_text(record.base_opened)
    if not how:
        # Refuses a chain in which a format would have to be guessed.
        first, *below = await tool.chain(base, record.base_format)
        how = blockdev(first.format, first.file, below)
    # The image lies beside its overlay; its data file may lie anywhere.
    homes = {(made[0] if path == base else None, inode) for path, inode in record.written}
    known = {made, *homes} if homes else None  # an older record does not say
    hidden = is_nested(how)
    try:
        # An interrupted job may have left another name, or none.
        await tool.rebase(overlay, fmt, base, record.base_format, known=known)
        if hidden:  # or the name would count, and what is said besides would contradict it
            await tool.rebase(overlay, fmt, "", "", known=known)
        await tool.commit(overlay, fmt, how, known=known)
    except (ToolError, UnsupportedError) as error:
        if hidden:
            with contextlib.suppress(ToolError):
                await tool.rebase(overlay, fmt, base, record.base_format, known=known)
        kept = f"{printable(overlay)} holds the newest data"
        if isinstance(error, UnsupportedError):
            raise Error(
                error.message, standing=f"nothing is lost: {kept}", remedy=error.remedy
            ) from None
        if lacks_key(error.stderr):
            error.standing = f"nothing was touched; {kept}"
            error.remedy = (
                "the images are encrypted, and we have no key. Before the VM is started, bring the "
                f"overlay home with it: {_with_key(overlay, fmt, base, how)}"
            )
        elif lacks_space(error.stderr):
            error.standing = (
                f"nothing is lost: {printable(overlay)} holds what the guest wrote last, and "
                f"{printable(base)} the rest"
            )
            error.remedy = "make room there, and run this again before the VM is started"
        raise


def _with_key(overlay: str, fmt: str, base: str, how: dict[str, Any]) -> str:
    """Return the commands that bring an overlay home that is encrypted as its image is.

    Once it is gone, what is left of the change is taken away without a key.
    """
    top = blockdev(fmt, overlay)

    def encrypted(options: Mapping[str, Any]) -> bool:
        return options["file"] == top["file"] or _is_encrypted(options)

    commands = []
    if is_nested(how):  # as `_commit` does
        name, keys = keyed(top, encrypted)
        commands.append(["qemu-img", "rebase", "-u", "-b", "", *keys, name])
    name, keys = keyed(top | {"backing": how}, encrypted, sharing=2)
    commands += [
        ["qemu-img", "commit", "-d", *keys, name],
        ["rm", overlay],
        ["qmpblock", "recover", base],
    ]
    return " && ".join(map(shell_words, commands))


def _is_encrypted(options: Mapping[str, Any]) -> bool:
    """Whether an image is encrypted, by its format or its header (docs/interop/qcow2.txt)."""
    if options["driver"] != "qcow2":
        return bool(options["driver"] == "luks")
    head = b""
    with contextlib.suppress(OSError):
        fd = ourfiles.open_plain(str(innermost(options).get("filename")))
        try:
            head = os.pread(fd, _CRYPT.stop, 0)
        finally:
            os.close(fd)
    return head[:4] == _QCOW2 and any(head[_CRYPT])


async def holds_nothing(file: str, fmt: str, made: tuple[int, int]) -> bool:
    """Whether an overlay holds nothing; False where that cannot be told: it is kept then."""
    try:
        seen = await QemuImg().map(blockdev(fmt, file), [fmt], known=[made])
    except UnsupportedError:
        return False
    except ToolError as error:
        if in_use_by_another(error.stderr):
            raise
        return False  # encrypted, say
    return not seen.where(present=True)
