"""Other users, for tests that run as root: what runs as them, and what is theirs.

A `User` has the rights that setpriv(1) gives, and a `UsersQemu` runs as one. A `Runner` runs our
own command as one; as a program this module is its other end. **Eve** is a user who is not to be
trusted: without a name (a uid without a passwd entry), with a directory of her own in which her
images lie, and with a QEMU of her own. What she does there is a small script each, run by Python as
her; it can be as fast as the machine is, beside whatever root does meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from qmpblock.testing.images import BuiltScenario, Tools, build, find_qemu
from qmpblock.testing.qemu import QemuProcess
from qmpblock.testing.scenario import Scenario

__all__ = [
    "EVE",
    "GROUP",
    "USERS",
    "VM_USER",
    "Eve",
    "Runner",
    "User",
    "UsersQemu",
    "eve",
    "within",
]

EVE, VM_USER, STRANGER, GROUP = 61666, 64055, 64200, 64100
# Something below a directory that only root may enter is reached by an open descriptor.
_INTO = 'umask "$1"; exec 9<"$2"; shift 2; exec "$@"'


@dataclass(frozen=True)
class User:
    """Who runs something, as setpriv(1) makes them.

    :ivar uid: and the number of the group of their own.
    :ivar groups: others that they are in.
    :ivar capabilities: that they have, as setpriv names them.
    """

    uid: int
    groups: tuple[int, ...] = ()
    capabilities: tuple[str, ...] = ()

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs a program as this user."""
        groups = ",".join(map(str, self.groups))
        given = ",".join(["-all", *(f"+{one}" for one in self.capabilities)])
        return [
            *("setpriv", f"--reuid={self.uid}", f"--regid={self.uid}"),
            f"--groups={groups}" if groups else "--clear-groups",
            "--pdeathsig=KILL",
            *((f"--inh-caps={given}", f"--ambient-caps={given}") if self.uid else ()),
            *words,
        ]


USERS = {
    "the VM's user": User(VM_USER, (GROUP,)),
    "the images' group": User(STRANGER, (GROUP,)),
    "the group, SYS_PTRACE": User(STRANGER, (GROUP,), ("sys_ptrace",)),
    "the group, SYS_PTRACE, DAC_READ_SEARCH": User(
        STRANGER, (GROUP,), ("sys_ptrace", "dac_read_search")
    ),
    "root": User(0),
}


def _python_for_all() -> tuple[str, dict[str, str]]:
    """Return a Python that every user may run, and the environment in which it finds all.

    This one may be in a directory that only root may enter; then it is the system's.
    """
    if all(one.stat().st_mode & 0o001 for one in Path(sys.executable).resolve().parents):
        return sys.executable, {}
    paths = [one for one in sys.path if one.endswith(("site-packages", "tests"))]
    root = str(Path(__file__).parents[1])
    return "/usr/bin/python3", {"PYTHONPATH": os.pathsep.join([root, *paths])}


