"""Races: root does one small thing over and over, while Eve swaps what it goes by.

Eve runs as fast as she can (`tests/otherusers.py`) in a directory of hers, beside which lies one of
root's that the kernel watches (inotify). A try is lost if anything there was opened, made, changed
or removed; what root does in Eve's directory, or that it is refused, is no loss.

Each race comes with what a naive program would do in its place: that must lose, or the race shows
nothing. tests/test_races.py runs a sample, tests/soak/test_races.py thousands of tries of each.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from headers_of_eve import CHANGED, OPENED, Watch, give, img, open_to_all, over, with_data_file
from otherusers import EVE, Eve

from qmpblock.address import UnixAddress
from qmpblock.changes.journalfile import DistrustedError, JournalFile
from qmpblock.errors import Error
from qmpblock.graph.places import FileId
from qmpblock.host.borrowed import open_as_it_has
from qmpblock.host.fallocate import keep_size
from qmpblock.host.handed import HandedFiles
from qmpblock.host.imagechain import blockdev
from qmpblock.host.ourfiles import Directory, remove, write_file
from qmpblock.host.qemuimg import QemuImg
from qmpblock.host.socketfolder import SocketFolder, remove_socket
from qmpblock.host.space import open_image
from qmpblock.host.statedirectory import OpenDirectory
from qmpblock.sockets import open_socket

__all__ = ["RACES", "Race", "Score", "race", "race_naively"]

SIZE = 65536
_MEMORY = "/dev/shm"  # syncing takes no time there

# What Eve can do, in her directory; then comes what she does over and over.
_EVE = """
import ctypes, os, random, time
here, seed, longest = sys.argv[1:4]
os.chdir(here)
chance, longest = random.Random(int(seed)), float(longest)
libc = ctypes.CDLL(None)

def pause():
    end = time.perf_counter() + longest * chance.random() ** 2
    while time.perf_counter() < end:
        pass

def exchange(one, other):
    libc.renameat2(-100, one.encode(), -100, other.encode(), 2)

def put(what, name):
    'Put a link or a FIFO in the place of a name.'
    try:
        os.mkfifo('.new') if what == 'fifo' else os.symlink(what, '.new')
        os.rename('.new', name)
    except OSError:
        pass

def away(name):
    try:
        os.unlink(name)
    except OSError:
        pass
"""
_LOOP = """
print('ready', flush=True)
while os.getppid() == PARENT:
    step()
    pause()
"""

COMES_FIRST = """
def step():
    put(chance.choice(('../root/victim', '../root/new')), 'over')
    pause()
    away('over')
"""
SWAPS_HER_MONITOR = """
import socket
os.unlink('disk')
os.symlink('../root/nbd', 'link')
monitor = socket.socket(socket.AF_UNIX)
monitor.bind('disk')
monitor.listen(100)
monitor.setblocking(False)
def step():
    exchange('disk', 'link')
    try:
        monitor.accept()
    except OSError:
        pass
"""
COMES_FIRST_IN_A_SHARED_ONE = """
os.chdir('../shared')
def step():
    try:
        os.symlink('../root', 'qmpblock-1')
    except OSError:
        pass
    pause()
    away('qmpblock-1')
"""
# A directory that root has made in hers she can rename.
SWAPS_WHAT_ROOT_MADE = """
os.symlink('../root', 'link')
def step():
    exchange('mine', 'link')
"""
SWAPS_WHAT_MAY_BE_MISSING = """
def step():
    put('../root/victim', 'over')
    pause()
    away('over')
    pause()
    os.close(os.open('over', os.O_CREAT))
    pause()
    away('over')
"""
COMES_AFTER = """
def step():
    try:
        plain = os.lstat('over').st_mode & 0o170000 == 0o100000
    except OSError:
        return
    if plain:
        put(chance.choice(('../root/victim', '../root/victim', 'fifo')), 'over')
    else:
        away('over')
"""
SWAPS_THE_FILE = """
os.symlink('../root/victim', 'link')
def step():
    exchange('disk', 'link')
