"""The destination of a migration: a QEMU like the source, with images of its own, that waits."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, Unpack

from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import Image, Scenario

if TYPE_CHECKING:
    from pathlib import Path

    from qmpblock.testing.plugin import StartQemu
    from qmpblock.testing.qemu import QemuOptions, QemuProcess
    from qmpblock.testing.scenario import Format

__all__ = ["StartDestination", "counterpart", "starting"]


class StartDestination(Protocol):
    """What the fixture `start_destination` is."""

    def __call__(
        self,
        source: QemuProcess,
        *,
        shared: bool = False,
        image: Format | None = None,
        **options: Unpack[QemuOptions],
    ) -> Awaitable[QemuProcess]:
        """Start the destination for a source; `options` are those of QemuProcess."""
        ...


def counterpart(source: QemuProcess, *, image: Format | None = None) -> Scenario:
    """Return a scenario of disks like a VM's, attached alike, each one empty image of its size.

    :param image: the format of the images; None: that of each active layer.
    """
    disks = []
    for disk in source.disks:
        active = disk.active.spec
        form = image or active.format
        # Of a raw one that ends within a sector QEMU shows whole sectors; others have only these.
        size = active.size if form == "raw" else -(-active.size // 512) * 512
        made = Image(
            file=f"{disk.spec.name}-destination",
            format=form,
            size=size,
            secret=active.secret,
            options=active.options if active.secret else (),
        )
        attach = replace(disk.spec.attach, discard="unmap")
        disks.append(replace(disk.spec, images=(made,), attach=attach, guest=()))
    return Scenario("destination", "A migration's destination.", tuple(disks))


def starting(start_qemu: StartQemu, directory: Path, qemu: str) -> StartDestination:
    """Return what the fixture gives.

    :param directory: for the images.
    """
    made: list[Path] = []

    async def start(
        source: QemuProcess,
        *,
        shared: bool = False,
        image: Format | None = None,
        **options: Unpack[QemuOptions],
    ) -> QemuProcess:
        disks = source.disks
        if not shared:
            made.append(directory / f"destination{len(made)}")
            program = options.get("qemu") or qemu
            built = await build(counterpart(source, image=image), made[-1], Tools.of(program))
            disks = built.disks
        options.setdefault("machine", source.machine)
        options.setdefault("guest", source.guest is not None)
        options.setdefault("incoming", "defer")
        options["extra"] = [*options.get("extra", ()), "-S"]
        return await start_qemu(disks, **options)

    return start
