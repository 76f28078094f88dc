"""Every exception that qmpblock raises, in one tree.

::

    Error
    ├── RequestError            exit 2: the request is wrong; nothing was touched
    │   ├── NotFoundError           no such disk, layer or node (lists the candidates)
    │   ├── AmbiguousError          more than one matches (lists them)
    │   ├── RangeError              an offset or length outside the disk
    │   └── UnsupportedError        this QEMU, format or transport cannot do it safely
    ├── MonitorError            exit 3: the monitor cannot be reached or used
    │   ├── ConnectError            nothing answers at that address
    │   ├── GreetingError           no greeting in time, or what came is not QMP
    │   │   └── MonitorHeldError        another client holds the monitor (says who, if it can)
    │   └── DisconnectedError       the connection was lost; the outcome is unknown
    ├── CommandError            exit 1: QEMU refused a command (its words inside)
    ├── BusyError               exit 1: another controller or job holds what is needed
    │   ├── InUseError              exit 2: somebody else uses a layer that would change, or writes
    │   └── RecordError             a lock or journal of ours cannot be read
    ├── GraphError              exit 1: the monitor's replies contradict each other
    ├── JobError                exit 1: a QEMU job failed (QEMU's verdict inside)
    ├── ToolError               exit 1: a program (qemu-img) failed
    ├── NoRoomError             exit 1: no room for what must be written before anything is done
    ├── StalledError            exit 1: no progress for longer than the stall limit
    ├── UndecidedError          exit 1: a person has to say which side of a migration has the guest
    └── NBDError                exit 1
        ├── NBDConnectError         no connection, or the handshake was refused
        ├── NBDProtocolError        the server broke the protocol; the connection is dead
        ├── NBDDisconnectedError    the server went away; the connection is dead
        └── NBDRequestError         one request failed with an errno; the connection lives

The class decides the exit code of the command line (design.md, contracts). Every
message is one line for the person at 3 a.m.; `standing` says what is known to have
happened, `remedy` what to do.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

__all__ = [
    "UNTOUCHED",
    "AmbiguousError",
    "BusyError",
    "CommandError",
    "ConnectError",
    "DisconnectedError",
    "Error",
    "GraphError",
    "GreetingError",
    "InUseError",
    "JobError",
    "MonitorError",
    "MonitorHeldError",
    "NBDConnectError",
    "NBDDisconnectedError",
    "NBDError",
    "NBDProtocolError",
    "NBDRequestError",
    "NoRoomError",
    "NotFoundError",
    "RangeError",
    "RecordError",
    "RequestError",
    "StalledError",
    "ToolError",
    "UndecidedError",
    "UnsupportedError",
    "printable",
    "shell_words",
]

UNTOUCHED = "nothing was touched"  #: what stands where a request was refused


def printable(text: object, limit: int = 300) -> str:
    """Make a string from a peer safe to show: control characters escaped, cut at `limit`.

    A guest or server chooses file names and error texts; an escape sequence in one must
    not reach the operator's terminal (design.md, safety rule 4). So are characters that change
    the direction of the text, halves of surrogate pairs, and what is no character at all: none of
    them may stand in XML or be written as UTF-8.
    """
    try:
        said = str(text)
    except (RecursionError, ValueError):  # too deep, or a number of more digits than Python writes
        said = f"<{type(text).__name__}>"
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in said[: limit + 1]  # of a text of megabytes no more is looked at
    )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def shell_words(words: Iterable[object]) -> str:
    """Return a command for people to paste into a shell: quoted where that would take it apart."""
    return " ".join(shlex.quote(printable(word, 1 << 20)) for word in words)


class Error(Exception):
    """Root of everything qmpblock raises.

    :param message: what failed, in one line.
    :param standing: what is known to have happened, what stands where now.
    :param remedy: what the reader can do.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, message: str, *, standing: str | None = None, remedy: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.standing = standing
        self.remedy = remedy

    def __str__(self) -> str:
        parts = [self.message]
        if self.standing:
            parts.append(self.standing)
        if self.remedy:
            parts.append(f"Remedy: {self.remedy}")
        return "\n".join(parts)


class RequestError(Error):
    """The request is wrong; nothing was touched."""

    exit_code = 2


class _CandidatesError(RequestError):
    def __init__(
        self, message: str, candidates: Iterable[str] = (), *, remedy: str | None = None
    ) -> None:
        self.candidates = tuple(candidates)
        listed = "\n".join(f"  {printable(c)}" for c in self.candidates)
        super().__init__(f"{message}\n{listed}" if listed else message, remedy=remedy)


class NotFoundError(_CandidatesError):
    """No disk, layer or node goes by that name; `candidates` are those that exist."""


class AmbiguousError(_CandidatesError):
    """The name fits more than one; `candidates` are those it fits."""


class RangeError(RequestError):
    """An offset or length is negative, unaligned where it must not be, or past the end."""


class UnsupportedError(RequestError):
    """This QEMU, image format or transport cannot do it, or not safely."""


class MonitorError(Error):
    """The monitor cannot be reached or used."""

    exit_code = 3