"""
SWAPS_THE_DIRECTORY = """
os.symlink('../root', 'link')
def step():
    exchange('images', 'link')
"""
HOLDS_IT_AND_SWAPS = """
held = os.open('disk', os.O_RDWR)
os.symlink('../root/victim', 'link')
def step():
    exchange('disk', 'link')
"""
# What she may only read gets the number of what she writes to.
SWAPS_WHAT_IT_HOLDS = """
hers, hers_too = os.open('disk', os.O_RDWR), os.open('../root/readable', os.O_RDONLY)
number = os.dup(hers)
others = [os.dup2(hers, 200), os.dup2(hers_too, 201)]
os.close(hers)
os.close(hers_too)
def step():
    os.dup2(chance.choice(others), number)
"""
REWRITES_THE_HEADER = """
contents = [open(one, 'rb').read(4096) for one in ('clean', 'hostile')]
disk = os.open('disk', os.O_RDWR)
def step():
    os.pwrite(disk, contents[chance.randrange(2)], 0)
"""
SWAPS_THE_SOCKETS_DIRECTORY = """
import socket
os.symlink('../root', 'link')
def step():
    for name in ('images', 'link'):
        try:
            os.mkdir(name, 0o755)
        except OSError:
            pass
    try:
        socket.socket(socket.AF_UNIX).bind('images/nbd')
    except OSError:
        pass
    pause()
    exchange('images', 'link')
"""


class Arena:
    """Where it is done: `eve` is hers, `root` is root's, with a victim in it.

    In `shared` both can make files, as in /tmp.

    :ivar pid: of her process.
    :ivar known: device and inode of her files, before anything was swapped.
    """

    def __init__(self, directory: Path) -> None:
        self.eve, self.root = directory / "eve", directory / "root"
        for one in (self.eve, self.root, self.eve / "images"):
            one.mkdir(mode=0o755)
        self.shared = directory / "shared"
        self.shared.mkdir()
        self.shared.chmod(0o1777)
        self.disk = self.eve / "disk"
        self.pid = 0
        self.known: list[tuple[int, int]] = []
        self._chance = random.Random()
        self._listener = socket.socket(socket.AF_UNIX)
        self.restore()
        (self.root / "readable").write_bytes(bytes(SIZE))
        (self.root / "readable").chmod(0o644)
        self.disk.write_bytes(bytes(SIZE))
        give(self.eve / "images", EVE, 0o755)
        give(self.eve, EVE, 0o755)
        give(self.disk, EVE, 0o644)
        self._watch = Watch(self.root, events=OPENED | CHANGED)

    def restore(self) -> None:
        """Have root's files as they were."""
        for name in ("victim", "over"):
            (self.root / name).write_bytes(b"of root's alone\n")
            (self.root / name).chmod(0o600)
        if not (self.root / "nbd").exists():
            self._listener.close()
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(self.root / "nbd"))
            self._listener.listen()
            self._listener.setblocking(False)

    def harmed(self) -> bool:
        """Whether anything was done to root's, since the last time."""
        with contextlib.suppress(BlockingIOError):
            self._listener.accept()[0].close()
            return True
        return self._watch.seen()

    def wait(self) -> None:
        """Wait for a moment, as for QEMU: for as long as Eve takes to see a file, or less."""
        end = time.perf_counter() + self._chance.random() * 60e-6
        while time.perf_counter() < end:
            pass

    def close(self) -> None:
        """End the watch."""
        self._listener.close()
        self._watch.close()


@dataclass(frozen=True)
class Race:
    """One kind of place in the code, and how it is raced.

    :ivar eve: what she does over and over.
    :ivar ours: one try, by the code; `naive`: by what it might have been.
    :ivar longest: seconds that she waits between two steps, at most.
    :ivar prepare: is done first.
    :ivar slow: it runs a program each time.
    """

    eve: str
    ours: Callable[[Arena], object]
    naive: Callable[[Arena], object]
    longest: float = 4e-6
    prepare: Callable[[Arena], object] | None = None
    slow: bool = False


