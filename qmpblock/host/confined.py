"""Runs one program with few files, another user's rights, and nothing else. A process of its own.

    python -I -S -c START RIGHTS PARENT WORD... -- PROGRAM ARGUMENT...

qemu-img, qemu-io and qemu-nbd read images that a guest, or whoever runs its QEMU, has written:
their headers may name any file, device or server. So they are started by `main`, which hands them
what they may open, and gives up the rest before they run: the user (where it is root), all groups
and capabilities, the way to get any of them again, sockets, core dumps, and with Landlock every
file but those that were handed, and what a program needs to start. It ends with its parent.

| RIGHTS   `-` (stay who we are) or `UID:GID:GROUP,GROUP,...`
| PARENT   the process id of whoever started it
| rN, wN   descriptor N may be opened (/proc/self/fd/N) for reading, for writing too
| nN=PATH  whoever the program runs as must come to the file of N by that name
| qN@OFF   a qcow2 header is at OFF in the file of N; vN: a VMDK image: if it names more files,
|          they are printed, and nothing is run
| cN=PATH  the file of N, which is PATH, is a qcow2 image: of it, and of those below that are of the
|          same owner, is printed what their headers say, and nothing is run
| aN       descriptor N is a listening socket, which the program is to take for its own
|          (sd_listen_fds(3): it is handed on as descriptor 3)
| landlock without Landlock, nothing is run as root
| network  sockets are allowed

The descriptors are O_PATH: they give no right to what they refer to. Nothing else is imported from
the package, and of Python only what is there anyway, and ctypes: then it takes 10 ms, of which 7
are Python's own.

Sockets are denied on x86-64, AArch64 and RISC-V, whose numbers are known here. Elsewhere Landlock
denies TCP (from Linux 6.7), and the user's rights are all that stands between an image and a
socket's path.
"""

from __future__ import annotations

import os
import posixpath
import stat
import struct
import sys

__all__ = ["FAILED", "LISTENING", "MORE_FILES", "NOT_SAFE", "START", "UNREACHABLE", "main"]

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

LISTENING = 3
"""The descriptor at which a program looks for a listening socket (sd_listen_fds(3))."""

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

#: What a program that lies elsewhere may need of its installation: modules and data of QEMU's,
#: and of a script all that may be in the one that it starts, but nothing else.
_OF_QEMU = ("lib", "lib64", "libexec", "share")
_OF_SCRIPT = ("lib", "lib64", "libexec", "share", "usr", "root")
_PT_INTERP = 3

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
_KNOWN_FEATURES = 0x19  # dirty, compression type, extended L2: they say nothing of other files
_BACKING_FORMAT = 0xE2792ACA  # header extension
_LONGEST_NAME, _LONGEST_FORMAT = 1023, 15  # bytes
_MOST_IMAGES = 400
_VMDK = (b"KDMV", b"COWD")  # any other is taken for a description

_X32 = 0x40000000  # its calls have numbers of their own

_ATTRIBUTES = struct.Struct("=QQQ")  # landlock_ruleset_attr: files, network, scoped
_BENEATH = struct.Struct("=Qi")  # landlock_path_beneath_attr: access, the descriptor
_INSTRUCTION = struct.Struct("=HBBI")  # sock_filter: code, jumps if true and if not, operand
_PROGRAM = struct.Struct("HP")  # sock_fprog: how many, where
_CAPABILITY_HEADER = struct.Struct("=Ii")  # version, process
_SETS = struct.Struct("=6I")  # effective, permitted, inheritable; of 32 capabilities each


class _RefusedError(Exception):
    def __init__(self, code: int, *why: str | bytes) -> None:
        super().__init__()
        self.code = code
        self.why = b"\0".join(os.fsencode(one) for one in why)


