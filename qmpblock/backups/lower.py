"""Whether what a disk lies on holds what it did at a backup: told by the files. Pure.

What a guest writes goes into the active layer, whose dirty bitmaps tell of it. Of what is changed
below that one they do not: by `qemu-img commit` or `rebase`, by a newer golden image that is put in
the place of one. So a backup notes what lies below, and the next one compares:

- the same files in the same order (by length, time of the last write, and inode; by no name, for a
  directory may be renamed, and by no device, whose number is another one after each boot), opened
  as the same: all is as it was;
- the same files, and one was written to: not;
- others: not, unless QEMU has had the disk open ever since. It has changed the chain itself then
  (a stream, a commit of lower layers, a migration), and the guest saw nothing of it.

What can be seen nowhere, as an image on another host, or of which nothing tells whether it is
written to, as a block device, is taken for what it was as long as it is opened as the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmpblock.errors import printable

if TYPE_CHECKING:
    from qmpblock.backups.point import LowerFile

__all__ = ["ELSEWHERE", "SEEN", "UNSEEN", "why_changed"]

SEEN, UNSEEN, ELSEWHERE = "seen", "unseen", "elsewhere"

_MOST = 3  # files that are named


def why_changed(
    was: Sequence[LowerFile] | None, now: Sequence[LowerFile] | None, *, stayed_open: bool
) -> str | None:
    """Say why what a disk lies on may hold something else than it did; None where it does not.

    :param was: at the backup, `now`: now; None: nobody looked, so it is taken for the same.
    :param stayed_open: whether QEMU has had the disk open ever since.
    """
    if was is None or now is None:
        return None
    pairs = list(zip(was, now, strict=False))
    if len(was) == len(now) and all(_same_file(*pair) for pair in pairs):
        return next((_changed(new) for old, new in pairs if _written(old, new)), None)
    if stayed_open:
        return None
    if len(was) != len(now):
        return f"the disk lies on {_names(now)} now, and lay on {_names(was)} at the last backup"
    return next((why for old, new in pairs if (why := _why(old, new)) is not None), None)


def _same_file(was: LowerFile, now: LowerFile) -> bool:
    """Whether both are one file, or neither can be seen, and are opened as the same."""
    if was.told != now.told or now.told == ELSEWHERE:
        return False
    return was.inode == now.inode and _opened(was) == _opened(now)


def _opened(one: LowerFile) -> tuple[str, int, int]:
    return one.format, one.offset, one.size


def _written(was: LowerFile, now: LowerFile) -> bool:
    return (was.length, was.modified) != (now.length, now.modified)


def _why(was: LowerFile, now: LowerFile) -> str | None:
    """Say of a file of a disk that was closed meanwhile why it may not be what it was."""
    name = printable(now.file)
    if now.told == ELSEWHERE:
        return (
            f"the backing image {name} was replaced, renamed or removed since the VM opened it, so "
            "nobody can tell whether that is what it was at the last backup"
        )
    if was.told == ELSEWHERE:
        return (
            f"the backing image {printable(was.file)} had been replaced, renamed or removed when "
            "the last backup was made, and the VM has opened it anew since"
        )
    if was.told == UNSEEN:
        return _otherwise(was, now)
    if now.told == UNSEEN:
        return (
            f"whether the backing image {name} was changed since the last backup cannot be seen "
            "from here any more"
        )
    if was.inode != now.inode:
        if was.file != now.file:
            return (
                f"the disk lies on {name} now, and lay on {printable(was.file)} at the last backup"
            )
        return f"the backing image {name} is another file than it was at the last backup"
    return _otherwise(was, now) or (_changed(now) if _written(was, now) else None)


def _otherwise(was: LowerFile, now: LowerFile) -> str | None:
    """Say how the layer is opened that a file is of, where that is not as it was."""
    if _opened(was) == _opened(now):
        return None
    return (
        f"the backing image {printable(now.file)} is opened as {_shape(now)} now, and was as "
        f"{_shape(was)} at the last backup"
    )


def _changed(one: LowerFile) -> str:
    return f"the backing image {printable(one.file)} was changed since the last backup"


def _shape(one: LowerFile) -> str:
    at = f", from byte {one.offset}" if one.offset else ""
    return f"{printable(one.format)} of {one.size} bytes{at}"


def _names(files: Sequence[LowerFile]) -> str:
    if not files:
        return "no other image"
    if len(files) > _MOST:
        return f"{len(files)} files"
    return " on ".join(printable(one.file) for one in files)