@dataclass
class Score:
    """How often it was tried, was refused, and was lost."""

    tries: int = 0
    refused: int = 0
    lost: int = 0


def race(run: Race, tries: int, seed: int) -> Score:
    """Run a race.

    :param seed: of Eve's choices.
    """
    score = Score()
    with contextlib.closing(_steps(run, run.ours, seed, score)) as steps:
        for _ in range(tries):
            next(steps)
    return score


def race_naively(run: Race, seed: int, seconds: float) -> Score:
    """Run what a naive program would do, until it has lost, or for so long."""
    score, end = Score(), time.monotonic() + seconds
    with contextlib.closing(_steps(run, run.naive, seed, score)) as steps:
        while not score.lost and time.monotonic() < end:
            next(steps)
    return score


def _steps(
    run: Race, step: Callable[[Arena], object], seed: int, score: Score
) -> Generator[None, None, None]:
    """Do it over and over."""
    with open_to_all(_MEMORY if os.access(_MEMORY, os.W_OK) else "/tmp") as directory:
        arena = Arena(directory)
        if run.prepare is not None:
            run.prepare(arena)
        script = f"import sys\n{_EVE}{run.eve}{_LOOP}"
        words = (str(arena.eve), str(seed), str(run.longest))
        with contextlib.closing(arena), Eve(directory).running(script, *words) as process:
            arena.pid = process.pid
            arena.harmed()
            while True:
                score.tries += 1
                try:
                    step(arena)
                except (OSError, Error, DistrustedError, subprocess.CalledProcessError):
                    score.refused += 1
                if arena.harmed():
                    score.lost += 1
                    arena.restore()
                    arena.harmed()
                assert process.poll() is None, "Eve has ended"
                yield


# Files of ours in her directory: overlays, and what an allocation needs beside them.


def _fill(fd: int) -> None:
    os.write(fd, b"ours")


def _made(directory: Directory) -> FileId:
    recorded: list[FileId] = []
    os.close(directory.make("over", recorded.append, _fill, like=os.stat("/proc/self/exe")))
    return recorded[0]


def make(arena: Arena) -> None:
    """Make a file."""
    with Directory(arena.eve) as directory:
        _made(directory)