class _Kernel:
    """System calls that Python has not.

    ctypes is imported only here: who merely starts this program need not wait for it.
    """

    def __init__(self) -> None:
        import ctypes

        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long
        self._long = ctypes.c_long
        self._errno = ctypes.get_errno
        self.buffer = ctypes.create_string_buffer
        self.address = ctypes.addressof

    def call(self, name: str, *words: object) -> int:
        """Call a function of libc; a structure is given as its bytes, or as a buffer.

        :raise OSError: it returned less than 0.
        """
        given = [self._long(one) if isinstance(one, int) else one for one in words]
        done: int = getattr(self._libc, name)(*given)
        if done < 0:
            raise OSError(self._errno(), os.strerror(self._errno()))
        return done

    def prctl(self, option: int, *words: object) -> None:
        """Control this process. The call has five arguments, always."""
        self.call("prctl", option, *(*words, 0, 0, 0, 0)[:4])


class _Landlock:
    """Which files may be opened; nothing may be made, removed or renamed."""

    def __init__(self, kernel: _Kernel, *, network: bool) -> None:
        version = kernel.call("syscall", _CREATE_RULESET, None, 0, 1)
        kinds = next(kinds for since, kinds in _KINDS if version >= since)
        self._kernel = kernel
        self._known = (1 << kinds) - 1
        tcp, scoped = 3 if version >= 4 and not network else 0, 3 if version >= 6 else 0
        attributes = _ATTRIBUTES.pack(self._known, tcp, scoped)
        size = 24 if version >= 6 else 16 if version >= 4 else 8
        self._fd = kernel.call("syscall", _CREATE_RULESET, attributes, size, 0)

    def allow(self, fd: int, access: int) -> None:
        """Allow access to a file, or to all that is beneath a directory."""
        mode = os.fstat(fd).st_mode
        if not stat.S_ISDIR(mode):
            access &= _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
        if not stat.S_ISBLK(mode):
            access &= ~_IOCTL_DEV
        rule = _BENEATH.pack(access & self._known, fd)
        self._kernel.call("syscall", _ADD_RULE, self._fd, 1, rule, 0)

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
        self._kernel.call("syscall", _RESTRICT_SELF, self._fd, 0)
        os.close(self._fd)


def _landlock(kernel: _Kernel, *, network: bool) -> _Landlock | None:
    try:
        return _Landlock(kernel, network=network)
    except OSError:
        return None  # an older kernel, or one where it is switched off


def _deny_sockets(kernel: _Kernel) -> None:
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
    instructions = kernel.buffer(b"".join(_INSTRUCTION.pack(*one) for one in code))
    try:
        kernel.prctl(_SET_SECCOMP, 2, _PROGRAM.pack(len(code), kernel.address(instructions)))
    except OSError as error:
        why = "this kernel does not let sockets be denied (seccomp)"
        raise OSError(error.errno, why) from None


def _become(rights: str) -> None:
    """Become a user, for good."""
    uid, gid, *groups = (int(one) for one in rights.replace(",", ":").split(":") if one)
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _give_up(kernel: _Kernel, kept: int) -> None:
    """Give up the capabilities of this process."""
    header, had = _CAPABILITY_HEADER.pack(_CAPABILITY_VERSION_3, 0), kernel.buffer(_SETS.size)
    kernel.call("capget", header, had)
    kept &= _SETS.unpack(had.raw)[1]  # what it is permitted
    kernel.call("capset", header, _SETS.pack(kept, kept, 0, 0, 0, 0))


def _drop_bounds(kernel: _Kernel, kept: int) -> None:
    """Give up the capabilities that a program could get; whoever has none cannot, and need not."""
    for capability in range(_CAPABILITIES):
        if not kept >> capability & 1:
            try:
                kernel.prctl(_CAPBSET_DROP, capability)
            except OSError:
                return  # no more of them, or none of ours


def _reaches(path: str, fd: int) -> bool:
    """Whether a path leads this process, as it is now, to a file."""
    try:
        there = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    mine, given = os.fstat(there), os.fstat(fd)
    os.close(there)
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


def _says(head: bytes) -> tuple[int, bytes, bytes] | None:
    """Return the size, the backing file and its format that a plain qcow2 header says.

    None where it says anything else that matters, or nothing that QEMU would take.
    """
    if len(head) < 104 or head[:4] != _QCOW2:
        return None
    version, at, length, bits, size = struct.unpack_from(">IQIIQ", head, 4)
    features, position = (0, 72) if version == 2 else struct.unpack_from(">Q20xI", head, 72)
    cluster = 1 << bits if 9 <= bits <= 21 else 0
    if version not in (2, 3) or features & ~_KNOWN_FEATURES or position > cluster:
        return None
    if size >> 63 or size % 512:
        return None
    if not at:
        return size, b"", b""
    if not 0 < length <= _LONGEST_NAME or position > at or at + length > min(len(head), cluster):
        return None
    fmt = _backing_format(head, position, at)
    name = head[at : at + length]
    return (size, name, fmt) if fmt is not None and _is_printable(name + fmt) else None


