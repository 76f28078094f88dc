"""The eight drawings of 2011 (fixtures/seed-*.yaml): in any format, as policies, compared."""

from dataclasses import replace
from pathlib import Path

import pytest

import qmpblock
from qmpblock.ranges import Ranges
from qmpblock.testing.scenario import load_scenarios

FIXTURES = Path(__file__).parents[1] / "fixtures"


def drawings():
    """Return pytest's parameters (scenario, format): raw where no backing image is drawn."""
    params = []
    for scenario in load_scenarios(FIXTURES, "seed-*.yaml"):
        formats = ["qcow2", "qed"] + ["raw"] * (len(scenario.drawing.before) == 1)
        params += [pytest.param(scenario, fmt, id=f"{scenario}-{fmt}") for fmt in formats]
    return params


def in_format(scenario, fmt, *, scale=1, options=()):
    """Return a drawing's scenario with every image in another format, and `scale` times larger.

    :param options: qemu-img's, of every image.
    """

    def renamed(name):
        return None if name is None else name.replace(".qcow2", f".{fmt}")

    drawing, [disk] = scenario.drawing, scenario.disks
    drawing = replace(
        drawing,
        block=drawing.block * scale,
        offset=drawing.offset * scale,
        length=drawing.length * scale,
    )
    images = tuple(
        replace(
            image,
            format=fmt,
            file=renamed(image.file),
            backing=renamed(image.backing),
            size=image.size * scale,
            options=tuple(options),
            content=drawing.content(row),
        )
        for image, row in zip(disk.images, drawing.before, strict=True)
    )
    return replace(scenario, disks=(replace(disk, images=images),), drawing=drawing)


def wanted_by(drawing):
    """Say a drawing in a policy's words."""
    wanted = {"allocation": "full" if drawing.full else "thin"}
    if drawing.independent:
        wanted["backing"] = "independent"
    if drawing.length < drawing.block * len(drawing.after[-1]):
        wanted["ranges"] = [{"offset": drawing.offset, "length": drawing.length}]
    return wanted


def check_cell(own, drawn, where, *, raw):
    """See that a layer holds in a range what is drawn: data, host space for zeros, or nothing."""
    for start, stop in where:
        part = own.clip(start, stop - start)
        if drawn == " ":
            blank = {"present": True, "zero": True, "data": False, "reserved": False}
            got = part.where(**blank) if raw else part.holes()
        else:
            got = part.where(data=True)
            if drawn == "0":
                got = got | part.where(present=True, reserved=True)
        left = Ranges([(start, stop)]) - got
        assert not left, f"drawn is {drawn!r}, but at {list(left)}: {list(part)}"


async def layers_of(vm):
    """Return the layers of the VM's only disk."""
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        return await disk.layers()


def check_drawing(layers, drawing, ignored=None):
    """See that the chain has the drawing's layers, and each cell what is drawn in it.

    :param ignored: what of the active layer the guest has written since.
    """
    assert len(layers) == len(drawing.after)
    raw = layers[0].layer.format == "raw"
    for row, layer in zip(reversed(drawing.after), layers, strict=True):
        for index, drawn in enumerate(row):
            cell = Ranges([(index * drawing.block, (index + 1) * drawing.block)])
            where = cell - ignored if ignored is not None and layer is layers[0] else cell
            check_cell(layer.map, drawn, where, raw=raw)


def seen_by_guest(rows):
    """Return the byte that the guest reads in each block."""
    top = (next((c for c in column if c != " "), "0") for column in zip(*rows[::-1], strict=True))
    return [0 if c == "0" else ord(c) for c in top]


async def check_content(vm, drawing):
    """See that the guest reads what is drawn."""
    for index, byte in enumerate(seen_by_guest(drawing.before)):
        await vm.qemu_io("d0", f"read -P {byte} {index * drawing.block} {drawing.block}")


def space(extents):
    """Return where a layer of a document has host space.

    What is reserved in a raw file, and then read, is data to the kernel: a picture may say either.
    """
    return Ranges(
        (one["start"], one["start"] + one["length"])
        for one in extents
        if one["data"] or one["reserved"]
    )
