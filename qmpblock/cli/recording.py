"""How far long work is, in a file of Prometheus's text format that is kept up to date meanwhile.

Who does long work holds the VM's monitor, so `qmpblock metrics` cannot ask there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from qmpblock.cli.app import warn
from qmpblock.errors import Error, RequestError

if TYPE_CHECKING:
    from qmpblock.allocation.room import RoomResult
    from qmpblock.cli.progress import Reporter
    from qmpblock.metrics.text import Figure
    from qmpblock.qemu.job import Progress

__all__ = ["Recorder", "metrics_option", "recording"]

_EVERY = 2.0  # seconds between two writes where nothing but the numbers changes

metrics_option = click.option(
    "--metrics",
    metavar="FILE",
    help="Keep FILE, of Prometheus's text format, up to date with how far it is; removed at the "
    "end.",
)


class Recorder:
    """Keeps the file. Get it from `recording`."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._figures: dict[tuple[str, str], list[Figure]] = {}
        self._written = float("-inf")
        self._failed = False

    def also(self, show: Reporter, vm: str, what: str) -> Reporter:
        """Have what is shown of a piece of work be in the file, too.

        :param vm: the address of its VM.
        :param what: it is, such as `stream of vd0`.
        """
        if self._path is None:
            return show

        began = time.monotonic()

        def both(seen: Progress) -> None:
            from qmpblock.metrics.text import job_figures, work_figure

            kind = what.partition(" ")[0]
            figures = [
                *job_figures(vm, what, kind, seen.done, seen.total, seen.idle),
                work_figure(vm, what, kind, time.monotonic() - began),
            ]
            self._set((vm, what), figures, ended=seen.phase == "ended")
            show(seen)

        return both

    def lasting(self, vm: str, what: str, seconds: float) -> None:
        """Have work be in the file of which no more is known than for how long it is done."""
        if self._path is not None:
            from qmpblock.metrics.text import work_figure

            self._set((vm, what), [work_figure(vm, what, what.partition(" ")[0], seconds)])

    def room(self, vm: str, disk: str, last: RoomResult) -> None:
        """Have what there is of a disk's room be in the file."""
        if self._path is not None:
            from qmpblock.metrics.figures import free_beside
            from qmpblock.metrics.text import room_figures

            free = free_beside(last.file)
            self._set((vm, disk), list(room_figures(vm, disk, last.room, last.wanted, free)))

    def forget(self, vm: str, what: str) -> None:
        """Have a piece of work, or a disk's room, not be in it any more."""
        if self._path is not None:
            self._set((vm, what), None)

    def _set(
        self, key: tuple[str, str], figures: list[Figure] | None, *, ended: bool = False
    ) -> None:
        known = key in self._figures
        if figures is None:
            self._figures.pop(key, None)
        else:
            self._figures[key] = figures
        if known and figures and not ended and time.monotonic() - self._written < _EVERY:
            return
        self._written = time.monotonic()
        try:
            self.write()
        except Error as error:
            if not self._failed:  # the work goes on without
                warn((error.message,))
            self._failed = True

    def write(self) -> None:
        """Write it, as it is now.

        :raise RequestError: there is no prometheus-client.
        :raise Error: it cannot be written.
        """
        from qmpblock.metrics.text import rendered
        from qmpblock.metrics.textfile import replace

        assert self._path is not None  # else nothing is recorded
        replace(self._path, rendered(one for every in self._figures.values() for one in every))


@contextmanager
def recording(path: str | None) -> Iterator[Recorder]:
    """Keep a file until this is left; then it is removed.

    :param path: None: none is kept.
    :raise RequestError: it cannot be written.
    """
    recorder = Recorder(path)
    if path is None:
        yield recorder
        return
    try:
        recorder.write()
    except RequestError:
        raise
    except Error as error:
        raise RequestError(error.message) from None
    from qmpblock.metrics.textfile import remove

    try:
        yield recorder
    finally:
        try:
            remove(path)
        except Error as error:
            warn((error.message,))