def make_with_a_name(arena: Arena) -> None:
    """Make one where there are none without a name."""
    real = os.open

    def without(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise IsADirectoryError(21, "as on NFS")
        return real(path, flags, *rest, **more)

    os.open = without  # type: ignore[assignment]
    try:
        make(arena)
    finally:
        os.open = real


def make_naively(arena: Arena) -> None:
    """Look whether there is one, and make it."""
    path = arena.eve / "over"
    if not path.exists():
        path.write_bytes(b"ours")
        os.chown(path, EVE, EVE)


def use_again(arena: Arena) -> None:
    """Make a file, then write to it, as a snapshot does with its overlay."""
    with Directory(arena.eve) as directory:
        file = _made(directory)
        arena.wait()
        fd = directory.open("over", file, os.O_RDWR)
        try:
            os.write(fd, b"again")
            os.fsync(fd)
        finally:
            os.close(fd)


def use_again_naively(arena: Arena) -> None:
    """See that it is our file; then open it."""
    with Directory(arena.eve) as directory:
        file = _made(directory)
        arena.wait()
        if directory.holds("over", file):
            os.close(os.open(arena.eve / "over", os.O_RDWR | os.O_NONBLOCK))


def _with_directory(arena: Arena) -> Directory:
    """Open the directory that she swaps, at a moment at which it is hers."""
    while True:
        with contextlib.suppress(OSError):
            return Directory(arena.eve / "images")


def remove_one(arena: Arena) -> None:
    """Remove a file of ours by its path, as a recovery does."""
    with _with_directory(arena) as directory:
        with contextlib.suppress(FileNotFoundError):
            os.unlink("over", dir_fd=directory.fd)
        file = _made(directory)
    remove(arena.eve / "images" / "over", file)


def remove_one_naively(arena: Arena) -> None:
    """See that it is our file, and remove it."""
    path = arena.eve / "images" / "over"
    with _with_directory(arena) as directory:
        with contextlib.suppress(FileNotFoundError):
            os.unlink("over", dir_fd=directory.fd)
        file = _made(directory)
    if FileId.of(path.lstat()) == file:
        path.unlink()


def make_in_a_directory(arena: Arena) -> None:
    """Make a file, by its path, as `snapshot` is told."""
    with Directory(arena.eve / "images") as directory:
        file = _made(directory)
        directory.remove("over", file)


def make_in_a_directory_naively(arena: Arena) -> None:
    """See that it is her directory; then make the file, and remove it."""
    images = arena.eve / "images"
    if images.lstat().st_uid == EVE and not images.is_symlink():
        fd = os.open(images / "over2", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        os.close(fd)
        (images / "over2").unlink()


# Journals beside an image.


def journal(arena: Arena) -> None:
    """Make a journal, begin it again, remove it."""
    file = JournalFile.create(OpenDirectory.at(arena.eve), "over", b"{}\n")
    assert file is not None
    arena.wait()
    file.become(b"{}\n{}\n")
    file.become(b"{}\n")
    file.remove()


def journal_naively(arena: Arena) -> None:
    """Make one as nobody's, and go by its name from then on."""
    path = arena.eve / "over"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    arena.wait()
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK)
    os.write(fd, b"{}\n")
    os.close(fd)
    path.unlink()


def read_journal(arena: Arena) -> None:
    """Read what lies beside an image."""
    file = JournalFile.open(OpenDirectory.at(arena.eve), "disk")
    if file is not None:
        file.read()


def read_journal_naively(arena: Arena) -> None:
    """See that it is a plain file; then read it."""
    if stat.S_ISREG(arena.disk.lstat().st_mode):
        arena.disk.read_bytes()


def _a_journal_of_ours(arena: Arena) -> None:
    arena.disk.write_bytes(b"{}\n")
    give(arena.disk, 0, 0o600)


# Image files.


def reserve(arena: Arena) -> None:
    """Reserve space in an image that her process writes to."""
    fd = open_as_it_has(arena.pid, str(arena.disk))
    try:
        keep_size(fd, 0, 4096)
    finally:
        os.close(fd)


def reserve_naively(arena: Arena) -> None:
    """See that it is her process's file; then reserve there."""
    held = {FileId.of(os.stat(one)) for one in Path(f"/proc/{arena.pid}/fd").iterdir()}
    if FileId.of(arena.disk.stat()) in held:
        fd = os.open(arena.disk, os.O_WRONLY)
        keep_size(fd, 0, 4096)
        os.close(fd)


def reserve_by_number_naively(arena: Arena) -> None:
    """See by which descriptor her process writes to it; then open that."""
    wanted = FileId.of(arena.disk.stat())
    for entry in Path(f"/proc/{arena.pid}/fd").iterdir():
        if FileId.of(entry.stat()) == wanted:
            os.close(os.open(entry, os.O_WRONLY))


def look(arena: Arena) -> None:
    """Ask which parts of a VM's image are reserved."""
    os.close(open_image(str(arena.disk), arena.pid))


def look_at_a_closed_one(arena: Arena) -> None:
    """The same of an image that is in no VM."""
    os.close(open_image(str(arena.disk), None))


def look_naively(arena: Arena) -> None:
    """See that it is her file, and open it."""
    if arena.disk.lstat().st_uid == EVE and not arena.disk.is_symlink():
        os.close(os.open(arena.disk, os.O_RDONLY))


def write(arena: Arena) -> None:
    """Write what a person wants to have there."""
    write_file(arena.eve / "over", b"a picture", (b"",))


def write_naively(arena: Arena) -> None:
    """See that it is no link; then write."""
    path = arena.eve / "over"
    if not path.is_symlink():
        path.write_bytes(b"a picture")


def hand(arena: Arena) -> None:
    """Have a program read an image, as `map IMAGE` does."""
    with HandedFiles() as files:
        options = files.image(blockdev("raw", str(arena.disk)))
        name = options["file"]["filename"]
        command = files.command("head", ["-c16", name])
        subprocess.run(command, check=True, capture_output=True, pass_fds=files.descriptors)


def hand_naively(arena: Arena) -> None:
    """See that it is her file; then have a program read it."""
    if arena.disk.lstat().st_uid == EVE and not arena.disk.is_symlink():
        subprocess.run(["head", "-c16", str(arena.disk)], check=True, capture_output=True)


def _two_headers(arena: Arena) -> None:
    """Make an image of hers; and what it is a moment later: one with its data in root's file."""
    img("create", "-f", "qcow2", arena.eve / "clean", SIZE)
    with_data_file(arena.eve / "hostile", arena.root / "victim")
    _become_the_clean_one(arena)


def _two_backing_names(arena: Arena) -> None:
    img("create", "-f", "raw", arena.eve / "below", SIZE)
    over(arena.eve / "clean", "below")
    over(arena.eve / "hostile", arena.root / "victim")
    give(arena.eve / "below", EVE, 0o644)
    _become_the_clean_one(arena)


def _become_the_clean_one(arena: Arena) -> None:
    arena.disk.write_bytes((arena.eve / "clean").read_bytes().ljust(4 * SIZE, b"\0"))
    for name in ("clean", "hostile"):
        give(arena.eve / name, EVE, 0o644)


def read_header(arena: Arena) -> None:
    """Map an image that is in no VM."""
    asyncio.run(QemuImg().map(blockdev("qcow2", str(arena.disk)), ["qcow2"]))


def follow_header(arena: Arena) -> None:
    """Look at an image and all below it."""
    asyncio.run(QemuImg().chain(str(arena.disk), "qcow2"))


def read_header_naively(arena: Arena) -> None:
    """See that the header names nothing; then map it."""
    head = arena.disk.read_bytes()[:4096]
    if b"root" not in head:
        command = ["qemu-img", "map", "-f", "qcow2", "--output=json", str(arena.disk)]
        subprocess.run(command, check=True, capture_output=True)


def read_what_lies_below_naively(arena: Arena) -> None:
    """See that what the header names is hers; then map both."""
    below = arena.eve / "below"
    if below.lstat().st_uid == EVE and not below.is_symlink():
        command = ["qemu-img", "map", "-f", "qcow2", "--output=json", str(arena.disk)]
        subprocess.run(command, check=True, capture_output=True)


def _an_overlay(arena: Arena) -> None:
    _two_headers(arena)
    over(arena.eve / "top", "disk", "qcow2")
    give(arena.eve / "top", EVE, 0o644)
    seen = [path.stat() for path in (arena.disk, arena.eve / "top")]
    arena.known = [(one.st_dev, one.st_ino) for one in seen]


def commit(arena: Arena) -> None:
    """Bring an overlay home, as a recovery does."""
    top, below = str(arena.eve / "top"), blockdev("qcow2", str(arena.disk))
    asyncio.run(QemuImg().commit(top, "qcow2", below, known=arena.known))


def commit_naively(arena: Arena) -> None:
    """See that the header names nothing; then commit."""
    if b"root" not in arena.disk.read_bytes()[:4096]:
        command = ["qemu-img", "commit", "-q", "-d", "-f", "qcow2", str(arena.eve / "top")]
        subprocess.run(command, check=True, capture_output=True)


# Sockets.


def _listen(folder: SocketFolder) -> None:
    try:
        folder.make()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(folder.socket)
            listener.listen()
    finally:
        folder.remove()


def listen(arena: Arena) -> None:
    """Listen on a socket in a directory of our own, where Eve makes others."""
    _listen(SocketFolder("qmpblock-1", [str(arena.shared)]))


def listen_in_hers(arena: Arena) -> None:
    """The same where TMPDIR is hers."""
    _listen(SocketFolder("mine", [str(arena.eve)]))


def listen_naively(arena: Arena) -> None:
    """Take a directory that is there already for ours."""
    folder = arena.shared / "qmpblock-1"
    folder.mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "nbd2"))
    (folder / "nbd2").unlink()
    folder.rmdir()


