"""What a copy that was broken off has left of a file: TARGET.partial, from which another goes on.

Whatever it holds is compared with the disk before anything relies on it, and what differs is
written anew. So it matters only that it is of the disk's size and of the format that is asked for,
that it is in nobody's use, and that its header leads nowhere else: to no backing image but the one
that the copy is to lie on, and to no data file, which QEMU would open and write to.
"""

from __future__ import annotations

import os
import posixpath
import stat
import struct
from typing import TYPE_CHECKING

from qmpblock.errors import UNTOUCHED, Error, InUseError, RequestError, printable
from qmpblock.graph.places import FileId
from qmpblock.host.writers import check_unwritten
from qmpblock.names import partial_file

if TYPE_CHECKING:
    from qmpblock.copying.plan import CopyPlan
    from qmpblock.host.ourfiles import Directory

__all__ = ["find_partial", "wrong_header"]

_MAGIC = b"QFI\xfb"
_HEAD = 64 << 10  # bytes: a cluster of those that we make; the name of a backing image is in it
# docs/interop/qcow2.txt, from its magic on
_FIRST = struct.Struct(">4sIQIIQIIQQIIQ")
_FEATURES = struct.Struct(">Q")
_LUKS = 2


def find_partial(directory: Directory, plan: CopyPlan, backing_name: str | None) -> FileId | None:
    """Find what a copy to a plan's file goes on from; None where there is nothing.

    :param directory: of that file.
    :param backing_name: what the header is to say of the image that the copy lies on; None: what
        the plan says.
    :raise RequestError: what is there is not what this copy would have made.
    :raise InUseError: somebody writes to it.
    :raise Error: it cannot be read.
    """
    path = partial_file(plan.file)
    name = posixpath.basename(path)
    try:
        status = directory.status(name)
        if status is None:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise _not_so(path, "it is no regular file")
        found = FileId.of(status)
        assert found is not None  # it is a regular file
        fd = directory.open(name, found)
        try:
            head = os.pread(fd, _HEAD, 0) if plan.format != "raw" else b""
        finally:
            os.close(fd)
    except OSError as error:
        raise Error(
            f"cannot read {printable(path)}: {error.strerror}", standing=UNTOUCHED
        ) from None
    if plan.format == "raw":
        why = _wrong_size(status.st_size, plan.size)
    else:
        named = None if plan.backing is None else backing_name or plan.backing.file
        why = wrong_header(head, plan.size, named, encrypted=plan.secret is not None)
    if why is not None:
        raise _not_so(path, why)
    try:
        check_unwritten([path])
    except InUseError as error:
        error.remedy = "wait for the copy that is being made there, or end it"
        raise
    return found


def wrong_header(
    head: bytes, size: int, backing_name: str | None, *, encrypted: bool
) -> str | None:
    """Say why a qcow2 image is not one that we would have made; None where it could be. Pure.

    :param head: its first cluster, or more.
    :param size: of the disk, in bytes.
    :param backing_name: what it is to say of its backing image; None: that it has none.
    :param encrypted: whether it is to be.
    """
    if len(head) < _FIRST.size + _FEATURES.size or not head.startswith(_MAGIC):
        return "it is no qcow2 image"
    _, version, at, length, _, its, crypt, _, _, _, _, snapshots, _ = _FIRST.unpack_from(head)
    if version != 3 or _FEATURES.unpack_from(head, _FIRST.size)[0] or snapshots:
        return "it is a qcow2 image that qmpblock does not make, or a damaged one"
    named = head[at : at + length] if at else None
    if named != (None if backing_name is None else os.fsencode(backing_name)):
        where = "none" if named is None else printable(os.fsdecode(named))
        return f"the backing image that it names is {where}"
    if (crypt == _LUKS) is not encrypted:
        return "it is not encrypted, as the disk is" if encrypted else "it is encrypted"
    return _wrong_size(its, size)


def _wrong_size(its: int, size: int) -> str | None:
    return None if its == size else f"it is of {its} bytes, and the disk of {size}"


def _not_so(path: str, why: str) -> RequestError:
    return RequestError(
        f"nothing can go on from {printable(path)}: {why}",
        standing=UNTOUCHED,
        remedy="resume it with the --format and --layers with which it was begun; or remove it, "
        "and copy anew",
    )
