"""Settings: which capabilities and parameters a VM's migrations have, for one of them.

They are the VM's, and outlive a migration, so that what was set is put back as it was: by whoever
migrates, or by whoever recovers, who finds in the migration's record what it was
(`qmpblock.migration.record`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from qmpblock.errors import UNTOUCHED, UnsupportedError
from qmpblock.migration.record import Settings

if TYPE_CHECKING:
    from qmpblock.migration.means import MigrationMeans
    from qmpblock.qemu.capabilities import Capabilities
    from qmpblock.qemu.monitor import Monitor

__all__ = [
    "THERE",
    "Preset",
    "check_channels",
    "put_back",
    "wanted_at_destination",
    "wanted_at_source",
]

T = TypeVar("T")
THERE = "the destination's QEMU"
"""What a refusal calls the one that has the destination's settings."""
#: What QEMU 7.2, 11.1, or both, would not have multifd go with.
_NOT_BY_CHANNELS = ("background-snapshot", "compress", "mapped-ram", "xbzrle")

_ON = ("dirty-bitmaps", "events", "pause-before-switchover", "return-path")
#: What needs other connections than those that there are, or takes the way back.
_OFF = (
    "auto-converge",
    "background-snapshot",
    "mapped-ram",
    "multifd",
    "postcopy-ram",
    "rdma-pin-all",
    "x-colo",
    "zero-copy-send",
)


def wanted_at_source(
    means: MigrationMeans, speed: int, tls: Mapping[str, str] | None = None
) -> Settings:
    """Return what a source is told for a migration.

    :param speed: bytes a second of the memory; 0: as it is.
    :param tls: parameters of TLS; None: as they are.
    """
    asked = {"auto-converge": means.auto_converge, "multifd": bool(means.multifd)}
    on = [*_ON, *(name for name, wanted in asked.items() if wanted)]
    off = sorted({*_OFF, *(_NOT_BY_CHANNELS if means.multifd else ())})
    parameters: dict[str, int | str] = {**(tls or {}), **_of_channels(means)}
    if speed:
        parameters["max-bandwidth"] = speed
    if means.downtime_limit:
        parameters["downtime-limit"] = round(means.downtime_limit * 1e3)
    return Settings(
        tuple((name, True) for name in on) + tuple((name, False) for name in off if name not in on),
        tuple(parameters.items()),
    )


def check_channels(means: MigrationMeans, source: Capabilities) -> None:
    """Refuse several channels where the source could hang with them.

    :raise UnsupportedError: it could; nothing was touched.
    """
    if means.multifd and source.channels_hang:
        raise UnsupportedError(
            f"QEMU {source} can hang for ever, and its guest stand, where its memory goes through "
            "several channels and they end, as when the destination dies (K38)",
            standing=UNTOUCHED,
            remedy="leave --multifd out: QEMU 10.0 and newer can be given it",
        )


def wanted_at_destination(means: MigrationMeans) -> Settings:
    """Return what a destination is told, before it waits for the guest."""
    if not means.multifd:
        return Settings()
    return Settings(
        (*((name, False) for name in _NOT_BY_CHANNELS), ("multifd", True)),
        tuple(_of_channels(means).items()),
    )


def _of_channels(means: MigrationMeans) -> dict[str, int | str]:
    """Return the parameters in which both sides have to be the same."""
    if not means.multifd:
        return {}
    return {"multifd-channels": means.multifd, "multifd-compression": "none"}


class Preset:
    """What one VM is told for one migration. `of`, `apply`; `restore` at last.

    :ivar had: what it is told otherwise: what `restore` puts back.
    """

    def __init__(self, monitor: Monitor, wanted: Settings, had: Settings) -> None:
        self.had = had
        self._monitor = monitor
        self._wanted = wanted
        self._applied = False

    @classmethod
    async def of(cls, monitor: Monitor, wanted: Settings, who: str = "this QEMU") -> Preset:
        """Look what is to be changed; change nothing.

        :param who: what a refusal calls it.
        :raise UnsupportedError: this QEMU has not what is needed.
        """
        listed, values = await monitor.read(
            "query-migrate-capabilities", "query-migrate-parameters"
        )
        states = {str(one["capability"]): bool(one["state"]) for one in listed}
        missing = [name for name, state in wanted.capabilities if state and name not in states]
        missing += [name for name, _ in wanted.parameters if name not in values]
        if missing:
            raise UnsupportedError(
                f"{who} cannot migrate with {', '.join(missing)}", standing=UNTOUCHED
            )
        changed = Settings(
            _differing(states, wanted.capabilities), _differing(values, wanted.parameters)
        )
        had = Settings(
            tuple((name, states[name]) for name, _ in changed.capabilities),
            tuple((name, values[name]) for name, _ in changed.parameters),
        )
        return cls(monitor, changed, had)

    async def apply(self) -> None:
        """Set it.

        :raise CommandError: QEMU refused.
        """
        self._applied = True
        await _set(self._monitor, self._wanted)

    async def restore(self) -> None:
        """Put back what it was. Idempotent."""
        if self._applied:
            await put_back(self._monitor, self.had)
            self._applied = False


async def put_back(monitor: Monitor, had: Settings) -> None:
    """Have a VM's settings be what they were; of a migration that has ended. Idempotent."""
    await _set(monitor, had)


async def _set(monitor: Monitor, settings: Settings) -> None:
    """Set the parameters first: a capability may be refused for what they are."""
    if settings.parameters:
        await monitor.execute("migrate-set-parameters", dict(settings.parameters))
    if settings.capabilities:
        states = [{"capability": name, "state": state} for name, state in settings.capabilities]
        await monitor.execute("migrate-set-capabilities", {"capabilities": states})


def _differing(
    now: Mapping[str, object], wanted: Iterable[tuple[str, T]]
) -> tuple[tuple[str, T], ...]:
    """Return what is to be set: what a QEMU does not know is as it is by itself."""
    return tuple((name, one) for name, one in wanted if name in now and now[name] != one)
