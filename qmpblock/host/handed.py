"""The files that a tool is handed, and with whose rights it opens them: nothing else can it open.

What an image's header says was written by its guest, or by whoever runs its QEMU. So a tool is
never given names, from which it would go on to whatever they and the headers lead to. Each file is
looked up here, is a regular file or a block device, and is handed on as a descriptor that itself
gives no right to it (O_PATH)::

    {"driver": "qcow2", "file": {"driver": "file", "filename": "/i/top.qcow2"}, "backing": null}
    {"driver": "qcow2", "file": {"driver": "file", "filename": "/proc/self/fd/7"}, "backing": null}

The tool opens that as whoever may write to the image, its owner as a rule, or as the user of the
QEMU that has it open, and what
another file says it has to be able to come to by that name (`qmpblock.host.confined`). Every image
below and every data file is stated, so that no header's word for it counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import posixpath
import re
import shutil
import socket
import stat
import struct
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qmpblock.errors import (
    DisconnectedError,
    NotFoundError,
    ToolError,
    UnsupportedError,
    printable,
)
from qmpblock.graph.jsonname import as_bytes, innermost
from qmpblock.graph.places import FileId
from qmpblock.host import confined
from qmpblock.host.ourfiles import look

__all__ = [
    "FORMATS",
    "WITH_BACKING",
    "HandedFiles",
    "MoreFiles",
    "User",
    "has_servers",
    "is_local",
]

FORMATS = frozenset(
    "bochs cloop dmg luks parallels qcow qcow2 qed raw vdi vhdx vmdk vpc".split()  # noqa: SIM905
)
"""Those that an image's header may name for the one below: formats of files, and nothing else."""
WITH_BACKING = frozenset({"qcow", "qcow2", "qed", "vmdk"})
"""Those of them whose header may name one below at all."""

_LEAVES = ("file", "host_device")
_HANDED = re.compile(r"/proc/self/fd/(\d+)")
_PLAIN = re.compile(
    r'json:\{"driver": "\w+", "file": \{"driver": "(?:file|host_device)", '
    r'"filename": "([^"\\]+)"\}(?:, "backing": null)?\}'
)
_OPEN_TO_THEM = (
    "if it is theirs to read, give them the right to it, and to the directories above it; if not, "
    "no header of theirs should name it"
)
_NOBODY = 65534  # who owns nothing
# linux/posix_acl.h, posix_acl_xattr.h
_ACL_USER, _ACL_GROUP = 0x02, 0x08
_ACL_ENTRY = struct.Struct("<HHI")  # tag, what is allowed, of whom
_PROTOCOL = re.compile(r"[^/]*:")  # as QEMU takes a name for one


@dataclass(frozen=True)
class User:
    """Whose rights a tool has.

    :ivar groups: besides `gid`.
    """

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @classmethod
    def of_process(cls, pid: int) -> User:
        """Tell who a process runs as.

        :raise DisconnectedError: there is no such process any more.
        :raise UnsupportedError: it has the rights of several.
        """
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        except OSError:
            raise DisconnectedError(f"the VM's process {pid} has ended") from None
        words = {line.partition(":")[0]: line.split()[1:] for line in lines.splitlines()}
        if len(set(words["Uid"][:3])) > 1:
            raise UnsupportedError(
                f"the VM's process {pid} has the rights of several users "
                f"({', '.join(dict.fromkeys(words['Uid'][:3]))}), as no QEMU has"
            )
        return cls(
            int(words["Uid"][1]), int(words["Gid"][1]), tuple(int(one) for one in words["Groups"])
        )

    @classmethod
    def of_file(cls, fd: int) -> User:
        """Tell whose a file is: who has written what its header says.

        Of a file of root's to which others may write, that is them: somebody of its group, or
        anybody.
        """
        status = os.fstat(fd)
        owner = cls(status.st_uid, status.st_gid)
        if owner.uid or not status.st_mode & 0o022:
            return owner
        if status.st_mode & 0o002:
            return cls(_NOBODY, _NOBODY)
        writers = {cls(_NOBODY, owner.gid)} if owner.gid else set()
        writers |= {
            cls(who, _NOBODY) if tag == _ACL_USER else cls(_NOBODY, who)
            for tag, allowed, who in _access_list(fd)
            if tag in (_ACL_USER, _ACL_GROUP) and allowed & os.W_OK
        }
        if len(writers) > 1:
            return cls(_NOBODY, _NOBODY)  # one of them has; what all may read, is followed
        return writers.pop() if writers else owner

    def describe(self) -> str:
        """Say who it is, for people."""
        if self.uid != _NOBODY:
            return f"user {self.uid}"
        return "everybody" if self.gid == _NOBODY else f"the group {self.gid}"

    def __str__(self) -> str:
        return f"{self.uid}:{self.gid}:{','.join(str(one) for one in self.groups)}"


