"""Kill matrices of allocation: the operations, for `killing.Matrix`."""

from killing import CHAIN, IOTHREAD, MOMENTS, Operation


class Allocation(Operation):
    """One way of `Disk.allocate`; its guest writes to the very range."""

    @property
    def runs_a_job(self):
        return self.what.get("full") or self.what.get("independent")

    @property
    def moves(self):
        """Never: the overlay of a staged commit comes home."""
        return False


def _operations():
    allocate = {"do": "allocate", "disk": "vd0"}
    full, independent = {"full": True}, {"independent": True}
    whole = (("d0-3.qcow2", "d0-2.qcow2", "d0-1.qcow2", "d0-0.raw"),)
    alone = (("d0-3.qcow2",),)
    plain, iothread = CHAIN.format(attach=""), CHAIN.format(attach=IOTHREAD)
    yield Allocation("allocate", plain, allocate, whole)
    yield Allocation("allocate-iothread", iothread, allocate, whole)
    yield Allocation("full", plain, allocate | full, whole, scars=True)
    yield Allocation("full-iothread", iothread, allocate | full, whole, scars=True)
    yield Allocation("independent", plain, allocate | independent, alone)
    yield Allocation("full-independent", plain, allocate | full | independent, alone, scars=True)


ALLOCATIONS = tuple(_operations())

_DECISIVE = ("blockdev-", "block-commit", "block-stream", "job-", "transaction", "object-")


def decisive(matrix):
    """Yield the points (number, moment) at commands that change the disk, or who may."""
    for number, command in enumerate(matrix.reference.trace, 1):
        if command.startswith(_DECISIVE):
            for moment in MOMENTS:
                yield number, moment