def _backing_format(head: bytes, position: int, end: int) -> bytes | None:
    """Return what a qcow2 header's extensions give as the backing file's format, if any.

    None where they reach past their end, or one is longer than QEMU would take.
    """
    fmt = b""
    while position + 8 <= end:
        kind, long = struct.unpack_from(">II", head, position)
        if not kind:
            break
        if position + 8 + long > end or (kind == _BACKING_FORMAT and long > _LONGEST_FORMAT):
            return None
        if kind == _BACKING_FORMAT:
            fmt = head[position + 8 : position + 8 + long]
        position += 8 + long + -long % 8
    return fmt


def _is_printable(words: bytes) -> bool:
    try:
        return words.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _follow(fd: int, path: str) -> None:
    """Print what the headers of a chain say, a line an image, as far as they are plain."""
    whose = None
    for _ in range(_MOST_IMAGES):
        status = os.fstat(fd)
        said = _says(_head(fd, 0)) if stat.S_ISREG(status.st_mode) else None
        if said is None or whose not in (None, (status.st_uid, status.st_gid)):
            return  # it is to be asked for by itself, with its owner's rights
        whose = status.st_uid, status.st_gid
        size, name, fmt = said
        line = b"\0".join((b"%d" % size, name, fmt, b"%d" % whose[0], b"%d" % whose[1])) + b"\n"
        while line:
            line = line[os.write(1, line) :]
        if fmt != b"qcow2" or not name or b":" in name.partition(b"/")[0]:
            return
        path = posixpath.join(posixpath.dirname(path), name.decode())
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return  # whoever asks for it will say why


def _extents(head: bytes) -> list[bytes]:
    """Return the extents that a VMDK description names; a sparse file has none."""
    if head[:4] in _VMDK:
        return []
    lines = [line.strip() for line in head.splitlines()]
    words = [line.split(b'"') for line in lines if line[:2] in (b"RW", b"RD")]
    return [one[1] for one in words if len(one) > 2]


def _confine(rights: str, parent: int, words: list[str], program: str) -> None:
    kernel = _Kernel()
    kernel.call("setrlimit", _RLIMIT_CORE, bytes(16))
    network = "network" in words
    stays_root = os.geteuid() == 0 and rights.startswith(("-", "0:"))
    landlock = _rules(kernel, words, network=network)
    if landlock is None and stays_root and "landlock" in words:
        raise _RefusedError(
            NOT_SAFE,
            "it would be opened as root, and this kernel has no Landlock, which would keep it from "
            "what its header may name",
        )
    # Root opens what others own, as ever; but of that, no more than it is handed.
    kept = 1 << _DAC_OVERRIDE if stays_root and landlock is not None else 0
    _drop_bounds(kernel, kept)
    if rights != "-":
        _become(rights)
    kernel.prctl(_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    _give_up(kernel, kept)
    kernel.prctl(_SET_PDEATHSIG, _SIGKILL)  # after the user: changing that forgets it
    if os.getppid() != parent:
        raise _RefusedError(FAILED, "whoever started it is gone")
    for word in words:
        _look(word)
    if not os.access(program, os.X_OK):
        raise _RefusedError(
            FAILED, f"user {os.getuid()} may not run {program}: install it where everybody may"
        )
    if landlock is not None:
        for path in _needs(program):
            landlock.allow_path(path, _READ_FILE | _READ_DIR | _EXECUTE)
    kernel.prctl(_SET_NO_NEW_PRIVS, 1)
    if not network:
        _deny_sockets(kernel)
    if landlock is not None:
        landlock.enforce()
    for word in words:
        if word[0] == "a":
            _hand_on(int(word[1:]))


def _hand_on(listening: int) -> None:
    """Have the program take a listening socket, which its own process id says is for it."""
    os.dup2(listening, LISTENING)
    os.close(listening)
    os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}