@dataclass
class Runner:
    """Runs `qmpblock` as a user, until it is closed."""

    user: User
    environment: dict[str, str]
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        python, found = _python_for_all()
        self.process = subprocess.Popen(
            self.user.command(python, "-B", __file__),
            env={**os.environ, **found, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object) -> tuple[int, str]:
        """Run a command to its end; return its exit code and all that it printed."""
        self.begin(*arguments)
        return self.end()

    def begin(self, *arguments: object) -> None:
        """Begin a command."""
        self.process.stdin.write(json.dumps([str(one) for one in arguments]) + "\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        """Wait for it."""
        code, printed = json.loads(self.process.stdout.readline())
        return code, printed

    def close(self) -> None:
        """End the process, and what it runs."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class UsersQemu(QemuProcess):
    """A QEMU that runs as a user.

    :param user: None: as Eve.
    :param umask: of what it makes.
    """

    def __init__(
        self, *arguments: Any, user: User | None = None, umask: int = 0o022, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.user = user or User(EVE)
        program, *rest = self.command
        tree = Path(program).resolve().parent.parent
        if not all(one.stat().st_mode & 0o001 for one in tree.parents):
            program = f"/proc/self/fd/9/bin/{Path(program).name}"
            rest = ["-L", "/proc/self/fd/9/root/usr/share/qemu", *rest]
        into = ("sh", "-c", _INTO, "sh", f"{umask:o}", str(tree))
        self.command = (*into, *self.user.command(program, *rest))

    async def start(self) -> None:
        """Start it; the guest's serial line is the user's, too."""
        console = self._console
        if console is not None:
            listen = console.open

            async def open_for_them() -> None:
                await listen()
                os.chown(console.path, self.user.uid, self.user.uid)

            console.open = open_for_them  # type: ignore[method-assign]
        await super().start()


# Puts a link to TARGET in the place of whatever appears that is called like one of PATTERNS, as
# fast as it can, and says how often.
SWAP = """
import fnmatch, os, re, sys
directory, target, *patterns = sys.argv[1:]
fits = re.compile("|".join(map(fnmatch.translate, patterns))).match
os.chdir(directory)
swapped = 0
print("ready", flush=True)
while os.getppid() == PARENT:
    for name in filter(fits, os.listdir()):
        try:
            found = os.lstat(name).st_mode & 0o170000
        except OSError:
            continue
        if found == 0o120000:
            continue
        try:
            os.symlink(target, ".link")
            os.rename(".link", name)
            swapped += 1
            print(swapped, flush=True)
        except OSError:
            pass
"""


class Eve:
    """The user, and what is hers.

    :ivar directory: she may write to it, and anybody may look into it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[UsersQemu] = []

    async def build(self, scenario: Scenario) -> BuiltScenario:
        """Make the images of a scenario, in her directory, as her own."""
        tools = Tools.of(find_qemu())
        built = await build(scenario, self.directory / f"images{len(self.started)}", tools)
        self.take(built.directory)
        return built

    async def start(self, what: Scenario | BuiltScenario, **options: Any) -> UsersQemu:
        """Start a QEMU of hers; it ends with the test."""
        built = await self.build(what) if isinstance(what, Scenario) else what
        directory = self.directory / f"vm{len(self.started)}"
        directory.mkdir(mode=0o755)
        vm = UsersQemu.of(built, directory=directory, qemu=find_qemu(), **options)
        self.started.append(vm)
        self.take(directory)
        await vm.start()
        return vm

    def take(self, path: Path) -> None:
        """Make a file, or all of a directory, hers."""
        os.lchown(path, EVE, EVE)
        for one in path.rglob("*"):
            os.lchown(one, EVE, EVE)

    def run(self, script: str, *arguments: str) -> str:
        """Run a small script as her, to its end; return what it printed."""
        command = User(EVE).command(*_python(script), *arguments)
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd="/", timeout=120
        ).stdout

    @contextlib.contextmanager
    def running(self, script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Run a script as her, beside what is done inside; it says `ready` when it begins.

        In it, PARENT is the pid of this process.
        """
        script = f"PARENT = {os.getpid()}\n{script}"
        command = User(EVE).command(*_python(script), *arguments)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                yield process
            finally:
                process.kill()

    @contextlib.contextmanager
    def swapping(self, target: Path, directory: Path, *patterns: str) -> Iterator[list[int]]:
        """Put a link to a file in the place of whatever appears that is called like that.

        :return: afterwards, how many there were.
        """
        counted: list[int] = []
        with self.running(SWAP, str(directory), str(target), *patterns) as process:
            yield counted
            process.kill()
            assert process.stdout is not None
            counted.append(len(process.stdout.read().split()))


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail where something blocks the whole process."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"it still hangs after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    except TimeoutError as error:  # it is an OSError
        pytest.fail(str(error))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _python(script: str) -> list[str]:
    return [os.path.realpath(sys.executable), "-I", "-S", "-c", script]


@pytest_asyncio.fixture
async def eve(vm_dir: Path) -> AsyncIterator[Eve]:
    """Give a user who is not to be trusted; what we write goes to `vm_dir`, which is root's."""
    if os.geteuid() != 0:
        pytest.skip("only root can run a QEMU as another user")
    directory = Path(tempfile.mkdtemp(prefix="qe-", dir="/tmp"))  # below it she can come to it
    directory.chmod(0o755)
    os.chown(directory, EVE, EVE)
    her = Eve(directory)
    try:
        yield her
    finally:
        for vm in her.started:
            await vm.close()
        shutil.rmtree(directory, ignore_errors=True)


def _serve() -> None:
    import qmpblock.allocation.allocate
    import qmpblock.chains.jobs
    import qmpblock.chains.snapshot  # what the commands import, once
    import qmpblock.cli.app

    os.umask(0o007)
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as printed:
            pid = os.fork()
            if pid == 0:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                code = qmpblock.cli.app.run(json.loads(line))
                sys.stdout.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            printed.seek(0)
            print(json.dumps([code, printed.read()]), flush=True)


if __name__ == "__main__":
    _serve()
