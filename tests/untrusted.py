"""Eve: an unprivileged user who is not to be trusted, for tests that run as root.

She has no name (a uid without a passwd entry), a directory of her own in which her images lie, and
a QEMU that runs as her. What she does there is a small script each, run by Python as her; it can be
as fast as the machine is, beside whatever root does meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from qmpblock.testing.images import BuiltScenario, Tools, build, find_qemu
from qmpblock.testing.qemu import QemuProcess
from qmpblock.testing.scenario import Scenario

__all__ = ["UID", "Eve", "EvesQemu", "eve", "within"]

UID = 61666
AS_HER = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--pdeathsig=KILL")
# A QEMU below a directory that only root may enter is reached by an open descriptor.
_INTO = 'exec 9<"$1"; shift; exec "$@"'

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


class EvesQemu(QemuProcess):
    """A QEMU that runs as her."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        program, *rest = self.command
        tree = Path(program).resolve().parent.parent
        if all(one.stat().st_mode & 0o001 for one in tree.parents):
            self.command = (*AS_HER, "--", program, *rest)
            return
        inside = f"/proc/self/fd/9/bin/{Path(program).name}"
        data = ("-L", "/proc/self/fd/9/root/usr/share/qemu")
        into = ("sh", "-c", _INTO, "sh", str(tree))
        self.command = (*into, *AS_HER, "--", inside, *data, *rest)

    async def start(self) -> None:
        """Start it; the guest's serial line is hers, too."""
        console = self._console
        if console is not None:
            listen = console.open

            async def open_for_her() -> None:
                await listen()
                os.chown(console.path, UID, UID)

            console.open = open_for_her  # type: ignore[method-assign]
        await super().start()


class Eve:
    """The user, and what is hers.

    :ivar directory: she may write to it, and anybody may look into it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[EvesQemu] = []

    async def build(self, scenario: Scenario) -> BuiltScenario:
        """Make the images of a scenario, in her directory, as her own."""
        tools = Tools.of(find_qemu())
        built = await build(scenario, self.directory / f"images{len(self.started)}", tools)
        self.take(built.directory)
        return built

    async def start(self, what: Scenario | BuiltScenario, **options: Any) -> EvesQemu:
        """Start a QEMU of hers; it ends with the test."""
        built = await self.build(what) if isinstance(what, Scenario) else what
        directory = self.directory / f"vm{len(self.started)}"
        directory.mkdir(mode=0o755)
        vm = EvesQemu.of(built, directory=directory, qemu=find_qemu(), **options)
        self.started.append(vm)
        self.take(directory)
        await vm.start()
        return vm

    def take(self, path: Path) -> None:
        """Make a file, or all of a directory, hers."""
        os.lchown(path, UID, UID)
        for one in path.rglob("*"):
            os.lchown(one, UID, UID)

    def run(self, script: str, *arguments: str) -> str:
        """Run a small script as her, to its end; return what it printed."""
        command = [*AS_HER, "--", *_python(script), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd="/", timeout=30
        ).stdout

    @contextlib.contextmanager
    def running(self, script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Run a script as her, beside what is done inside; it says `ready` when it begins.

        In it, PARENT is the pid of this process.
        """
        script = f"PARENT = {os.getpid()}\n{script}"
        command = [*AS_HER, "--", *_python(script), *arguments]
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
    os.chown(directory, UID, UID)
    her = Eve(directory)
    try:
        yield her
    finally:
        for vm in her.started:
            await vm.close()
        shutil.rmtree(directory, ignore_errors=True)