def _rules(kernel: _Kernel, words: list[str], *, network: bool) -> _Landlock | None:
    """Return rules, not yet in force, that let the system and what was handed be reached."""
    landlock = _landlock(kernel, network=network)
    if landlock is None:
        return None
    for path in _SYSTEM:
        landlock.allow_path(path, _READ_FILE | _READ_DIR | _EXECUTE)
    landlock.allow_path("/dev/null", _READ_FILE | _WRITE_FILE)
    for word in words:
        if word[0] in "rw":
            _allow_handed(landlock, int(word[1:]), writable=word[0] == "w")
    return landlock


def _look(word: str) -> None:
    """Do what a word asks for that is to be looked at with the rights of the user."""
    number, equals, path = word[1:].partition("=")
    if word[0] == "n" and equals and not _reaches(path, int(number)):
        raise _RefusedError(UNREACHABLE, path)
    if word[0] == "c":
        _follow(int(number), path)
        os._exit(0)
    number, _, start = word[1:].partition("@")
    more = []
    if word[0] == "q" and start:
        more = _data_file(_head(int(number), int(start)))
    elif word[0] == "v":
        more = _extents(_head(int(number), 0))
    if more:
        raise _RefusedError(MORE_FILES, number, *more)


def _allow_handed(landlock: _Landlock, fd: int, *, writable: bool) -> None:
    access = _READ_FILE | _IOCTL_DEV | (_WRITE_FILE | _TRUNCATE if writable else 0)
    try:
        landlock.allow(fd, access)
    except OSError as error:
        if error.errno != 77:  # EBADFD: a file in memory, which needs no rule
            raise


def _needs(program: str) -> list[str]:
    """Return what a program that is not the system's has to come to: itself, libraries, data."""
    file = posixpath.realpath(program)
    needed = [
        one for one in os.environ.get("LD_LIBRARY_PATH", "").split(":") if one not in ("", "/")
    ]
    if file.startswith(tuple(f"{one}/" for one in _SYSTEM)):
        return needed
    prefix = posixpath.dirname(posixpath.dirname(file))
    beside = [] if prefix == "/" else [prefix]
    with open(file, "rb") as opened:  # noqa: PTH123  pathlib takes 2 ms
        head = opened.read(_HEAD)
    if head[:2] == b"#!":  # it starts another one, which lies with it
        return [*needed, file, *(f"{one}/{name}" for one in beside for name in _OF_SCRIPT)]
    needed += [f"{one}/{name}/qemu" for one in beside for name in _OF_QEMU]
    return [*needed, file, *_libraries(file, _loader(head))]


def _loader(head: bytes) -> str:
    """Return the dynamic loader that a 64-bit ELF program names (elf(5)); empty if none."""
    if head[:6] != b"\x7fELF\x02" + bytes([1 + (sys.byteorder == "big")]) or len(head) < 64:
        return ""
    at, size, count = *struct.unpack_from("=Q", head, 32), *struct.unpack_from("=HH", head, 54)
    for start in range(at, at + size * count, size or 1):
        if start + 40 <= len(head) and struct.unpack_from("=I", head, start)[0] == _PT_INTERP:
            (offset,), (length,) = (struct.unpack_from("=Q", head, start + one) for one in (8, 32))
            return os.fsdecode(head[offset : offset + length].rstrip(b"\0"))
    return ""


def _libraries(file: str, loader: str) -> list[str]:
    """Ask the dynamic loader where a program's libraries are; it does not run the program."""
    if not loader:
        return []
    reading, writing = os.pipe()
    try:
        pid = os.posix_spawn(
            loader,
            [loader, "--list", file],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, writing, 1),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),  # the program says it again
            ],
        )
    except OSError:
        os.close(reading)
        return []
    finally:
        os.close(writing)
    with open(reading, "rb") as said:  # noqa: PTH123  it is a descriptor
        words = said.read().split()
    os.waitpid(pid, 0)
    return [loader, *(os.fsdecode(one) for one in words if one.startswith(b"/"))]


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
