"""What strikes a migration whose controller lives: a process that dies or is stopped, a wire cut.

What was stopped or cut goes on afterwards. Whoever waits for it loses patience soon, or a row of
the kill matrix (migrationkills.py) would take a day.
"""

import contextlib
import os
import signal

import pytest
from migrating import storage_daemons
from migrationoutcomes import WIRE_CUT

from qmpblock.migration import hold, imageserver, landing, outward, sights, storage, wayback

#: Seconds that the controller waits for QEMU: of a guest that stands, of an answer.
STALL = 1.0
#: That is what other limits of the engine are brought down to: they are of tens of seconds.
_LIMITS = (
    (outward, "STANDSTILL", 1.0),
    (storage, "HOLD", 0.3),
    (wayback, "_OWN_DECISION", 0.5),
    (landing, "_ANSWER", 0.3),
    (hold, "_ANSWER", 0.3),
    (imageserver, "_ENDING", 0.3),
    (sights, "_ANSWER", 0.3),
)


@contextlib.contextmanager
def impatient():
    """Have a migration give up in a second or two what it else gives up in ten and more."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, seconds in _LIMITS:
            patch.setattr(module, name, seconds)
        yield


class Stroke:
    """A signal to processes that are found when it strikes.

    :param find: gives their ids; none, if there are none now.
    :param number: SIGKILL, or SIGSTOP: then `mend` has them go on.
    :ivar struck: whether it has; `phase`: in which the migration was then.
    """

    def __init__(self, find, number):
        self.struck = False
        self.phase = None
        self._find = find
        self._number = number
        self._held = []

    async def strike(self, phase):
        self.phase = phase
        for pid in self._find():
            self._held.append(os.pidfd_open(pid))
            signal.pidfd_send_signal(self._held[-1], self._number)
        self.struck = bool(self._held)

    def mend(self):
        """Have go on what was stopped, if it lives. Idempotent."""
        while self._held:
            held = self._held.pop()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(held, signal.SIGCONT)
            os.close(held)


class Cut:
    """The wire to another host, as long as it is not mended."""

    def __init__(self, host):
        self.struck = False
        self.phase = None
        self._host = host

    async def strike(self, phase):
        self.phase = phase
        self._host.set_wire(up=False)
        self.struck = True

    def mend(self):
        """Plug it in again. Idempotent."""
        self._host.set_wire(up=True)


def blow(struck, source, destination, place, host=None):
    """Return what strikes so.

    :param place: where storage daemons have their images.
    :param host: on which the destination is, if it is on another one.
    """
    if struck == WIRE_CUT:
        return Cut(host)
    found = {
        "source hangs": lambda: [source.pid],
        "destination hangs": lambda: [destination.pid],
    }
    number = signal.SIGSTOP if "hangs" in struck else signal.SIGKILL
    return Stroke(found.get(struck, lambda: storage_daemons(place)), number)
