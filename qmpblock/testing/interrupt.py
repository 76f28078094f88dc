"""One Ctrl-C ends a run, also where a test blocks. Hooks of the plugin, which loads this.

asyncio's runner takes the first SIGINT as a wish: it cancels the test, which comes to that when the
loop runs again. A test that blocks (`time.sleep`, a lock, another process) never lets it; only
the second SIGINT is raised where it is. So the second is sent where the first was not obeyed.
"""

from __future__ import annotations

import os
import signal
import threading

import pytest

__all__ = ["interrupted"]

_PATIENCE = 2.0  # seconds to end a test in order, and longer where the machine is busy
_TURNS = 20

_INTERRUPTED: pytest.StashKey[threading.Event] = pytest.StashKey()


def interrupted(config: pytest.Config) -> bool:
    """Whether the run has been interrupted."""
    return config.stash[_INTERRUPTED].is_set() if _INTERRUPTED in config.stash else False


class _Watch:
    """A thread that is told of every signal, even while the main thread runs no Python."""

    def __init__(self, obeyed: threading.Event) -> None:
        self._obeyed = obeyed
        self._reads, self._writes = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._writes, False)
        self._before = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="the harness's interrupts", daemon=True).start()

    def _run(self) -> None:
        main = threading.main_thread().ident
        assert main is not None  # it runs
        while numbers := os.read(self._reads, 64):
            if signal.SIGINT in numbers and not self._is_obeyed():
                signal.pthread_kill(main, signal.SIGINT)
                return  # whoever presses Ctrl-C again is heard as ever
        os.close(self._reads)

    def _is_obeyed(self) -> bool:
        # In turns: where this process has to wait for a processor, this thread has to as well.
        return any(self._obeyed.wait(_PATIENCE / _TURNS) for _ in range(_TURNS))

    @pytest.hookimpl(tryfirst=True)  # what the others do with it, such as to show it, takes time
    def pytest_keyboard_interrupt(self) -> None:
        """Know that it was obeyed."""
        self._obeyed.set()

    def pytest_unconfigure(self) -> None:
        """End the thread; whoever has taken the signals over meanwhile keeps them."""
        now = signal.set_wakeup_fd(self._before)
        if now not in (-1, self._writes):
            signal.set_wakeup_fd(now)
        os.close(self._writes)


def pytest_configure(config: pytest.Config) -> None:
    """Begin to watch, in the process that is interrupted: not in xdist's workers."""
    config.stash[_INTERRUPTED] = threading.Event()
    mine = threading.current_thread() is threading.main_thread()
    if mine and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Watch(config.stash[_INTERRUPTED]))
