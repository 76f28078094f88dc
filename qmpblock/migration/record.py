"""What a migration says of itself, for whoever recovers it: in its locks, and in its journal. Pure.

It is the same at both sides, so that either one tells of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qmpblock.changes.record import VMIdentity
from qmpblock.errors import printable
from qmpblock.migration.states import Side
from qmpblock.names import is_run
from qmpblock.versioned import UnreadableError, plain, read

__all__ = ["MigrationRecord", "Settings", "read_record"]


@dataclass(frozen=True)
class Settings:
    """Capabilities and parameters that a VM's migrations have, each with its value."""

    capabilities: tuple[tuple[str, bool], ...] = ()
    parameters: tuple[tuple[str, int | str], ...] = ()


@dataclass(frozen=True)
class MigrationRecord:
    """Which guest goes from where to where.

    :ivar run: in the names of all that it makes.
    :ivar pids: the namespace in which the processes' ids count.
    :ivar source_had: what of the source's migration settings is changed, as it was before;
        `destination_had`: of the destination's.
    :ivar more: what another version wrote that this one does not know.
    """

    run: str
    source: VMIdentity
    destination: VMIdentity
    pids: str
    source_had: Settings = Settings()
    destination_had: Settings = Settings()
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def of(self, side: Side) -> VMIdentity:
        """Return the process of one side."""
        return self.source if side is Side.SOURCE else self.destination

    def as_json(self) -> dict[str, Any]:
        """Return what `read_record` reads."""
        return plain(self)

    def describe(self) -> str:
        """Say what it is, for people."""
        who = f"of {printable(self.source.name)} " if self.source.name else ""
        return (
            f"migration {who}from {printable(self.source.monitor)} to "
            f"{printable(self.destination.monitor)} (run {self.run})"
        )


def read_record(data: Any) -> MigrationRecord:
    """Read what `MigrationRecord.as_json` wrote, of whatever version.

    :raise UnreadableError: it is none, or another version's.
    """
    record = read(MigrationRecord, data)
    if not is_run(record.run):
        raise UnreadableError("its run is none")
    return record
