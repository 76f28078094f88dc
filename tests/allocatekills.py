"""Kill matrices of allocation and of policies: the operations, for `killing.Matrix`."""

from dying import policy_of
from killing import CHAIN, IOTHREAD, MOMENTS, TWO, Operation

import qmpblock
from qmpblock.allocation.plan import below


class Allocation(Operation):
    """One way of `Disk.allocate`; its guest writes to the very range."""

    @property
    def runs_a_job(self):
        return self.what.get("full") or self.what.get("independent")

    @property
    def moves(self):
        """Never: the overlay of a staged commit comes home."""
        return False

    async def check_done(self, address, directory):
        """See that nothing is below, and, in full, that all of it is somewhere."""
        async with qmpblock.connect(address) as controller:
            seen = await (await controller.disk(self.what["disk"])).map()
        assert below(seen).total == 0
        if self.what.get("full"):
            assert seen.holes().total == 0


class Apply(Allocation):
    """A policy; several changes one after another, so a kill may leave some of them done."""

    @property
    def runs_a_job(self):
        return True

    async def check_done(self, address, directory):
        """See that nothing is left to do."""
        policy = policy_of(address, self.request(directory))
        for plan in await qmpblock.policy.plan(policy):
            assert plan.error is None
            assert plan.changes.steps == ()


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
    detects = CHAIN.format(attach="attach: {detect_zeroes: unmap, discard: unmap}\n")
    yield Allocation("full-detect-zeroes", detects, allocate | full, whole, scars=True)
    yield Allocation("independent", plain, allocate | independent, alone)
    yield Allocation("full-independent", plain, allocate | full | independent, alone, scars=True)
    every = {"backing": "independent", "allocation": "full"}
    yield Apply("apply-full", plain, _apply(vd0=every), alone, scars=True)
    part = {"backing": {"base": "{}/d0-1.qcow2"}, "allocation": "thin", "ranges": [_HALF]}
    short = (("d0-3.qcow2", "d0-1.qcow2", "d0-0.raw"),)
    yield Apply("apply-base", plain, _apply(vd0=part), short)
    yield Apply(
        "apply-two",
        TWO.format(),
        _apply(vd0={"backing": "independent"}, vd1={"allocation": "full"}),
        (("d0-1.qcow2",), ("d1-0.qcow2",)),
        scars=True,
    )


_HALF = {"length": "50%"}


def _apply(**disks):
    return {"do": "apply", "disks": [{"disk": name, **disk} for name, disk in disks.items()]}


ALLOCATIONS = tuple(_operations())

DECISIVE = (
    *("blockdev-", "block-commit", "block-stream", "job-", "transaction", "object-"),
    *("block-export-", "block-dirty-bitmap-", "human-monitor-command"),
)


def decisive(matrix):
    """Yield the points (number, moment) at commands that change the disk, or who may."""
    for number, command in enumerate(matrix.reference.trace, 1):
        if command.startswith(DECISIVE):
            for moment in MOMENTS:
                yield number, moment
