"""Lists of migrations: one YAML file says which guests are to go where, and how many at once.

Read as policies are: strictly, and before any VM is touched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.address import TCPAddress, UnixAddress, parse_monitor
from qmpblock.errors import RequestError, printable
from qmpblock.migration.diskterms import ALLOCATIONS, Allocation, DiskTerms, Layers
from qmpblock.migration.means import LONGEST_PAUSE, MOST_CHANNELS, MigrationMeans
from qmpblock.migration.over import parse_over
from qmpblock.policy.values import filled_in, number_in, seconds_in, speed_in
from qmpblock.yamltext import Mapping, read_mapping, read_text

if TYPE_CHECKING:
    from qmpblock.address import MonitorAddress

__all__ = ["ListedMigration", "MigrationList", "load_migrations", "parse_migrations"]


@dataclass(frozen=True)
class ListedMigration:
    """One guest that is to go over.

    :ivar source: the address of its monitor; `destination`: of the other VM's.
    :ivar speed: bytes a second; 0 is no limit. Of the list's own limit it has its share.
    :ivar place: file, line and column.
    :ivar means, over: as of `qmpblock.migrate`.
    """

    source: str
    destination: str
    memory_only: bool = False
    quit_source: bool = False
    speed: int = 0
    place: str = ""
    storage_daemon: bool = False
    means: MigrationMeans = field(default_factory=MigrationMeans)
    over: str | None = None
    layers: Layers = "all"
    same_backing: bool = False
    allocation: Allocation = "thin"

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{printable(self.source)} to {printable(self.destination)}"


@dataclass(frozen=True)
class MigrationList:
    """A list.

    :ivar migrations: in the order in which they begin.
    :ivar parallel: how many at once.
    """

    source: str
    migrations: tuple[ListedMigration, ...]
    parallel: int = 1


def load_migrations(path: Path | str) -> MigrationList:
    """Read a list from a file.

    :raise RequestError: it cannot be read, or what it says is wrong.
    """
    return parse_migrations(read_text(path), source=printable(path))


def parse_migrations(text: str, *, source: str = "<text>") -> MigrationList:
    """Read a list from YAML text.

    :param source: what errors call it.
    :raise RequestError: what it says is wrong, with its place.
    """
    top = read_mapping(text, source)
    parallel = number_in(top, "parallel", 1)
    if parallel < 1:
        top.refuse("parallel", "must be at least 1")
    whole = speed_in(top, 0)
    seen: set[MonitorAddress] = set()
    entries = top.mappings("vms")
    at_once = min(parallel, len(entries))
    ports = _Ports(apart=at_once > 1)
    migrations = tuple(_migration(one, whole // at_once, seen, ports) for one in entries)
    if 0 < whole < at_once:
        top.refuse("speed", f"is not a byte a second for each of {at_once} at once")
    top.finish()
    return MigrationList(source, migrations, parallel)


class _Ports:
    """The ports at which destinations are to listen.

    :param apart: whether each needs its own: several migrations may be under way at once.
    """

    def __init__(self, *, apart: bool) -> None:
        self._apart = apart
        self._taken: set[TCPAddress] = set()

    def take(self, entry: Mapping) -> str | None:
        """Return the way of one migration, if it has one of its own."""
        if "over" not in entry:
            return None
        text = filled_in(entry, "over")
        try:
            _, server = parse_over(text)
        except RequestError as error:
            entry.refuse("over", error.message)
        both = {server, TCPAddress(server.host, server.port + 1)}
        if self._apart and both & self._taken:
            entry.refuse("over", "has a port that another one has: two at once need their own")
        self._taken |= both
        return text


def _migration(
    entry: Mapping, share: int, seen: set[MonitorAddress], ports: _Ports
) -> ListedMigration:
    speed = speed_in(entry, 0)
    layers: Layers = "top" if entry.choice("layers", ("all", "top"), "all") == "top" else "all"
    said = entry.choice("allocation", ALLOCATIONS, "thin")
    [allocation] = [one for one in ALLOCATIONS if one == said]
    one = ListedMigration(
        source=_address(entry, "source", seen),
        destination=_address(entry, "destination", seen),
        memory_only=entry.flag("memory_only", False),
        quit_source=entry.flag("quit_source", False),
        storage_daemon=entry.flag("storage_daemon", False),
        speed=min(speed or share, share or speed),
        place=entry.place,
        means=_means(entry),
        over=ports.take(entry),
        layers=layers,
        same_backing=entry.flag("same_backing", False),
        allocation=allocation,
    )
    entry.finish()
    if one.memory_only and (one.storage_daemon or one.means.write_blocking_after):
        key = "storage_daemon" if one.storage_daemon else "write_blocking_after"
        entry.refuse(key, "does not go with memory_only: no disk is copied")
    if one.storage_daemon and one.over is not None:
        entry.refuse("over", "does not go with storage_daemon, which serves by no TCP")
    try:
        DiskTerms(not one.memory_only, layers, one.same_backing, allocation).check()
    except RequestError as error:
        key = "allocation" if allocation != "thin" else "layers"
        entry.refuse(key if key in entry else "same_backing", error.message)
    return one


def _means(entry: Mapping) -> MigrationMeans:
    limit = number_in(entry, "downtime_limit", 0)
    if "downtime_limit" in entry and limit < 1:
        entry.refuse("downtime_limit", "must be at least 1, in milliseconds")
    means = MigrationMeans(
        downtime_limit=limit / 1e3,
        auto_converge=entry.flag("auto_converge", False),
        write_blocking_after=seconds_in(entry, "write_blocking_after"),
        multifd=number_in(entry, "multifd", 0),
        pause_after=seconds_in(entry, "pause_after"),
        longest_pause=seconds_in(entry, "longest_pause") or LONGEST_PAUSE,
    )
    if "multifd" in entry and not 1 <= means.multifd <= MOST_CHANNELS:
        entry.refuse("multifd", f"must be 1 to {MOST_CHANNELS} channels")
    try:
        means.check()
    except RequestError as error:
        late = "longest_pause" in entry and not means.pause_after
        entry.refuse("longest_pause" if late else "downtime_limit", error.message)
    return means


def _address(entry: Mapping, key: str, seen: set[MonitorAddress]) -> str:
    text = filled_in(entry, key)
    try:
        parsed = parse_monitor(text)
    except RequestError as error:
        entry.refuse(key, error.message)
    if isinstance(parsed, UnixAddress):  # one socket has many names
        parsed = UnixAddress(os.path.realpath(parsed.path))
    if parsed in seen:
        entry.refuse(key, f"{printable(text)} stands here twice: a VM takes part once")
    seen.add(parsed)
    return text
