"""Kill matrices of copies: the operations, for `killing.Matrix`."""

import os
from pathlib import Path

from killing import CHAIN, IOTHREAD, TWO, Operation


class Copying(Operation):
    """One way of `VM.copy`. Its copies of an end lie beside the images' directory."""

    @property
    def moves(self):
        """Whether the guest goes over."""
        return self.what["at"] == "pivot"

    @property
    def keeps(self):
        return self.moves  # the others' targets lie elsewhere

    @property
    def leaves_nodes(self):
        return self.moves

    async def check_done(self, address, directory):
        """See that what bears a target's name is whole, and that nothing is left unfinished."""
        for target in self.request(directory)["targets"].values():
            assert Path(target).stat().st_size > 0
            assert not os.path.lexists(f"{target}.partial")

    def check_said(self, directory, standing):
        """See that copies that are whole are said to be: the guest goes on from none of them."""
        targets = map(Path, self.request(directory)["targets"].values())
        if not self.moves and all(target.exists() for target in targets):
            assert "whole, and on stable storage" in standing, standing


class Resuming(Copying):
    """A copy that goes on from one that lacks a part, and has another part otherwise."""

    async def prepare(self, tools, directory):
        for target in self.request(directory)["targets"].values():
            image = directory / "d0-3.qcow2"
            partial = f"{target}.partial"
            convert = ("convert", "-f", "qcow2", "-O", "qcow2", str(image), partial)
            await tools.run(tools.img, *convert)
            change = ("-c", "write -P 0xee 1M 300K", "-c", "write -z 3M 100K")
            await tools.run(tools.io, "-f", "qcow2", *change, partial)

    def check_left(self, directory):
        """See that nothing of what was there is lost: a part of a copy stays, or is whole."""
        for target in self.request(directory)["targets"].values():
            assert os.path.lexists(target) or os.path.lexists(f"{target}.partial"), target


def _operations():
    plain, iothread = CHAIN.format(attach=""), CHAIN.format(attach=IOTHREAD)
    chain = ("d0-3.qcow2", "d0-2.qcow2", "d0-1.qcow2", "d0-0.raw")
    end = {"do": "copy", "at": "end", "force": True}
    one, two = {"vd0": "{}/../c0.qcow2"}, {"vd0": "{}/../c0.qcow2", "vd1": "{}/../c1.raw"}
    yield Copying("copy-end", plain, end | {"targets": one}, (chain,))
    yield Copying("copy-end-iothread", iothread, end | {"targets": one}, (chain,))
    yield Copying(
        "copy-end-of-two",
        TWO.format(),
        end | {"targets": two},
        (("d0-1.qcow2", "d0-0.raw"), ("d1-0.qcow2",)),
    )
    over = {"do": "copy", "at": "pivot", "format": "qcow2"}
    there = {"vd0": "{}/c0.qcow2", "vd1": "{}/c1.qcow2"}
    only = {"vd0": there["vd0"]}
    yield Resuming("copy-end-resumed", plain, end | {"resume": True, "targets": one}, (chain,))
    again = over | {"resume": True, "targets": only}
    yield Resuming("copy-pivot-resumed", plain, again, (("c0.qcow2",),), scars=True)
    yield Resuming("copy-pivot-resumed-iothread", iothread, again, (("c0.qcow2",),), scars=True)
    yield Copying("copy-pivot", plain, over | {"targets": only}, (("c0.qcow2",),), scars=True)
    yield Copying(
        "copy-pivot-iothread", iothread, over | {"targets": only}, (("c0.qcow2",),), scars=True
    )
    yield Copying(
        "copy-pivot-of-two",
        TWO.format(),
        over | {"targets": there},
        (("c0.qcow2",), ("c1.qcow2",)),
        scars=True,
    )
    queued = ("-global", "virtio-blk-pci.ioeventfd=off")
    yield Copying(
        "copy-pivot-queued",
        plain,
        {"do": "copy", "at": "pivot", "format": "raw", "targets": {"vd0": "{}/c0.raw"}},
        (("c0.raw",),),
        scars=True,
        extra=queued,
    )


def _starts():
    start = {"do": "copy", "at": "start", "force": True}
    one, two = {"vd0": "{}/../c0.qcow2"}, {"vd0": "{}/../c0.qcow2", "vd1": "{}/../c1.raw"}
    chain = ("d0-3.qcow2", "d0-2.qcow2", "d0-1.qcow2", "d0-0.raw")
    plain = CHAIN.format(attach="")
    yield Copying("copy-start", plain, start | {"targets": one}, (chain,))
    verified = start | {"verify": True}
    yield Copying("copy-start-verified", plain, verified | {"targets": one}, (chain,))
    iothread = CHAIN.format(attach=IOTHREAD)
    yield Copying("copy-start-iothread", iothread, start | {"targets": one}, (chain,))
    again = start | {"resume": True, "targets": one}
    yield Resuming("copy-start-resumed", plain, again, (chain,))
    yield Resuming("copy-start-resumed-iothread", iothread, again, (chain,))
    yield Copying(
        "copy-start-of-two",
        TWO.format(),
        start | {"targets": two},
        (("d0-1.qcow2", "d0-0.raw"), ("d1-0.qcow2",)),
    )


COPIES = (*_operations(), *_starts())
#: Of frozen layers on every QEMU; wants a file system on which files can share blocks.
SHARED = Copying(
    "shared",
    CHAIN.format(attach=""),
    {
        "do": "copy",
        "at": "start",
        "force": True,
        "reflink": True,
        "targets": {"vd0": "{}/../c0.qcow2"},
    },
    (("d0-3.qcow2", "d0-2.qcow2", "d0-1.qcow2", "d0-0.raw"),),
)
