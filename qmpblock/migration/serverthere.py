"""ServerThere: a storage daemon on a destination's own host, by ssh.

A shell's script there starts it, over an ssh of its own beside the one that brings the
destination's sockets (`qmpblock.host.forward`); it serves at the socket that the destination's own
NBD server would have, which is not started. It lives for as long as something comes by the script's
input: whether we end that, or die, or ssh does, or the wire is dead, which sshd may not notice for
hours, it gets SIGTERM then, and SIGKILL if it does not end. So nobody has to look for it
afterwards.

That it has ended is known by the script's last word alone. Where that does not come, the guest must
not go over: one that is cut off may write to the images yet. Before it the script tells the marks
of the files, by which another attempt knows that nobody has written to them since: where `stat`
there tells times to the nanosecond, as that of GNU does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from qmpblock.errors import (
    UNTOUCHED,
    StalledError,
    UnsupportedError,
    printable,
)
from qmpblock.host.processes import die_with_parent, kill_group
from qmpblock.migration.imagedaemon import NAME, ImageDaemon, described
from qmpblock.migration.imagenodes import ImageNodes, refuse

if TYPE_CHECKING:
    from qmpblock.graph.model import DiskDevice, Layer, Node
    from qmpblock.host.forward import Forward
    from qmpblock.qemu.connection import Connection

__all__ = ["ServerThere"]

_LOGIN = 30.0  # seconds for the script to say what it has found
_END = 5.0  # seconds to hear of its end: two until SIGKILL, and the way there and back
_NOTICE = 10  # seconds beyond the stall limit in which the script hears nothing, and ends it
_BEAT = 2.0  # seconds between two signs of life
_LONGEST = 1 << 16  # bytes of its last words that are kept
_MARK = re.compile(r"mark (\d+:\d+:\d+:\d+\.\d{9}:\d+\.\d{9})")
#: Sees that the images are those that a QEMU has open which waits for a guest: a name may lead the
#: ssh's user to another file. Finds the program, and runs it.
# $1: look, or serve; $2: for how many seconds nothing may come; $3: the socket; $4: of how many
# images the names follow; then its words. (No shell's own `read` has a time limit everywhere.)
_SCRIPT = r"""
umask 077
export LC_ALL=C
trap '' HUP PIPE
marks() {
  for one in "$@"; do
    [ -f "$one" ] && stat -L -c 'mark %d:%i:%s:%.9Y:%.9Z' -- "$one" 2>/dev/null || echo mark
  done
}
what=$1 silent=$2 socket=$3 count=$4
shift 4
beside= names=
while [ "$count" -gt 0 ]; do
  found=
  for one in /proc/[0-9]*/fd/*; do
    if [ "$one" -ef "$1" ]; then
      process=${one%/fd/*}
      if grep -q -e -incoming "$process/cmdline"; then
        exe=$(readlink "$process/exe")
        found=yes beside=${exe%/*}/qemu-storage-daemon
        break
      fi
    fi
  done
  if [ -z "$found" ]; then echo "unseen $1"; exit 0; fi
  names="$names '$(printf '%s' "$1" | sed "s/'/'\\\\''/g")'"
  shift
  count=$((count - 1))
done
program=$beside
"$program" --version </dev/null >/dev/null 2>&1 || program=$(command -v qemu-storage-daemon)
if [ -z "$program" ]; then echo missing; exit 0; fi
echo found
if [ "$what" = look ]; then eval "marks $names"; exit 0; fi
exec 3<&0
"$program" "$@" </dev/null >&2 3<&- &
daemon=$!
{
  while [ -n "$(timeout "$silent" dd bs=1 count=1)" ]; do :; done
  kill -TERM $daemon
  sleep 2
  kill -KILL $daemon
} <&3 >/dev/null 2>&1 &
watch=$!
wait $daemon
code=$?
kill $watch 2>/dev/null
rm -f "$socket"
eval "marks $names"
echo "ended $code"
"""


class _NodesThere(ImageNodes):
    """Those of a destination on another host: by the names that its QEMU shows."""

    def __init__(self) -> None:
        super().__init__(())  # its command line is not seen

    def _leaf(self, image: Layer, node: Node) -> dict[str, Any]:
        if node.driver not in ("file", "host_device"):
            refuse(image, f"is no file there (its driver is {node.driver})")
        if not node.filename.startswith("/") or node.filename.startswith("/dev/fd"):
            refuse(image, "has no absolute path there, by which alone it is found")
        return {"driver": node.driver, "filename": node.filename}

    async def _key(self, image: Layer) -> str:
        refuse(image, "is encrypted, and by ssh no key is handed on")


class ServerThere(ImageDaemon):
    """One on another host. Made by `of`.

    :param files: the names of each image's files there, with what it lies on.
    """

    _poll = 0.02

    def __init__(
        self,
        forward: Forward,
        run: str,
        words: Sequence[str],
        files: Sequence[Sequence[str]],
        stall: float,
    ) -> None:
        super().__init__(run, forward.nbd.here, len(files), stall)
        self._files = files
        names = [name for each in files for name in each]
        address = {"addr": {"type": "unix", "path": forward.nbd.there}}
        # No sooner than we would give up: a wire that comes back within that is none that died.
        self._silent = int(stall) + _NOTICE
        at = [str(self._silent), forward.nbd.there, str(len(names)), *names]
        self._look = self._script(forward, ["look", *at])
        self._serve = self._script(
            forward, ["serve", *at, "--nbd-server", json.dumps(address), *words]
        )
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._told = b""  # by the script
        self._said = b""  # by the daemon, or by ssh
        self._deadline: float | None = None

    @staticmethod
    def _script(forward: Forward, words: Sequence[str]) -> list[str]:
        return forward.command(["exec", "sh", "-c", _SCRIPT, "sh", *words])

    @classmethod
    async def of(
        cls, vm: Connection, forward: Forward, run: str, disks: Sequence[DiskDevice]
    ) -> ServerThere:
        """Say how the disks of a destination are served, and see there that they can be.

        :raise UnsupportedError: they cannot be: says why.
        """
        nodes = _NodesThere()
        words, opened = await described(nodes, run, disks)
        files = [[*_files(node)] for node in opened]
        made = cls(forward, run, words, files, vm.stall)
        try:
            await made._run(made._look)
            await made._until_found()
            await asyncio.wait(made._tasks[:1], timeout=_LOGIN)  # it tells the marks, and ends
        finally:
            await made._close()
        return made

    def marks(self) -> tuple[str, ...]:
        """See `ImageDaemon`: as the script told them last."""
        told = [_MARK.fullmatch(line) for line in self._lines() if line.startswith("mark")]
        marks = iter([one[1] for one in told if one])
        if len(told) != sum(map(len, self._files)) or None in told:
            return ()
        return tuple(" ".join(islice(marks, len(each))) for each in self._files)

    async def start(self) -> None:
        """See `ImageDaemon`."""
        try:
            await self._run(self._serve)
            await self._until_found()
            await self._until_it_serves(NAME)
        except BaseException:
            with contextlib.suppress(StalledError):  # nothing went there, and its input is closed
                await self.end()
            raise

    async def _run(self, words: Sequence[str]) -> None:
        self._told = self._said = b""
        self._process = process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us
            preexec_fn=die_with_parent(),
        )
        self._tasks = [
            asyncio.create_task(self._hear(process)),
            asyncio.create_task(self._hear_errors(process)),
            asyncio.create_task(self._beat(process)),
        ]

    async def _hear(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None  # it is a pipe
        while words := await process.stdout.read(_LONGEST):
            self._told = (self._told + words)[-_LONGEST:]

    async def _hear_errors(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None  # likewise
        while words := await process.stderr.read(_LONGEST):
            self._said = (self._said + words)[-_LONGEST:]

    async def _beat(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None  # likewise
        with contextlib.suppress(OSError):  # it has ended, which its last word tells, if anything
            while not process.stdin.is_closing():
                process.stdin.write(b".")
                await process.stdin.drain()
                await asyncio.sleep(_BEAT)

    def _lines(self) -> list[str]:
        return self._told.decode(errors="replace").split("\n")[:-1]

    async def _until_found(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _LOGIN
        assert self._process is not None
        hearing = self._tasks[0]
        while not self._lines():
            if hearing.done():
                why = f"ssh cannot start it there: {self.said() or 'it does not say why'}"
                raise _cannot(why, "see that ssh may run commands there")
            if loop.time() > deadline:
                raise _cannot(f"ssh did not start it there within {_LOGIN:g} s", "try again")
            await asyncio.sleep(self._poll)
        line = self._lines()[0]
        if line.startswith("unseen "):
            why = f"no QEMU that waits there is seen to have {printable(line[7:])} open"
            raise _cannot(
                why,
                "let the ssh's user be the one that QEMU runs as, or root, outside "
                "of any container of QEMU's",
            )
        if line != "found":
            why = f"{NAME} is neither beside the destination's QEMU nor in the path there"
            raise _cannot(why, "install it there (Debian: qemu-system-common)")

    def _ended(self) -> int | None:
        code = self._code()
        return 255 if code is None and self._tasks[0].done() else code  # as ssh does, cut off

    def _code(self) -> int | None:
        """Return how it has ended, as the script's last word says; None: that is not known."""
        last = re.fullmatch(r"ended (\d+)", (self._lines() or [""])[-1])
        return int(last[1]) if last else None

    def said(self) -> str:
        """Return what it, or ssh, has printed last."""
        return self._said.decode(errors="replace").strip()

    async def end(self) -> str:
        """Likewise; that it may not have ended is said once."""
        process = self._process
        if process is None:
            return ""
        loop = asyncio.get_running_loop()
        if self._deadline is None:  # of one that was cancelled no second time is waited for
            self._deadline = loop.time() + _END
        assert process.stdin is not None  # it is a pipe
        process.stdin.close()
        await asyncio.wait(self._tasks[:1], timeout=max(0.0, self._deadline - loop.time()))
        code = self._code()
        await self._close()
        self._process = None
        if code is None:
            raise StalledError(
                "whether the storage daemon on the destination's host has ended is not known"
                + (f" (ssh says: {printable(self.said(), 400)})" if self.said() else ""),
                remedy="it ends by itself as soon as sshd there notices that the connection is "
                f"lost, after {self._silent} s at the latest; until then it has the destination's "
                "images locked",
            )
        self.whole = code == 0
        if code == 137:
            return "the storage daemon was killed, or did not end by itself, and was killed"
        if code:
            said = f": {printable(self.said(), 400)}" if self.said() else ""
            return f"the storage daemon has ended (exit code {code}){said}"
        return ""

    async def _close(self) -> None:
        """End the ssh, if it has not, and its own way there (ProxyJump), which has its stderr."""
        process = self._process
        if process is None:
            return
        if not all(hearing.done() for hearing in self._tasks[:2]):
            kill_group(process)
        self._tasks[2].cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await process.wait()


def _files(node: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the files of an image, and of what it lies on."""
    if "filename" in node:
        yield node["filename"]
    for edge in ("file", "data-file", "backing"):
        if node.get(edge):
            yield from _files(node[edge])


def _cannot(why: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(
        f"there can be no storage daemon on the destination's host: {why}",
        standing=UNTOUCHED,
        remedy=f"{remedy}; or do without the storage daemon",
    )
