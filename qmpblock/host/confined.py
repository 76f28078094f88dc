"""Runs one program with few files, another user's rights, and nothing else. A process of its own.

    python -I -S -c START RIGHTS PARENT WORD... -- PROGRAM ARGUMENT...

qemu-img and qemu-io read images that a guest, or whoever runs its QEMU, has written: their headers
may name any file, device or server. So they are started by `main`, which hands them what they
may open, and gives up the rest before they run: the user (where it is root), all groups and
capabilities, the way to get any of them again, sockets, core dumps, and with Landlock every file
but those that were handed, and what a program needs to start. It ends with its parent.

| RIGHTS   `-` (stay who we are) or `UID:GID:GROUP,GROUP,...`
| PARENT   the process id of whoever started it
| rN, wN   descriptor N may be opened (/proc/self/fd/N) for reading, for writing too
| nN=PATH  whoever the program runs as must come to the file of N by that name
| qN@OFF   a qcow2 header is at OFF in the file of N; vN: a VMDK image: if it names more files,
|          they are printed, and nothing is run
| landlock without Landlock, nothing is run as root
| network  sockets are allowed

The descriptors are O_PATH: they give no right to what they refer to. Nothing else is imported from
the package, and of Python only what is there anyway, and ctypes: then it takes 13 ms, of which 8
are Python's own.

Sockets are denied on x86-64, AArch64 and RISC-V, whose numbers are known here. Elsewhere Landlock
denies TCP (from Linux 6.7), and the user's rights are all that stands between an image and a
socket's path.
"""

from __future__ import annotations

import ctypes
import os
import posixpath
import stat
import sys

__all__ = ["FAILED", "MORE_FILES", "NOT_SAFE", "START", "UNREACHABLE", "main"]

START = f"""import sys
sys.path.append({posixpath.dirname(posixpath.abspath(__file__))!r})
from confined import main
main(*sys.argv[1:])"""
"""Python's own program text: a module is compiled once, a script each time, which takes 5 ms."""

FAILED = 121
"""Exit code: the rights could not be given up; nothing was run."""

UNREACHABLE = 122
"""Exit code: whoever it runs as does not come to a file by its name; nothing was run."""

NOT_SAFE = 123
"""Exit code: it would run as root, and this kernel has no Landlock; nothing was run."""

MORE_FILES = 124
"""Exit code: the images consist of more files; one's descriptor and their names were printed."""

# linux/prctl.h, linux/capability.h
_SET_PDEATHSIG, _CAPBSET_DROP, _SET_NO_NEW_PRIVS, _SET_SECCOMP, _CAP_AMBIENT = 1, 24, 38, 22, 47
_AMBIENT_CLEAR_ALL = 4
_CAPABILITIES = 64
_DAC_OVERRIDE = 1
_CAPABILITY_VERSION_3 = 0x20080522
_RLIMIT_CORE = 4
_SIGKILL = 9

# linux/landlock.h; the system calls have the same number on every architecture
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
#: How many kinds of access to files there are, by the version from which on.
_KINDS = ((5, 16), (3, 15), (2, 14), (1, 13))

#: What programs need to start.
_SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store",
    "/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/gnutls", "/etc/crypto-policies",
    "/etc/ssl/openssl.cnf", "/dev/urandom", "/dev/random", "/dev/zero",
)  # fmt: skip

#: By machine: the AUDIT_ARCH of its system calls, socket(2), io_uring_setup(2).
_NUMBERS = {
    "x86_64": (0xC000003E, 41, 425),
    "aarch64": (0xC00000B7, 198, 425),
    "riscv64": (0xC00000F3, 198, 425),
}
_HEAD = 64 << 10  # bytes of an image that are looked at
_QCOW2 = b"QFI\xfb"
_HAS_DATA_FILE = 0x4  # incompatible feature
_DATA_FILE_NAME = 0x44415441  # header extension
_VMDK = (b"KDMV", b"COWD")  # any other is taken for a description

_X32 = 0x40000000  # its calls have numbers of their own


class _RefusedError(Exception):
    def __init__(self, code: int, *why: str | bytes) -> None:
        super().__init__()
        self.code = code
        self.why = b"\0".join(os.fsencode(one) for one in why)


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("parent", ctypes.c_int32))


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("yes", ctypes.c_uint8),
        ("no", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Instruction)))


