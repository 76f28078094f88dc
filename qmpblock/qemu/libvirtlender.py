"""What libvirt does to the disks of a domain whose monitor it lends: a `Lender` by its API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from qmpblock.errors import Error, printable, shell_words
from qmpblock.host.libvirtd import (
    Domain,
    FailedError,
    GoneError,
    NotRunningError,
)
from qmpblock.host.libvirtxml import disk_chain, disk_files, disk_targets, is_ready
from qmpblock.qemu.transport import LostError

if TYPE_CHECKING:
    from qmpblock.qemu.libvirtmonitor import LibvirtMonitor

__all__ = ["LibvirtLender"]

_T = TypeVar("_T")


class LibvirtLender:
    """A `Lender`: libvirt's API, by the connection that its monitor has."""

    def __init__(self, monitor: LibvirtMonitor) -> None:
        self._monitor = monitor

    async def targets(self) -> Mapping[str, str]:
        """Return the ids in QEMU of the domain's disks; see `Lender`."""
        return disk_targets(await self._see("describe the domain", Domain.xml))

    async def files(self) -> tuple[Mapping[str, str], Mapping[str, str] | None]:
        """Return what libvirt takes for each disk's image; see `Lender`."""
        now = disk_files(await self._see("describe the domain", Domain.xml))
        later = await self._see("describe the domain", Domain.remembered)
        return now, None if later is None else disk_files(later)

    async def layers(self, disk: str) -> Sequence[tuple[str, str]]:
        """Return the layers of a disk as libvirt has them; see `Lender`."""
        found = disk_chain(await self._see("describe the domain", Domain.xml), disk)
        return [(file, f"{disk}[{index}]" if index else "") for file, index in found]

    async def pull(self, disk: str, base: str) -> None:
        """Begin to pull; see `Lender`."""
        await self._ask("pull its backing images", lambda domain: domain.pull(disk, base))

    async def commit(self, disk: str, base: str, top: str, *, active: bool) -> None:
        """Begin to commit; see `Lender`."""
        await self._ask(
            "commit its layers", lambda domain: domain.commit(disk, base, top, active=active)
        )

    async def copy(self, disk: str, image: str, fmt: str, *, top: bool, speed: int) -> None:
        """Begin to copy; see `Lender`."""
        await self._ask(
            "copy a disk", lambda domain: domain.copy(disk, image, fmt, top=top, speed=speed)
        )

    async def pivot(self, disk: str) -> None:
        """Have libvirt's job pivot; see `Lender`."""
        # Asked again, it is done once: what has pivoted has no job any more.
        await self._ask("pivot", lambda domain: domain.pivot(disk), again=True)

    async def ready(self, disk: str) -> bool:
        """Tell by what libvirt says of the job; see `Lender`."""
        return is_ready(await self._see("describe the domain", Domain.xml), disk)

    async def limit(self, disk: str, speed: int) -> None:
        """Limit libvirt's job; see `Lender`."""
        await self._ask("limit its job", lambda domain: domain.limit(disk, speed))

    async def job(self, disk: str) -> tuple[int, int] | None:
        """Return how far libvirt's job is; see `Lender`."""
        return await self._see("tell of its job", lambda domain: domain.job(disk))

    async def abort(self, disk: str) -> None:
        """Give libvirt's job up; see `Lender`."""
        await self._ask("give its job up", lambda domain: domain.abort(disk))

    async def suspend(self) -> None:
        """Pause the domain; see `Lender`."""
        # Asked again, it is done once: so is `resume`.
        await self._ask("pause the domain", Domain.suspend, again=True)

    async def resume(self) -> None:
        """Have it go on; see `Lender`."""
        await self._ask("have the domain go on", Domain.resume, again=True)

    async def snapshot(self, overlays: Mapping[str, str]) -> None:
        """Have the guest go on in overlays; see `Lender`."""
        await self._ask("take the snapshot", lambda domain: domain.snapshot(overlays))

    async def _see(self, what: str, ask: Callable[[Domain], Awaitable[_T]]) -> _T:
        """Ask what changes nothing: again, where the daemon went away over it and comes back."""
        return await self._ask(what, ask, again=True)

    async def _ask(
        self, what: str, ask: Callable[[Domain], Awaitable[_T]], *, again: bool = False
    ) -> _T:
        """Have a function of libvirt's done, its failures in our words.

        :param what: it was to do.
        :param again: whether it is to be done again by the daemon's next process.
        """
        domain = await self._monitor.there()
        try:
            return await ask(domain)
        except GoneError as error:
            if not again:
                raise self._monitor.lost(error) from None
            self._monitor.come_back(domain)
            return await self._ask(what, ask, again=True)
        except FailedError as error:
            if ended := await self._monitor.ended_by(error):
                raise ended from None
            raise Error(
                f"libvirt did not {what}: {error}",
                remedy=f"see what it is at work on: virsh domjobinfo {shell_words([domain.name])}; "
                f"virsh blockjob {shell_words([domain.name])} DISK",
            ) from None
        except NotRunningError as error:
            raise self._monitor.lost(error) from None
        except ValueError as error:
            raise LostError(f"it described the domain by no XML: {printable(error)}") from None
