"""What a command does to files, as strace(1) saw it, and which of that may be.

`strace` writes one file a thread (`-ff`), one call a line, with the path behind every
descriptor (`-y`): `openat(5</srv/vm>, "disk", O_RDWR|O_NOFOLLOW) = 6</srv/vm/disk>`. The parser
is strict: a line that it does not understand is an error, not a call that did nothing.

A `Judge` says of each call that makes, opens for writing, changes or removes something why that
may not be. A path is nothing to go by where others can write to its directory; so it allows

- a name without a slash in a directory that is held by a descriptor, following no link;
- a file that a descriptor holds, and what such a descriptor is opened as again (/proc/self/fd);
- what is in memory;
- and by its whole path only what is in the state directory, or in a folder in the temporary
  directory that this command has made for itself alone.

What is opened for reading may be anywhere but in a directory of images: there it is looked at first
(O_PATH), and then opened by that descriptor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CALLS", "STRACE", "Call", "Judge", "calls_of", "parse"]

#: Name of a call -> which of its arguments are paths: (descriptor of the directory or None, path);
#: and which is a descriptor of the file itself.
_PATHS: dict[str, tuple[tuple[int | None, int], ...]] = {
    "open": ((None, 0),),
    "creat": ((None, 0),),
    "openat": ((0, 1),),
    "openat2": ((0, 1),),
    "unlink": ((None, 0),),
    "rmdir": ((None, 0),),
    "unlinkat": ((0, 1),),
    "rename": ((None, 0), (None, 1)),
    "renameat": ((0, 1), (2, 3)),
    "renameat2": ((0, 1), (2, 3)),
    "link": ((None, 0), (None, 1)),
    "linkat": ((0, 1), (2, 3)),
    "symlink": ((None, 1),),
    "symlinkat": ((1, 2),),
    "mkdir": ((None, 0),),
    "mkdirat": ((0, 1),),
    "mknod": ((None, 0),),
    "mknodat": ((0, 1),),
    "chmod": ((None, 0),),
    "fchmodat": ((0, 1),),
    "chown": ((None, 0),),
    "lchown": ((None, 0),),
    "fchownat": ((0, 1),),
    "truncate": ((None, 0),),
    "setxattr": ((None, 0),),
    "lsetxattr": ((None, 0),),
    "removexattr": ((None, 0),),
    "lremovexattr": ((None, 0),),
}
_BY_DESCRIPTOR = ("fchmod", "fchown", "ftruncate", "fallocate", "fsetxattr", "fremovexattr")
#: Every call that is traced.
CALLS = (*_PATHS, *_BY_DESCRIPTOR, "bind")
#: What a traced command line begins with; the directory of the traces and the command follow.
STRACE = (
    *("strace", "-f", "-ff", "-y", "-qq", "-s", "4096", "-e", "signal=none"),
    *("-e", "trace=" + ",".join(f"?{name}" for name in CALLS)),
)

_OPENS = ("open", "creat", "openat", "openat2")
_WRITES = {"O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND", "O_TMPFILE"}
_LINE = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+|\?)(.*)")
_DESCRIPTOR = re.compile(r"(AT_FDCWD|\d+)(?:<((?:[^<>\\]|\\.)*)>(?:\(deleted\))?)?")
_HELD = re.compile(r"/proc/(?:self|\d+)/fd/\d+")
_PROBED = re.compile(r"[a-z0-9_]{8}")
_HARMLESS = {"/dev/null", "/dev/tty"}


@dataclass(frozen=True)
class Call:
    """One system call: its name, its arguments as strace shows them, and what it returned."""

    name: str
    arguments: tuple[str, ...]
    result: int | None
    line: str

    def text(self, at: int) -> str:
        """Return an argument that is a string.

        :raise ValueError: it is none, or strace has cut it short.
        """
        shown = self.arguments[at]
        if not (len(shown) > 1 and shown[0] == shown[-1] == '"'):
            raise ValueError(f"no whole string: {self.line}")
        raw = shown[1:-1].encode().decode("unicode_escape")
        return raw.encode("latin-1").decode("utf-8", "surrogateescape")

    def directory(self, at: int) -> str:
        """Return the path of the file that an argument's descriptor holds.

        :return: empty for AT_FDCWD, which is no directory that anybody has chosen.
        :raise ValueError: it is no descriptor.
        """
        match = _DESCRIPTOR.fullmatch(self.arguments[at])
        if match is None or (match[1] != "AT_FDCWD" and match[2] is None):
            raise ValueError(f"no descriptor: {self.line}")
        return "" if match[1] == "AT_FDCWD" else match[2]

    @property
    def words(self) -> set[str]:
        """The flags among its arguments: words such as O_EXCL."""
        return {word for one in self.arguments if one[:1] != '"' for word in _words(one)}


def _words(text: str) -> list[str]:
    return re.findall(r"\b[A-Z]+_[A-Z_]+\b", _DESCRIPTOR.sub("", text, count=1))


def parse(line: str) -> Call:
    """Read one line of a trace.

    :raise ValueError: it is no whole call.
    """
    match = _LINE.fullmatch(line.rstrip("\n"))
    if match is None or match[1] not in CALLS:
        raise ValueError(f"no call that is known: {line!r}")
    result = None if match[3] == "?" else int(match[3])
    return Call(match[1], tuple(_arguments(match[2])), result, line.rstrip("\n"))


def _arguments(text: str) -> Iterator[str]:
    """Split at the commas that stand in no string, bracket or descriptor's path."""
    depth, quoted, start, at = 0, False, 0, 0
    while at < len(text):
        one = text[at]
        if one == "\\":
            at += 1
        elif one == '"':
            quoted = not quoted
        elif quoted:
            pass
        elif one in "{[(<":
            depth += 1
        elif one in "}])>":
            depth -= 1
        elif one == "," and not depth:
            yield text[start:at].strip()
            start = at + 1
        at += 1
    if quoted or depth:
        raise ValueError(f"arguments without an end: {text!r}")
    if text.strip():
        yield text[start:].strip()