class ConnectError(MonitorError):
    """Nothing answers at the monitor's address."""


class GreetingError(MonitorError):
    """No QMP greeting came in time, or what came was not one."""


class MonitorHeldError(GreetingError):
    """Another client holds the monitor, which serves one at a time.

    :param holders: the processes that do, where that can be seen from here.
    """

    def __init__(
        self, message: str, holders: Iterable[int] = (), *, remedy: str | None = None
    ) -> None:
        super().__init__(message, standing=UNTOUCHED, remedy=remedy)
        self.holders = tuple(holders)


class DisconnectedError(MonitorError):
    """The connection was lost while a command was under way.

    Whether QEMU carried the command out is unknown; query before doing it again.

    :param command: the QMP command whose outcome is unknown, or None between commands.
    """

    def __init__(
        self,
        message: str,
        *,
        command: str | None = None,
        standing: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message, standing=standing, remedy=remedy)
        self.command = command


class CommandError(Error):
    """QEMU refused a command.

    :param command: the QMP command.
    :param arguments: its arguments, as sent.
    :param error_class: QEMU's error class (`GenericError`, `DeviceNotFound`, ...).
    :param description: QEMU's own words.
    """

    def __init__(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        error_class: str,
        description: str,
        *,
        standing: str | None = None,
        remedy: str | None = None,
    ) -> None:
        shown = f" {json.dumps(arguments, default=str)}" if arguments else ""
        super().__init__(
            f"QEMU refused {command}{printable(shown)}: {printable(description)}",
            standing=standing,
            remedy=remedy,
        )
        self.command = command
        self.arguments = arguments
        self.error_class = error_class
        self.description = description


class BusyError(Error):
    """Another controller, job, export or NBD server holds what is needed."""


class InUseError(BusyError):
    """Somebody else uses a layer: would see it change, or lose it; or changes what is to be read.

    Nothing was touched.
    """

    exit_code = 2


class RecordError(BusyError):
    """A lock or a journal of ours cannot be read, so that what it guards is left alone.

    Another version wrote it, or it is damaged.

    :param path: of the journal; None where it is a lock.
    :param run: the run that it is of, if that can be told.
    :param files: the image files that it is about; None where that cannot be told.
    """

    def __init__(
        self,
        message: str,
        *,
        standing: str | None = None,
        remedy: str | None = None,
        path: Path | None = None,
        run: str = "",
        files: Iterable[str] | None = None,
    ) -> None:
        super().__init__(message, standing=standing, remedy=remedy)
        self.path = path
        self.run = run
        self.files = None if files is None else tuple(files)


class NoRoomError(Error):
    """There is no room for what must be written before anything is done; nothing was touched."""


class GraphError(Error):
    """The monitor's replies about the block graph contradict each other."""


class JobError(Error):
    """A background job of QEMU failed, or was cancelled by somebody else.

    :param job: its id.
    :param type: QEMU's job type.
    :param verdict: QEMU's own words.
    """

    def __init__(
        self,
        job: str,
        type: str,  # noqa: A002 - QMP's word
        verdict: str,
        *,
        standing: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(
            f"QEMU's job {printable(job)} ({printable(type)}) failed: {printable(verdict)}",
            standing=standing,
            remedy=remedy,
        )
        self.job = job
        self.type = type
        self.verdict = verdict


class ToolError(Error):
    """A program that we started failed.

    :param command: its command line.
    :param returncode: its exit code; negative for a signal.
    :param stderr: what it said.
    """

    def __init__(
        self, command: Iterable[str], returncode: int, stderr: str, *, remedy: str | None = None
    ) -> None:
        self.command = tuple(command)
        self.returncode = returncode
        self.stderr = stderr
        super().__init__(
            f"{printable(' '.join(self.command), 1000)} failed with exit code {returncode}: "
            f"{printable(stderr.strip(), 2000)}",
            remedy=remedy,
        )


class StalledError(Error):
    """Nothing moved for longer than the stall limit."""


class UndecidedError(Error):
    """It cannot be told which side of a migration has the guest, or that side is gone.

    `standing` says what each side shows, `remedy` what to find out, and how to say what was found.
    """


class NBDError(Error):
    """Something went wrong on an NBD connection."""


class NBDConnectError(NBDError):
    """No NBD connection: nothing listens, or the handshake was refused."""


class NBDProtocolError(NBDError):
    """The server sent what the NBD protocol forbids; the connection is dead."""


class NBDDisconnectedError(NBDError):
    """The server closed the connection; requests under way have an unknown outcome."""


class NBDRequestError(NBDError):
    """One request failed; the connection lives on.

    :param request: the request, for people (`read 0+4096`).
    :param errno: the NBD error number (a subset of Linux's errno values).
    :param text: the server's own words, where it sent any.
    """

    def __init__(self, request: str, errno: int, text: str = "") -> None:
        import errno as names

        name = names.errorcode.get(errno, f"error {errno}")
        super().__init__(
            f"the NBD server failed {request} with {name}"
            + (f": {printable(text)}" if text else "")
        )
        self.request = request
        self.errno = errno
        self.text = text
