"""Lender: a manager that lends its monitor, as what it can be asked to do to its VM's disks.

What it does itself it knows of: what the VM is started from the next time, and what its own
snapshots, backups and block jobs build on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

__all__ = ["Lender"]


class Lender(Protocol):
    """A manager's API for one of its running VMs, by the manager's own names of the disks.

    Cancelling leaves the outcome unknown. All of it raises LostError where the outcome is unknown,
    BusyError where the manager is at work on the VM, so that nothing was done, and Error, with the
    manager's words, where it refused.
    """

    async def targets(self) -> Mapping[str, str]:
        """Return the ids in QEMU of the VM's disks, by the manager's names of them."""

    async def files(self) -> tuple[Mapping[str, str], Mapping[str, str] | None]:
        """Return the image file of each disk: now, and at the next start.

        None: there will be none, the VM ends with its process.
        """

    async def layers(self, disk: str) -> Sequence[tuple[str, str]]:
        """Return the file of each layer of a disk, the active one first, and what names it.

        That is empty where the manager has no name for it.
        """

    async def pull(self, disk: str, base: str) -> None:
        """Begin to pull what lies below into a disk's active layer, and to drop it.

        Which one that is cannot be said.

        :param base: what names the layer that stays; empty: none does.
        """

    async def commit(self, disk: str, base: str, top: str, *, active: bool) -> None:
        """Begin to copy what some layers of a disk hold into the one below them, and to drop them.

        :param base: what names the layer that takes it; `top`: the uppermost that goes.
        :param active: whether that is the active one; then the job waits, once it has caught up,
            for `pivot`.
        :raise Error: somebody has put another layer on it meanwhile.
        """

    async def copy(self, disk: str, image: str, fmt: str, *, top: bool, speed: int) -> None:
        """Begin to copy a disk into an image that is there, and what its guest writes meanwhile.

        The job waits, once it has caught up, for `pivot`. Which layer is the active one cannot be
        said; from here on nobody puts another one on it.

        :param top: whether what its active layer holds is copied, and no more.
        :param speed: bytes a second; 0 is no limit.
        """

    async def pivot(self, disk: str) -> None:
        """Have the guest go on in what the manager's job has made equal; its end is to be awaited.

        :raise Error: the job is not `ready`.
        """

    async def ready(self, disk: str) -> bool:
        """Whether the manager's job on a disk waits for `pivot`."""

    async def limit(self, disk: str, speed: int) -> None:
        """Limit the manager's job on a disk to so many bytes a second; 0 is no limit."""

    async def job(self, disk: str) -> tuple[int, int] | None:
        """Return how far the manager's job on a disk is, and how far it is to go; None: no job."""

    async def abort(self, disk: str) -> None:
        """Have the manager give up its job on a disk, and wait until it has."""

    async def suspend(self) -> None:
        """Pause the VM."""

    async def resume(self) -> None:
        """Have a paused VM go on."""

    async def snapshot(self, overlays: Mapping[str, str]) -> None:
        """Have the guest go on in overlays that are there, on all these disks or on none."""