class _Capabilities(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _syscall(number: int, *arguments: object) -> int:
    done: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return done


def _prctl(option: int, *arguments: int) -> None:
    words = [ctypes.c_ulong(one) for one in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *words) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class _Landlock:
    """Which files may be opened; nothing may be made, removed or renamed."""

    def __init__(self, *, network: bool) -> None:
        version = _syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
        kinds = next(kinds for since, kinds in _KINDS if version >= since)
        self._known = (1 << kinds) - 1
        attributes = _Attributes(
            self._known, 3 if version >= 4 and not network else 0, 3 if version >= 6 else 0
        )
        size = 24 if version >= 6 else 16 if version >= 4 else 8
        self._fd = _syscall(
            _CREATE_RULESET,
            ctypes.byref(attributes),
            ctypes.c_size_t(size),
            ctypes.c_uint32(0),
        )

    def allow(self, fd: int, access: int) -> None:
        """Allow access to a file, or to all that is beneath a directory."""
        mode = os.fstat(fd).st_mode
        if not stat.S_ISDIR(mode):
            access &= _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
        if not stat.S_ISBLK(mode):
            access &= ~_IOCTL_DEV
        rule = _Beneath(access & self._known, fd)
        _syscall(_ADD_RULE, self._fd, 1, ctypes.byref(rule), ctypes.c_uint32(0))

    def allow_path(self, path: str, access: int) -> None:
        """Allow it, if there is such a path."""
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        self.allow(fd, access)
        os.close(fd)

    def enforce(self) -> None:
        """From now on, for this process and what it becomes."""
        _syscall(_RESTRICT_SELF, self._fd, ctypes.c_uint32(0))
        os.close(self._fd)


def _landlock(*, network: bool) -> _Landlock | None:
    try:
        return _Landlock(network=network)
    except OSError:
        return None  # an older kernel, or one where it is switched off


def _deny_sockets() -> None:
    """Have socket(2) fail, and io_uring, which can make sockets too."""
    machine = os.uname().machine
    if machine not in _NUMBERS or sys.maxsize < 1 << 32:
        return
    arch, *denied = _NUMBERS[machine]
    load, equal, above, answer = 0x20, 0x15, 0x35, 0x06
    kill, no_such_call, not_permitted, allow = 0x80000000, 0x50026, 0x50001, 0x7FFF0000
    code = [
        (load, 0, 0, 4),  # the architecture of the call
        (equal, 1, 0, arch),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),  # its number
        (above, 0, 1, _X32),
        (answer, 0, 0, no_such_call),
        (equal, 0, 1, denied[0]),
        (answer, 0, 0, not_permitted),
        (equal, 0, 1, denied[1]),
        (answer, 0, 0, no_such_call),
        (answer, 0, 0, allow),
    ]
    instructions = (_Instruction * len(code))(*(_Instruction(*one) for one in code))
    program = _Program(len(code), instructions)
    if _libc.prctl(_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(program), 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "this kernel does not let sockets be denied (seccomp)")


def _become(rights: str) -> None:
    """Become a user, for good."""
    uid, gid, *groups = (int(one) for one in rights.replace(",", ":").split(":") if one)
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _give_up(kept: int) -> None:
    """Give up the capabilities of this process."""
    header = _Header(_CAPABILITY_VERSION_3, 0)
    had = (_Capabilities * 2)()
    if _libc.capget(ctypes.byref(header), had) < 0:
        raise OSError(ctypes.get_errno(), "its capabilities cannot be told")
    kept &= had[0].permitted
    sets = (_Capabilities * 2)(_Capabilities(kept, kept, 0), _Capabilities(0, 0, 0))
    if _libc.capset(ctypes.byref(header), sets) < 0:
        raise OSError(ctypes.get_errno(), "its capabilities cannot be given up")


def _drop_bounds(kept: int) -> None:
    """Give up the capabilities that a program could get; whoever has none cannot, and need not."""
    for capability in range(_CAPABILITIES):
        if not kept >> capability & 1:
            try:
                _prctl(_CAPBSET_DROP, capability)
            except OSError:
                return  # no more of them, or none of ours


def _reaches(path: str, fd: int) -> bool:
    """Whether a path leads this process, as it is now, to a file."""
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    mine, given = os.fstat(found), os.fstat(fd)
    os.close(found)
    if stat.S_ISBLK(given.st_mode):
        return stat.S_ISBLK(mine.st_mode) and mine.st_rdev == given.st_rdev
    return (mine.st_dev, mine.st_ino) == (given.st_dev, given.st_ino)


def _head(fd: int, at: int) -> bytes:
    """Read the beginning of an image, as far as whoever we are now may."""
    try:
        opened = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return b""  # the program will say it
    try:
        return os.pread(opened, _HEAD, at)
    except OSError:
        return b""
    finally:
        os.close(opened)


