"""What QEMU's tools say where they fail, as far as something is decided by it.

The counterpart of `qmpblock.qemu.refusals`: nothing else looks into their English.
"""

from __future__ import annotations

import re

__all__ = ["in_use_by_another", "lacks_key", "lacks_space", "mismatch_in", "progress_in", "remedy"]

_HELD = re.compile(r'Failed to (?:get (?:shared )?"[a-z ]+" lock|lock byte)')
_MISMATCH = re.compile(r"Content mismatch at offset (\d+)!")
_PERCENT = re.compile(r"\((\d+\.\d+)/100%\)")


def in_use_by_another(said: str) -> bool:
    """Whether a tool failed because a QEMU holds the image, by QEMU's words (7.2 to 11.1)."""
    return _HELD.search(said) is not None


def lacks_key(said: str) -> bool:
    """Whether a tool failed because nobody gave it the key of an encrypted image (7.2 to 11.1)."""
    return "key-secret" in said


def lacks_space(said: str) -> bool:
    """Whether a tool failed because there was no space left, by strerror(3)."""
    return "No space left" in said


def mismatch_in(said: str) -> int | None:
    """Return from where on qemu-img found images to differ, at most 512 bytes before (7.2, 11.1).

    None where its words are of no difference.
    """
    match = _MISMATCH.search(said)
    return int(match[1]) if match else None


def progress_in(said: str) -> float | None:
    """Return how much of its work qemu-img says that it has done, in percent (7.2 to 11.1)."""
    match = _PERCENT.search(said)
    return float(match[1]) if match else None


def remedy(code: int, said: str, *, exclusive: bool) -> str | None:
    """Return what to do where a tool failed, if that can be told.

    :param exclusive: whether it wanted the image for itself.
    """
    if exclusive and in_use_by_another(said):
        return (
            "a running VM holds the image; map it through that VM's monitor: "
            "qmpblock map ADDRESS DISK"
        )
    if code in (126, 127):  # a shell's: what is found there starts something else
        return (
            "it is started with few files to open, and a script that starts a program elsewhere "
            "does not come to it: have the PATH lead to the program itself, or a link to it"
        )
    return None
