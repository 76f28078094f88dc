"""stdin, stdout and stderr of a command, such that none of them breaks off what is at work.

A disk is not left half copied because the log that stderr goes to is on a file system that is full,
or because the terminal is gone: what cannot be said on the way is lost, and the work goes on. What
of stdout could not be written is told at the end, when the work stands (`Output.lost`).
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["Output", "take_over"]

_INPUT, _OUTPUT, _ERRORS = range(3)


class Output(io.FileIO):
    """A descriptor that is written to, as long as it can be.

    :ivar lost: why it could not be, at last; None where it could.
    """

    lost: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write; or lose it. Waits where whoever has it, too, made it one that does not block."""
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])
        except OSError as error:
            self.lost = error
            return memoryview(data).nbytes
        return written


def take_over() -> Output:
    """Have stdout and stderr be such; return stdout's. Those that are closed lead nowhere.

    Else the next thing opened, a monitor's socket say, would get their numbers, and what is said.
    """
    for number in (_INPUT, _OUTPUT, _ERRORS):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number
    output, errors = Output(_OUTPUT, "w", closefd=False), Output(_ERRORS, "w", closefd=False)
    sys.stdout, sys.stderr = _text(output, sys.stdout), _text(errors, sys.stderr)
    return output


def _text(raw: Output, like: TextIO | None) -> TextIO:
    encoding = None if like is None else like.encoding
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, line_buffering=True)
