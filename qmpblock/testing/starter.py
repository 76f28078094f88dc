"""Starting QEMUs for a test, a module or a whole run, and ending them in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Unpack

from qmpblock.testing.images import BuiltDisk, BuiltScenario, Tools, build
from qmpblock.testing.loops import SAME_LOOP, WrongLoopError, running_loop
from qmpblock.testing.qemu import QemuOptions, QemuProcess, check_options
from qmpblock.testing.scenario import Scenario

__all__ = ["Starter", "Watcher"]


class Watcher(Protocol):
    """Who looks at each VM as it begins and as it ends (`invariant.Invariant`)."""

    async def begin(self, vm: QemuProcess) -> None:
        """See a VM that has just started."""
        ...

    async def verify(self, vm: QemuProcess) -> None:
        """Look at a VM that is about to end.

        :raise AssertionError: it is not as it was.
        """
        ...


class Starter:
    """What the fixtures `start_qemu`, `start_module_qemu` and `start_session_qemu` give.

    :param qemu: the program.
    :param directory: for images, sockets and output.
    :ivar vms: those that it has started.
    :param watcher: tells who looks, where somebody does.
    :param home: the event loop that ends what is left: the fixture's.
    :param only_home: refuse any other one: what calls from another closes it before the VM has
        ended.
    :param name: the fixture's, for messages.
    """

    def __init__(
        self,
        qemu: str,
        directory: Path,
        *,
        watcher: Callable[[], Watcher | None] = lambda: None,
        home: asyncio.AbstractEventLoop | None = None,
        only_home: bool = False,
        name: str = "start_qemu",
    ) -> None:
        self._qemu = qemu
        self._directory = directory
        self._watcher = watcher
        self._home = home
        self._only_home = only_home
        self._name = name
        self._ended: set[int] = set()
        self.vms: list[QemuProcess] = []
        self._loops: list[asyncio.AbstractEventLoop] = []

    async def __call__(
        self,
        what: Scenario | BuiltScenario | Sequence[BuiltDisk] = (),
        **options: Unpack[QemuOptions],
    ) -> QemuProcess:
        """Start a QEMU; `options` are those of QemuProcess.

        :raise TypeError: an option that there is not.
        :raise WrongLoopError: called where the VM could not be ended in order.
        :raise QemuFailure: it did not start.
        """
        check_options(options)
        loop = running_loop(self._name)
        if self._only_home and loop is not self._home:
            raise WrongLoopError(
                f"{self._name} was called in an event loop that is closed before the fixture can "
                "end the VM: the test's own (asyncio.run), another plugin's (anyio), or that of "
                "another loop_scope",
                remedy=f"{SAME_LOOP}; in a loop of your own: "
                "`async with QemuProcess.of(built) as vm`",
            )
        number = len(self.vms)
        if isinstance(what, Scenario):
            what = await build(what, self._directory / f"images{number}", Tools.of(self._qemu))
        if "directory" not in options:
            directory = options["directory"] = self._directory / f"vm{number}"
            directory.mkdir(mode=0o700)
        options.setdefault("qemu", self._qemu)
        if isinstance(what, BuiltScenario):
            vm = QemuProcess.of(what, **options)
        else:
            vm = QemuProcess(what, **options)
        self.vms.append(vm)
        self._loops.append(loop)
        await vm.start()
        if watcher := self._watcher():
            await watcher.begin(vm)
        return vm

    async def end(self, *, watched: bool = True) -> None:
        """Check and end every VM; a failure of one does not keep another alive.

        :param watched: False: a test has failed, after which the leftovers are no news.
        :raise WrongLoopError: the loop in which one was started has been closed; it is killed.
        """
        here = asyncio.get_running_loop()
        failures: list[Exception] = []
        for vm, loop in self._still():
            if loop is here:
                failures += await self._end(vm, watched=watched)
            else:
                vm.abandon()
                failures.append(
                    WrongLoopError(
                        "a VM was killed: the event loop in which it was started was closed "
                        "before it was ended",
                        remedy=SAME_LOOP,
                    )
                )
        _raise(failures)

    def end_elsewhere(self, *, watched: bool = True) -> None:
        """End those VMs that were started in another event loop than `home`, each in its own.

        No loop runs here, and those of the test are not closed yet.

        :param watched: as in `end`.
        """
        failures: list[Exception] = []
        for vm, loop in self._still():
            if loop is not self._home and not loop.is_closed():
                failures += loop.run_until_complete(self._end(vm, watched=watched))
        _raise(failures)

    def _still(self) -> list[tuple[QemuProcess, asyncio.AbstractEventLoop]]:
        pairs = zip(self.vms, self._loops, strict=True)
        return [(vm, loop) for vm, loop in pairs if id(vm) not in self._ended][::-1]

    async def _end(self, vm: QemuProcess, *, watched: bool) -> list[Exception]:
        self._ended.add(id(vm))
        try:
            watcher = self._watcher()
            if watched and watcher is not None:
                await watcher.verify(vm)
            await vm.quit()
        except Exception as error:
            return [error]
        finally:
            await vm.close()
        return []


def _raise(failures: list[Exception]) -> None:
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise ExceptionGroup("several QEMUs did not end well", failures)