def listen_in_hers_naively(arena: Arena) -> None:
    """Make a directory, see that it is ours, and go by its name from then on."""
    folder = arena.eve / "mine"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    with Directory(folder) as directory, socket.socket(socket.AF_UNIX) as listener:
        if directory.is_ours():
            listener.bind(str(folder / "nbd2"))
            (folder / "nbd2").unlink()


def connect(arena: Arena) -> None:
    """Connect to her monitor."""
    asyncio.run(open_socket(UnixAddress(str(arena.disk)))).close()


def connect_naively(arena: Arena) -> None:
    """See that it is hers; then connect."""
    if arena.disk.lstat().st_uid == EVE and not arena.disk.is_symlink():
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(arena.disk))


def remove_a_socket(arena: Arena) -> None:
    """Remove what a lock says was the socket of a server."""
    remove_socket(str(arena.eve / "images" / "nbd"))


def remove_a_socket_naively(arena: Arena) -> None:
    """See that it is a socket in a directory of hers; then remove it."""
    path = arena.eve / "images" / "nbd"
    if path.parent.lstat().st_uid == EVE and not path.parent.is_symlink() and path.is_socket():
        path.unlink()


RACES = {
    "make": Race(COMES_FIRST, make, make_naively),
    "make with a name": Race(COMES_FIRST, make_with_a_name, make_naively),
    "use again": Race(COMES_AFTER, use_again, use_again_naively),
    "remove": Race(SWAPS_THE_DIRECTORY, remove_one, remove_one_naively),
    "make in a directory": Race(
        SWAPS_THE_DIRECTORY, make_in_a_directory, make_in_a_directory_naively
    ),
    "journal": Race(COMES_AFTER, journal, journal_naively),
    "read a journal": Race(
        SWAPS_THE_FILE, read_journal, read_journal_naively, prepare=_a_journal_of_ours
    ),
    "reserve": Race(HOLDS_IT_AND_SWAPS, reserve, reserve_naively),
    "reserve by number": Race(SWAPS_WHAT_IT_HOLDS, reserve, reserve_by_number_naively),
    "look": Race(HOLDS_IT_AND_SWAPS, look, look_naively),
    "look at a closed one": Race(SWAPS_THE_FILE, look_at_a_closed_one, look_naively),
    "write": Race(SWAPS_WHAT_MAY_BE_MISSING, write, write_naively),
    "hand": Race(SWAPS_THE_FILE, hand, hand_naively, 1e-4, slow=True),
    "data file": Race(
        REWRITES_THE_HEADER, read_header, read_header_naively, 1e-3, _two_headers, slow=True
    ),
    "backing name": Race(
        REWRITES_THE_HEADER, follow_header, read_header_naively, 1e-3, _two_backing_names, slow=True
    ),
    "backing file": Race(
        SWAPS_THE_FILE.replace("disk", "below"),
        follow_header,
        read_what_lies_below_naively,
        1e-3,
        _two_backing_names,
        slow=True,
    ),
    "commit": Race(REWRITES_THE_HEADER, commit, commit_naively, 1e-3, _an_overlay, slow=True),
    "commit into another": Race(
        SWAPS_THE_FILE, commit, commit_naively, 1e-3, _an_overlay, slow=True
    ),
    "connect": Race(SWAPS_HER_MONITOR, connect, connect_naively),
    "listen": Race(COMES_FIRST_IN_A_SHARED_ONE, listen, listen_naively),
    "listen in hers": Race(SWAPS_WHAT_ROOT_MADE, listen_in_hers, listen_in_hers_naively),
    "remove a socket": Race(SWAPS_THE_SOCKETS_DIRECTORY, remove_a_socket, remove_a_socket_naively),
}