def calls_of(prefix: Path) -> list[Call]:
    """Read what `strace -ff -o PREFIX` has written, of every thread."""
    files = sorted(prefix.parent.glob(prefix.name + ".*"))
    return [parse(line) for file in files for line in file.read_text().splitlines()]


class Judge:
    """Says of calls what speaks against them.

    :param state: the state directory.
    :param homes: the directories that may be held by a descriptor: those of the images.
    :param temporary: where folders may be made, `qmpblock-...` for their user alone.
    :param package: where our own program text is, of which Python keeps what it has compiled.
    """

    def __init__(self, state: Path, homes: list[Path], temporary: Path, package: Path) -> None:
        self._compiled = f"{package}/__pycache__"
        self._state = str(state)
        self._homes = [*map(str, homes)]
        self._held = [*self._homes, self._state]
        self._temporary = str(temporary)

    def complaint(self, call: Call) -> str | None:
        """Say why a call may not be; None where it may."""
        if call.name in _OPENS and call.name != "creat" and not call.words & _WRITES:
            return self._read(call)
        if call.name in _BY_DESCRIPTOR:
            held = call.directory(0)
            return None if self._ours(held) else f"{held} is no file that is proven: {call.line}"
        if call.name == "bind":
            return self._bound(call)
        found = [self._path(call, *where) for where in _PATHS[call.name]]
        return next((f"{one}: {call.line}" for one in found if one), None)

    def _read(self, call: Call) -> str | None:
        """Say why a file may not be opened for reading: by a path into a directory of images."""
        if "O_PATH" in call.words:  # which gives no right to it, and does nothing
            return None
        (directory, at) = _PATHS[call.name][0]
        path = call.text(at)
        where = "" if directory is None else call.directory(directory)
        if path.startswith("/") and any(_within(path, one) for one in self._homes):
            return f"by its path: {call.line}"
        if where in self._homes and path != "." and "O_NOFOLLOW" not in call.words:
            return f"follows a link: {call.line}"
        return None

    def _ours(self, held: str) -> bool:
        return held.startswith("/memfd:") or any(_within(held, one) for one in self._held)

    def _path(self, call: Call, directory: int | None, at: int) -> str | None:
        path = call.text(at)
        where = "" if directory is None else call.directory(directory)
        opens = call.name in _OPENS
        if _HELD.fullmatch(path):
            # Of what a descriptor holds: to write to it, to change it, to give it a name.
            return None if opens or call.name not in ("unlink", "unlinkat") else "a descriptor"
        if path.startswith("/"):
            return self._absolute(call, path)
        if path == "" and where:  # AT_EMPTY_PATH
            return None if self._ours(where) else f"{where} is no file that is proven"
        if not where:
            return "counts from the working directory"
        ours = _within(where, self._temporary) and (
            where != self._temporary or path.startswith("qmpblock-")
        )
        if where not in self._held and not ours:
            return f"{where} is no directory that is proven"
        if "/" in path or path == ".." or (path == "." and "O_TMPFILE" not in call.words):
            return "leads out of the directory"
        if opens and not call.words & {"O_NOFOLLOW", "O_EXCL", "O_TMPFILE"}:
            return "follows a link"
        if call.name in ("fchmodat", "fchownat") and "AT_SYMLINK_NOFOLLOW" not in call.words:
            return "follows a link"
        return None

    def _absolute(self, call: Call, path: str) -> str | None:
        if path in _HARMLESS and call.name in _OPENS:
            return None
        if _within(path, self._state) or _within(path, self._compiled):
            return None
        if _PROBED.fullmatch(path.removeprefix(f"{self._temporary}/")):
            # Python's tempfile looks whether it can write there; nobody else's file is called so.
            tried = {"O_EXCL", "O_NOFOLLOW"} <= call.words
            return None if tried or call.name == "unlink" else "by its path"
        if path.startswith(f"{self._temporary}/qmpblock-"):
            if call.name == "mkdir" and call.arguments[1] != "0700":
                return "a folder for others too"
            return None
        return "by its path"

    def _bound(self, call: Call) -> str | None:
        match = re.search(r'sun_path="((?:[^"\\]|\\.)*)"', call.arguments[1])
        wrong = None if match is None else self._absolute(call, match[1])
        return f"{wrong}: {call.line}" if wrong else None


def _within(path: str, directory: str) -> bool:
    return path == directory or (path.startswith(directory + "/") and "/../" not in path + "/")
