"""How much space a file can be given at all: by the kernel's word, not by a VM's.

How large a disk is, its monitor says, which may be answered by whoever runs it. What is reserved
on that word takes host space from everybody, so it has to be possible first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qmpblock.errors import Error, RequestError, printable

__all__ = ["check_reservable", "end_of"]

_SECTOR = 512  # bytes; a raw disk is its file, rounded up to whole ones
_NOTHING = "nothing was reserved"


def end_of(place: int | str) -> int:
    """Return where a disk ends that a file holds from its beginning on, byte by byte.

    :param place: the file's path, or its descriptor.
    :raise OSError: there is no such file.
    """
    return -(-os.stat(place).st_size // _SECTOR) * _SECTOR  # noqa: PTH116  it may have no path


def check_reservable(
    file: str,
    pid: int,
    ranges: Sequence[tuple[int, int]],
    *,
    fd: int | None = None,
    grows: bool = False,
) -> None:
    """Refuse to reserve what cannot be had, however much room is made.

    :param file: its name; what is looked at where there is no descriptor.
    :param pid: of the VM's process.
    :param ranges: of the file, (start, stop) in bytes.
    :param grows: whether the file may become longer by what it is given.
    :raise RequestError: the ranges reach beyond the end of the file, together they are more than
        its file system, or beyond what that process may write.
    :raise Error: the file cannot be looked at.
    """
    place = file if fd is None else fd
    amount = sum(stop - start for start, stop in ranges)
    last = max((stop for _, stop in ranges), default=0)
    try:
        end, found = end_of(place), os.statvfs(place)
    except OSError as error:
        raise Error(
            f"cannot look at {printable(file)}: {error.strerror}", standing=_NOTHING
        ) from None
    if last > end and not grows:
        raise RequestError(
            f"by what the VM says its disk reaches to byte {last} of {printable(file)}, which "
            f"ends at byte {end}: no space is reserved there",
            standing=_NOTHING,
            remedy="see how large the VM says that the disk is: qmpblock disks ADDRESS; where the "
            "file was cut, give it that size again",
        )
    most = found.f_blocks * found.f_frsize  # some that have no bound, or none to tell, say 0
    if amount > most > 0:
        raise RequestError(
            f"{amount} bytes would be reserved in {printable(file)}, whose file system is of "
            f"{most} bytes in all",
            standing=_NOTHING,
            remedy="ask for less, or move the image to a larger file system first",
        )
    largest = _largest_file(pid)
    if largest is not None and last > largest:
        raise RequestError(
            f"the VM's process {pid} may write to no more than the first {largest} bytes of a file "
            f"(RLIMIT_FSIZE), and up to byte {last} of {printable(file)} would be reserved",
            standing=_NOTHING,
            remedy=f"raise its limit (prlimit --pid {pid} --fsize=unlimited), or ask for less",
        )


def _largest_file(pid: int) -> int | None:
    """Return how many bytes of a file a process may write; None for no limit, or an unknown one."""
    try:
        lines = Path(f"/proc/{pid}/limits").read_text(encoding="ascii").splitlines()
    except OSError:
        return None  # it has ended, which whoever borrows its file will say
    words = next((line.split() for line in lines if line.startswith("Max file size")), [])
    return int(words[3]) if len(words) > 3 and words[3].isdigit() else None
