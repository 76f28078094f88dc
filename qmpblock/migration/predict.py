"""Whether a migration will end, how long it takes, how long the guest stands: by figures. Pure.

The disks are mirrored first, while the guest writes on, then the memory is sent, while it writes on
still; of both only what is more than it writes brings the end nearer::

    disks    data / (wire - written)
    memory   in passes: what was dirtied during one is sent in the next, until what is left can be
             sent within the downtime that QEMU allows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qmpblock.errors import printable
from qmpblock.sizes import human_size

__all__ = ["Load", "Prediction", "Room", "WireSpeed", "lacking", "predict", "until_fits"]

#: Seconds that the hand-over itself takes, beside what is sent in it: flushing all disks, ending
#: the mirrors. Measured with one disk on a busy host; with eight it was four times as much.
HAND_OVER = 0.1
#: How often one side waits for the other while the guest stands.
_ROUND_TRIPS = 6
_PASSES = 1000  # more would be none that anybody waits for


@dataclass(frozen=True)
class Load:
    """What a guest writes. All in bytes a second.

    :ivar disks: to each disk, by what a person calls it.
    :ivar memory: to its memory, each page counted once a second; None where that is not measured.
    """

    disks: Mapping[str, float]
    memory: float | None

    @property
    def written(self) -> float:
        """To all disks."""
        return sum(self.disks.values())


@dataclass(frozen=True)
class WireSpeed:
    """What the wire between the two VMs carries, as measured.

    :ivar rate: bytes a second; `latency`: seconds that a message takes there and back.
    """

    rate: float
    latency: float


@dataclass(frozen=True)
class Prediction:
    """What is to be expected.

    :ivar converges: whether it ends; None where the wire's speed is not known.
    :ivar why: in words.
    :ivar needed: bytes a second above which it ends.
    :ivar disks: seconds until the disks are copied; `memory`: after which the memory is sent. None
        where it does not end, or cannot be told.
    :ivar downtime: seconds for which the guest stands; None likewise.
    """

    converges: bool | None
    why: str
    needed: float
    disks: float | None = None
    memory: float | None = None
    downtime: float | None = None

    @property
    def seconds(self) -> float | None:
        """How long it takes in all; None where that cannot be told."""
        if self.disks is None or self.memory is None or self.downtime is None:
            return None
        return self.disks + self.memory + self.downtime


def predict(
    load: Load, *, data: int, memory: int, speed: float, limit: float, latency: float = 0.0
) -> Prediction:
    """Say what is to be expected.

    :param data: bytes of the disks that are to be copied; `memory`: bytes of memory.
    :param speed: of the wire, bytes a second; 0: not known.
    :param limit: seconds that QEMU lets the guest stand for the last of its memory.
    :param latency: seconds that a message takes to the other side and back.
    """
    dirtied = load.memory or 0.0
    needed = load.written + (0.0 if _fits(memory, speed, limit) else dirtied)
    guest = (
        f"the guest writes {_rate(load.written)} to its disks and {_rate(dirtied)} to its memory"
    )
    if load.memory is None:
        guest = f"the guest writes {_rate(load.written)} to its disks; to its memory: not measured"
    if not speed:
        return Prediction(None, f"{guest}: it ends where the wire carries more than that", needed)
    if speed <= needed:
        return Prediction(
            False, f"{guest}, and the wire carries {_rate(speed)}: it does not end", needed
        )
    free = speed - load.written
    sent, left = _passes(float(memory), free, dirtied, limit)
    return Prediction(
        True,
        f"{guest}, and the wire carries {_rate(speed)}: it ends",
        needed,
        data / free,
        sent,
        left / free + HAND_OVER + _ROUND_TRIPS * latency,
    )


def until_fits(left: float, speed: float, dirtied: float, limit: float) -> float | None:
    """Return in how many seconds what is left can be sent while the guest stands; None if never.

    :param left: bytes; `speed`: at which they are sent, `dirtied`: at which they become more.
    :param limit: seconds that it may stand for them.
    """
    if left > speed * limit and dirtied >= speed:
        return None
    return _passes(left, speed, dirtied, limit)[0]


def _passes(left: float, speed: float, dirtied: float, limit: float) -> tuple[float, float]:
    """Return after how many seconds of passes the last one fits, and how large that is."""
    whole, sent = left, 0.0
    for _ in range(_PASSES):
        if left <= speed * limit:
            break
        took = left / speed
        sent += took
        left = min(whole, dirtied * took)
    return sent, left


def _fits(memory: int, speed: float, limit: float) -> bool:
    """Whether all of the memory can be sent while the guest stands."""
    return bool(speed) and memory <= speed * limit


def _rate(speed: float) -> str:
    return f"{human_size(round(speed))}/s"


@dataclass(frozen=True)
class Room:
    """What a disk needs of a file system of this host. All in bytes.

    :ivar device: the file system's number.
    :ivar needed: at the most.
    :ivar free: how much there is.
    """

    path: str
    device: int
    needed: int
    free: int


def lacking(rooms: Sequence[Room]) -> Iterator[str]:
    """Say of which file systems there is less free than disks need together."""
    for device in sorted({room.device for room in rooms}):
        here = [room for room in rooms if room.device == device]
        needed = sum(room.needed for room in here)
        if needed > here[0].free:
            yield (
                f"the file system of {printable(here[0].path)} has {here[0].free} bytes free, and "
                f"what is copied takes up to {needed} there"
            )