@dataclass(frozen=True)
class _File:
    fd: int
    name: str
    writable: bool
    said: bool  # by another file


class MoreFiles(Exception):  # noqa: N818 - it is no error
    """The header of an image that was handed names other files that belong to the image.

    :ivar file: of the image.
    """

    def __init__(self, file: str, names: Sequence[str]) -> None:
        super().__init__(file, names)
        self.file = file
        self.names = tuple(names)


class HandedFiles(contextlib.ExitStack):
    """The files that one run of a tool gets. A context manager; at its end they are closed.

    :param user: whose rights it has, where we are root; None: those of the first file's owner,
        and without a file our own.
    :param vm: the process of a VM, whose user's rights it has; only files that the VM has open
        are handed.
    :param network: whether it may make sockets.
    :param known: device (None: any) and inode of the files that the first one has to be one of,
        and each that is to be written to, or that a header names.
    :param more: by an image's file, which others its header names (`MoreFiles`).
    :param opened: descriptors of files that are open already, by what they are called. Such a
        name is for people alone: it leads nowhere here, nor does whose rights the tool has have to
        come to it by that.
    """

    def __init__(
        self,
        *,
        user: User | None = None,
        vm: int | None = None,
        network: bool = False,
        known: Collection[tuple[int | None, int]] | None = None,
        more: Mapping[str, Sequence[str]] = MappingProxyType({}),
        opened: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.user, self._open_in_vm = user, None
        if vm is not None:
            from qmpblock.host.openfiles import OpenFiles

            self.user, self._open_in_vm = User.of_process(vm), OpenFiles(vm).ids()
        self._network = network
        self._known = known
        self._more = more
        self._opened = opened
        self._questions: list[str] = []
        self._files: list[_File] = []
        self._memory: list[int] = []
        self._listening: list[int] = []
        self._needs_landlock = False

    def memory(self, data: bytes = b"") -> int:
        """Hand a new file that is in no directory; return its descriptor."""
        fd = os.memfd_create("qmpblock")
        self.callback(os.close, fd)
        os.write(fd, data)
        self._memory.append(fd)
        return fd

    @contextlib.contextmanager
    def listener(self, listening: socket.socket) -> Iterator[None]:
        """Hand a listening socket, to a program that takes one and is started in the body."""
        fd = _above_listening(listening.fileno())
        self._listening.append(fd)
        try:
            yield
        finally:
            self._listening.remove(fd)
            os.close(fd)

    def image(
        self, options: Mapping[str, Any], *, writable: int = 0, said: bool = False
    ) -> dict[str, Any]:
        """Hand the files of an image, and return the options by which the tool opens it.

        :param options: as for blockdev-add, without `node-name`.
        :param writable: how many layers are written to.
        :param said: whether its name is one that another image records, as those below it are:
            then the tool's user has to come to it by that.
        :raise NotFoundError: there is no such file.
        :raise UnsupportedError: one is no regular file or block device, or the VM has not got it
            open; or an image consists of what is no file here.
        """
        options = dict(options)
        driver = options.get("driver")
        if driver in _LEAVES and "file" not in options:
            return options | self._leaf(
                str(options.get("filename")), writable=writable > 0, said=said
            )
        if driver not in FORMATS and not self._network:
            raise UnsupportedError(
                f"{printable(driver)} is no format of image files: those are "
                f"{' '.join(sorted(FORMATS))}"
            )
        inner = options.get("file")
        if not isinstance(inner, Mapping):
            if not self._network:
                raise _not_local(str(driver))
            return options  # a server, which the VM had open
        if driver == "vmdk" and inner.get("driver") in _LEAVES:
            options["file"] = self._vmdk(
                str(inner.get("filename")), writable=writable > 0, said=said
            )
        else:
            options["file"] = self.image(inner, writable=writable, said=said)
        data = options.get("data-file")
        if isinstance(data, Mapping):
            if data.get("driver") != "null-co":
                options["data-file"] = self.image(data, writable=writable, said=said)
        elif driver == "qcow2":
            for named in self._data_file_of(options["file"]):
                options["data-file"] = self._leaf(named, writable=writable > 0, said=True)
                self._check_known(self._files[-1].fd, named)
        if isinstance(below := options.get("backing"), Mapping):
            options["backing"] = self.image(below, writable=writable - 1, said=True)
        elif driver in WITH_BACKING:
            options["backing"] = None
        return options

    def command(self, program: str, arguments: Sequence[str]) -> list[str]:
        """Return the command that runs a program with these files, and no more.

        Where all it gets was made here, nothing of it is anybody else's, and it is run as it is.

        :raise ToolError: there is no such program.
        """
        executable = shutil.which(program)
        if executable is None:
            raise ToolError(
                [program, *map(self.shown, arguments)],
                127,
                f"there is no program {program}",
                remedy="install qemu-img (Debian: qemu-utils)",
            )
        if not self._files:
            return [executable, *arguments]
        user = self._whose()
        words = [f"{'w' if file.writable else 'r'}{file.fd}" for file in self._files]
        if self._open_in_vm is None:  # what a VM has open it has come to
            said = [file for file in self._files if file.said]
            words += [f"n{file.fd}={_absolute(file.name)}" for file in said]
        words += [f"a{fd}" for fd in self._listening]
        words += self._questions
        words += ["landlock"] * self._must_have_landlock() + ["network"] * self._network
        return [
            sys.executable,
            "-B",  # as another user, of whatever umask, it is to leave no program text
            "-I",
            "-S",
            "-c",
            confined.START,
            str(user) if user is not None and os.geteuid() == 0 else "-",
            str(os.getpid()),
            *words,
            "--",
            posixpath.abspath(executable),
            *arguments,
        ]

    def follow(self, name: str) -> None:
        """Hand a qcow2 image, of which and of those below only the headers are looked at.

        The program is not run; what is printed instead see `qmpblock.host.confined`.

        :raise Error: as `image`.
        """
        fd = self._hand(name, writable=False, said=False)
        self._questions.append(f"c{fd}={_absolute(name)}")

    @property
    def owner(self) -> User:
        """Whose the first file is."""
        return User.of_file(self._files[0].fd)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What the program is to inherit."""
        return (*(file.fd for file in self._files), *self._memory, *self._listening)

    def shown(self, text: str) -> str:
        """Put the names of the files into what a tool says, or is told."""
        names = {file.fd: file.name for file in self._files}
        named = _HANDED.sub(lambda match: names.get(int(match[1]), match[0]), text)
        return _PLAIN.sub(lambda match: match[1], named)

    def refuse(self, code: int, said: bytes) -> None:
        """Raise what follows where the program was not run, or could not open a file.

        :param code: its exit code.
        :param said: its words.
        :raise MoreFiles: an image consists of more files.
        :raise UnsupportedError: whose rights it has may not open one.
        """
        if code == confined.MORE_FILES:
            number, *names = map(os.fsdecode, said.split(b"\0"))
            name = next(file.name for file in self._files if str(file.fd) == number)
            if any(_PROTOCOL.match(one) for one in names) or name in self._more:
                raise _not_local(names[0])
            raise MoreFiles(name, names)
        text = self.shown(os.fsdecode(said)).strip()
        whose = self._whose()
        if code == confined.NOT_SAFE:
            raise UnsupportedError(
                f"{printable(self._files[0].name)} is not opened: {text}",
                remedy="use Linux 5.13 or newer with Landlock (lsm=landlock); or run this as the "
                "user whose images these are, or have them all belong to that one alone",
            )
        if code == confined.UNREACHABLE:
            text = f"{text} cannot be opened"
        if code == confined.UNREACHABLE or "Permission denied" in text:
            if whose is None or not whose.uid or os.geteuid() != 0:
                if code == confined.UNREACHABLE:
                    raise UnsupportedError(f"{printable(text)}: its name leads elsewhere now")
                return
            raise UnsupportedError(
                f"{printable(text, 2000)}: "
                + ("the VM runs as" if self._open_in_vm is not None else "the image belongs to")
                + f" {whose.describe()}, who may not open it, and root does not do it instead",
                remedy=_OPEN_TO_THEM,
            )

    def _whose(self) -> User | None:
        return self.user if self.user is not None or not self._files else self.owner

    def _must_have_landlock(self) -> bool:
        """Whether root may not open them without it: others may have written them."""
        if self._needs_landlock:
            return True
        states = [os.fstat(file.fd) for file in self._files]
        files = [one for one in states if not _is_device(one)]
        return any(one.st_uid or one.st_mode & 0o022 for one in files)

    def _hand(self, name: str, *, writable: bool, said: bool) -> int:
        held = self._opened.get(name)
        try:
            proven = self._open_in_vm is not None or self._known is not None
            if held is not None:
                fd = os.open(f"/proc/self/fd/{held}", os.O_PATH | os.O_CLOEXEC)
            else:
                fd = os.open(name, os.O_PATH | os.O_CLOEXEC) if proven or said else look(name)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"there is no image {printable(name)}") from None
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise UnsupportedError(f"{printable(name)} cannot be opened: {why}") from None
        if fd == confined.LISTENING:
            low, fd = fd, _above_listening(fd)
            os.close(low)
        self.callback(os.close, fd)
        status = os.fstat(fd)
        file = FileId.of(status)
        if file is None:
            raise UnsupportedError(f"{printable(name)} is no regular file and no block device")
        if self._open_in_vm is not None and file not in self._open_in_vm:
            raise UnsupportedError(f"{printable(name)} is no file that the VM has open")
        if writable or not self._files:
            self._check_known(fd, name)
        self._files.append(_File(fd, name, writable, said and held is None))
        return fd

    def _check_known(self, fd: int, name: str) -> None:
        status = os.fstat(fd)
        same = {(status.st_dev, status.st_ino), (None, status.st_ino)}
        if self._known is not None and not same & set(self._known):
            raise UnsupportedError(f"{printable(name)} is another file than it was")

    def _leaf(self, name: str, *, writable: bool, said: bool) -> dict[str, Any]:
        fd = self._hand(name, writable=writable, said=said)
        driver = "host_device" if _is_device(os.fstat(fd)) else "file"
        return {"driver": driver, "filename": f"/proc/self/fd/{fd}"}

    def _data_file_of(self, storage: Mapping[str, Any]) -> Sequence[str]:
        """Return the data file that a qcow2 image's header names, if that is known."""
        match = _HANDED.fullmatch(str(innermost(storage).get("filename")))
        if match is None:
            return ()
        name = self.shown(match[0])
        if name not in self._more:
            self._questions.append(f"q{match[1]}@{_offset(storage)}")
        return self._more.get(name, ())

    def _vmdk(self, name: str, *, writable: bool, said: bool) -> dict[str, Any]:
        """Hand what may be a mere description, and the extents that it names.

        QEMU opens those by their names only, so that the description needs its own, too.
        """
        self._needs_landlock = True
        fd = self._hand(name, writable=writable, said=said)
        if name not in self._more:
            self._questions.append(f"v{fd}")
            return {"driver": "file", "filename": f"/proc/self/fd/{fd}"}
        for named in self._more[name]:
            beside = posixpath.join(posixpath.dirname(name), named)
            self._check_known(self._hand(beside, writable=writable, said=True), beside)
        return {"driver": "file", "filename": name}


def _above_listening(fd: int) -> int:
    """Duplicate a descriptor to one that no program takes for a listening socket."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, confined.LISTENING + 1)


def has_servers(options: Mapping[str, Any]) -> bool:
    """Whether an image, as a VM has it open, lies on what is no file: on an NBD server, say."""
    children = [options[key] for key in ("file", "data-file", "backing") if options.get(key)]
    if not children:
        return options.get("driver") not in _LEAVES
    return any(has_servers(one) for one in children)


def is_local(options: Mapping[str, Any]) -> bool:
    """Whether an image's description, from a header, is of files and formats alone.

    What else it says of them are words and numbers, which open nothing.
    """
    driver = options.get("driver")
    if driver in _LEAVES:
        children: tuple[str, ...] = ()
        if not isinstance(options.get("filename"), str) or not options["filename"]:
            return False
    elif driver in FORMATS:
        children = ("file", "data-file") if driver == "qcow2" else ("file",)
        if "file" not in options or "filename" in options:
            return False
    else:
        return False
    for key, value in options.items():
        if key in children:
            if not isinstance(value, Mapping) or not is_local(value):
                return False
        elif isinstance(value, (dict, list)) or key.partition(".")[0] in _CHILDREN:
            return False
    return True


#: Options of any of the drivers that name a node, an image or a file besides.
_CHILDREN = frozenset({"file", "data-file", "backing", "header", "extents", "pr-manager"})


def _absolute(name: str) -> str:
    """Return an absolute name that leads to the same file: `..` counts from where a link leads."""
    return posixpath.join(os.getcwd(), name)  # noqa: PTH109  text


def _not_local(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{printable(name)} is not a local file",
        remedy="map it through the monitor of a VM that has it open",
    )


def _access_list(fd: int) -> list[tuple[int, int, int]]:
    """Return the entries of a file's access control list (acl(5))."""
    try:
        found = os.getxattr(f"/proc/self/fd/{fd}", "system.posix_acl_access")
        return list(_ACL_ENTRY.iter_unpack(found[4:]))
    except (OSError, struct.error):
        return []  # it has none


def _is_device(status: os.stat_result) -> bool:
    return stat.S_ISBLK(status.st_mode)


def _offset(storage: Mapping[str, Any]) -> int:
    """Return where in its file an image begins."""
    start = 0
    while isinstance(storage, Mapping):
        start += as_bytes(storage.get("offset", 0)) if storage.get("driver") == "raw" else 0
        storage = storage.get("file", ())
    return start
