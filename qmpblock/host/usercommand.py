"""A command of the user's that runs as long as what we made for it is there.

It is as if the user had started it: in the same process group, with the same terminal, its words
and its exit code its own. What is different:

- it does not outlive us: the kernel ends it where we are killed;
- signals that we get go to it, and it decides what to make of them. A terminal's Ctrl-C it has
  from the terminal, as we do;
- only it is waited for, and not what it may have started and left behind.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from qmpblock.errors import UNTOUCHED, Error, printable
from qmpblock.host.processes import boot_id, die_with_parent, family_of, is_running

__all__ = ["CannotRunError", "NoSuchCommandError", "UserCommand", "check_command"]

_PATIENCE = 10.0  # seconds that it has to end once it is asked to
_POLL = 0.02


class NoSuchCommandError(Error):
    """There is no such program; the exit code is that of a shell for it."""

    exit_code: ClassVar[int] = 127


class CannotRunError(Error):
    """There is a program, which cannot be run; the exit code is that of a shell for it."""

    exit_code: ClassVar[int] = 126


def check_command(words: Sequence[str]) -> None:
    """See that there is such a program, before anything is made for it.

    :raise NoSuchCommandError: there is none.
    :raise CannotRunError: it is no program, or not for this user.
    """
    if shutil.which(words[0]) is not None:
        return
    if shutil.which(words[0], os.F_OK) is None and not Path(words[0]).is_dir():
        raise NoSuchCommandError(f"there is no program {printable(words[0])}", standing=UNTOUCHED)
    raise CannotRunError(f"{printable(words[0])} cannot be run", standing=UNTOUCHED)


class UserCommand:
    """One that has been started."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(
        cls,
        words: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
    ) -> UserCommand:
        """Start it.

        :param environment: all of it.
        :param stdin: a descriptor; None: ours, as is its stderr.
        :raise CannotRunError: it cannot be.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                *words,
                env=dict(environment),
                stdin=stdin,
                stdout=stdout,
                preexec_fn=die_with_parent(),
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL in a word
            why = error.strerror if isinstance(error, OSError) else error
            raise CannotRunError(f"cannot run {printable(words[0])}: {why}") from None
        return cls(process)

    async def wait(self) -> int:
        """Wait for its end; return its exit code, negative for a signal. Cancelling leaves it."""
        return await self._process.wait()

    def pass_on(self, number: int) -> None:
        """Send it a signal that we got, unless it has that itself; nothing where it has ended."""
        if number == signal.SIGINT and _has_the_terminal():
            return
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def end(self) -> None:
        """End it, with all that it has started and that still runs: asked first, then killed.

        Each before what it has started: whoever saw a child of theirs end could still go on.
        """
        boot, known = boot_id(), family_of(self._process.pid)
        asked: list[tuple[int, int]] = []
        deadline = asyncio.get_running_loop().time() + _PATIENCE
        while known:
            late = asyncio.get_running_loop().time() > deadline
            for one in known:
                if late or one not in asked:
                    _send(one[0], signal.SIGKILL if late else signal.SIGTERM)
            asked = known
            await asyncio.sleep(_POLL)
            left = [one for one in known if is_running(*one, boot)]
            known = list(dict.fromkeys(child for pid, _ in left for child in family_of(pid)))
        await self._process.wait()


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return  # it has ended; or it is another user's now, and nothing of ours


def _has_the_terminal() -> bool:
    """Whether our process group is the one to which our terminal's Ctrl-C goes."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False  # there is none
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
