"""What is to be known of a QEMU when a test has failed: gathered at once, whatever hangs.

It is asked on a monitor of its own, from a thread with an event loop of its own: the test's loop
may be stuck, closed, or in the middle of a command.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

from qmpblock.errors import Error, MonitorHeldError, printable
from qmpblock.qemu.monitor import Monitor
from qmpblock.testing import hang
from qmpblock.testing.qemu import QemuProcess
from qmpblock.testing.threads import threads

__all__ = ["PostMortem", "examine"]

_ANSWER = 3.0  # seconds for QEMU's monitor
_LIMIT = 15.0  # seconds for all of it
_SHOWN_QMP = 12  # messages in a report
_SHOWN_CONSOLE = 10  # lines there
_SHOWN_WIDTH = 300  # characters of each


@dataclass(frozen=True)
class PostMortem:
    """Of one QEMU, for people; in none of it are secrets.

    :ivar evidence: exit code, command line, stderr, stdout.
    :ivar state: run state, jobs, virtio queues, and what its threads wait for.
    :ivar qmp: what was said on its monitors.
    :ivar console: the lines of the tiny guest's serial port.
    """

    evidence: str
    state: str
    qmp: tuple[str, ...]
    console: tuple[str, ...]

    def summary(self) -> str:
        """Return what fits into a report."""
        parts = [self.evidence, self.state]
        if self.console:
            parts.append(_end("the guest's serial port", self.console, _SHOWN_CONSOLE))
        parts.append(_end("QMP, all monitors", self.qmp, _SHOWN_QMP))
        return "\n".join(parts)

    def files(self) -> dict[str, str]:
        """Return all of it, by names for files."""
        files = {
            "qemu.txt": f"{self.evidence}\n",
            "state.txt": f"{self.state}\n",
            "qmp.log": _lines(self.qmp),
        }
        if self.console:
            files["console.log"] = _lines(self.console)
        return files


def _lines(lines: tuple[str, ...]) -> str:
    return "".join(f"{printable(line, 1 << 20)}\n" for line in lines)


def _end(what: str, lines: tuple[str, ...], count: int) -> str:
    shown = [f"  {printable(line, _SHOWN_WIDTH)}" for line in lines[-count:]]
    if not shown:
        return f"{what}: nothing"
    of = f", the last {count} of {len(lines)} lines" if len(lines) > count else ""
    return "\n".join((f"{what}{of}:", *shown))


def examine(vm: QemuProcess) -> PostMortem:
    """Gather what can be known. Never raises for what QEMU does, and takes no more than 15 s."""
    said = tuple(vm.qmp_log())  # before this asks, too
    states: list[str] = []
    thread = threading.Thread(target=lambda: states.append(_state(vm)), daemon=True)
    thread.start()
    thread.join(_LIMIT)
    state = states[0] if states else f"its state could not be had within {_LIMIT:g} s"
    return PostMortem(vm.evidence(), state, said, vm.console)


def _state(vm: QemuProcess) -> str:
    if not vm.running:
        return "state: it has ended"
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(_look(vm))
    except Exception as error:  # a second failure must not hide the first
        return f"its state could not be had: {type(error).__name__}: {error}"
    finally:
        loop.close()


async def _look(vm: QemuProcess) -> str:
    try:
        async with await Monitor.connect(
            vm.report_path, greeting_timeout=_ANSWER, stall=_ANSWER
        ) as monitor:
            seen = await hang.look(monitor, vm.pid)
    except MonitorHeldError:  # nobody else comes there: it is QEMU that does not greet
        return _silent(vm, f"no greeting within {_ANSWER:g} s")
    except (Error, OSError) as error:
        return _silent(vm, str(error))
    return "\n".join((*seen.details, *(queue.describe() for queue in seen.queues)))


def _silent(vm: QemuProcess, why: str) -> str:
    return "\n".join((f"QEMU's monitor does not answer: {why}", *threads(vm.pid)))