def _data_file(head: bytes) -> list[bytes]:
    """Return the data file that a qcow2 header names (docs/interop/qcow2.txt)."""

    def number(at: int, length: int) -> int:
        return int.from_bytes(head[at : at + length], "big")

    if head[:4] != _QCOW2 or number(4, 4) < 3 or not number(72, 8) & _HAS_DATA_FILE:
        return []
    at = number(100, 4)
    while at + 8 <= len(head) and number(at, 4):
        length = number(at + 4, 4)
        if number(at, 4) == _DATA_FILE_NAME:
            return [head[at + 8 : at + 8 + length]]
        at += 8 + length + -length % 8
    return []  # whoever opens it has to name one


def _extents(head: bytes) -> list[bytes]:
    """Return the extents that a VMDK description names; a sparse file has none."""
    if head[:4] in _VMDK:
        return []
    lines = [line.strip() for line in head.splitlines()]
    words = [line.split(b'"') for line in lines if line[:2] in (b"RW", b"RD")]
    return [one[1] for one in words if len(one) > 2]


def _confine(rights: str, parent: int, words: list[str], program: str) -> None:
    limit = (ctypes.c_uint64 * 2)(0, 0)
    _libc.setrlimit(_RLIMIT_CORE, limit)
    network = "network" in words
    landlock = _landlock(network=network)
    stays_root = os.geteuid() == 0 and rights.startswith(("-", "0:"))
    if landlock is not None:
        for path in (*_SYSTEM, *_around(program)):
            landlock.allow_path(path, _READ_FILE | _READ_DIR | _EXECUTE)
        landlock.allow_path("/dev/null", _READ_FILE | _WRITE_FILE)
        for word in words:
            if word[0] in "rw":
                _allow_handed(landlock, int(word[1:]), writable=word[0] == "w")
    elif stays_root and "landlock" in words:
        raise _RefusedError(
            NOT_SAFE,
            "it would be opened as root, and this kernel has no Landlock, which would keep it from "
            "what its header may name",
        )
    # Root opens what others own, as ever; but of that, no more than it is handed.
    kept = 1 << _DAC_OVERRIDE if stays_root and landlock is not None else 0
    _drop_bounds(kept)
    if rights != "-":
        _become(rights)
    _prctl(_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    _give_up(kept)
    _prctl(_SET_PDEATHSIG, _SIGKILL)  # after the user: changing that forgets it
    if os.getppid() != parent:
        raise _RefusedError(FAILED, "whoever started it is gone")
    for word in words:
        number, equals, path = word[1:].partition("=")
        if word[0] == "n" and equals and not _reaches(path, int(number)):
            raise _RefusedError(UNREACHABLE, path)
        number, _, start = word[1:].partition("@")
        more = []
        if word[0] == "q" and start:
            more = _data_file(_head(int(number), int(start)))
        elif word[0] == "v":
            more = _extents(_head(int(number), 0))
        if more:
            raise _RefusedError(MORE_FILES, number, *more)
    if not os.access(program, os.X_OK):
        raise _RefusedError(
            FAILED, f"user {os.getuid()} may not run {program}: install it where everybody may"
        )
    _prctl(_SET_NO_NEW_PRIVS, 1)
    if not network:
        _deny_sockets()
    if landlock is not None:
        landlock.enforce()


def _allow_handed(landlock: _Landlock, fd: int, *, writable: bool) -> None:
    access = _READ_FILE | _IOCTL_DEV | (_WRITE_FILE | _TRUNCATE if writable else 0)
    try:
        landlock.allow(fd, access)
    except OSError as error:
        if error.errno != 77:  # EBADFD: a file in memory, which needs no rule
            raise


def _around(program: str) -> list[str]:
    """Return where a program that is not the system's has its libraries."""
    prefix = posixpath.dirname(posixpath.dirname(posixpath.realpath(program)))
    given = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return [path for path in (prefix, *given) if path not in ("", "/")]


def main(rights: str, parent: str, *rest: str) -> None:
    """Give up what the words do not name, and run the program. Never returns."""
    split = rest.index("--")
    words, command = list(rest[:split]), list(rest[split + 1 :])
    try:
        _confine(rights, int(parent), words, command[0])
        os.execv(command[0], command)  # noqa: S606 - that is what it is for
    except _RefusedError as error:
        code, why = error.code, error.why
    except OSError as error:
        code, why = FAILED, os.fsencode(f"its rights could not be given up: {error.strerror}")
    os.write(2, why)
    os._exit(code)
