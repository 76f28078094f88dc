"""Reading what a destination's command line is made of, by the source's monitor."""

from __future__ import annotations

from typing import Any

from qmpblock.errors import CommandError
from qmpblock.host.processes import command_line
from qmpblock.migration.describe import describe
from qmpblock.migration.launch import Origin, Property
from qmpblock.migration.options import program
from qmpblock.names import is_ours
from qmpblock.qemu.connection import Connection
from qmpblock.qemu.monitor import Monitor

__all__ = ["read_origin"]

#: What the monitor tells of objects; of others only what was given at the start is known.
_TOLD = {
    "iothread": ("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch"),
    "throttle-group": ("limits",),
}
_NOT_OURS_TO_GIVE = ("monitor-qmp", "monitor-hmp")


async def read_origin(source: Connection) -> Origin:
    """Read it; nothing is changed, and no key is read.

    :raise GraphError: what QEMU says makes no sense.
    """
    machine, monitor = await describe(source), source.monitor
    plugged = await _children(monitor, "/machine/peripheral")
    unnamed = await _children(monitor, "/machine/peripheral-anon")
    types = {one.type for one in machine.devices if one.id in plugged or "drive" in one.properties}
    defaults = {kind: await _properties(monitor, kind) for kind in {*types, *unnamed.values()}}
    objects, others = [], {}
    for name, kind in (await _children(monitor, "/objects")).items():
        if is_ours(name) or kind in _NOT_OURS_TO_GIVE:
            continue
        if kind in _TOLD:
            objects.append({"qom-type": kind, "id": name, **await _told(monitor, name, kind)})
        else:
            others[name] = kind
    iothreads = {name: await _iothreads(monitor, name) for name in plugged}
    words = command_line(monitor.peer_pid)
    return Origin(
        machine=machine,
        words=words if program(words)[1] else (),
        plugged=frozenset(plugged),
        unnamed=tuple(unnamed.values()),
        defaults=defaults,
        objects=tuple(objects),
        others=others,
        iothreads=iothreads,
        disks=(await source.graph()).disks(),
        kvm=bool((await monitor.execute("query-kvm")).get("enabled")),
        name=str((await monitor.execute("query-name")).get("name", "")),
        firmware=str(await _get(monitor, "/machine", "firmware") or ""),
    )


async def _children(monitor: Monitor, path: str) -> dict[str, str]:
    """Return the types of an object's children, by their names."""
    listed = await monitor.execute("qom-list", {"path": path})
    return {
        one["name"]: one["type"].removeprefix("child<").removesuffix(">")
        for one in listed
        if one["type"].startswith("child<")
    }


async def _properties(monitor: Monitor, kind: str) -> dict[str, Property]:
    try:
        listed = await monitor.execute("device-list-properties", {"typename": kind})
    except CommandError:
        return {}  # no device that could be added by a person
    return {
        str(one["name"]): Property(str(one["type"]), one.get("default-value")) for one in listed
    }


async def _iothreads(monitor: Monitor, name: str) -> dict[str, Any]:
    """Return the options that give a device its iothreads; none where it has none."""
    path = f"/machine/peripheral/{name}"
    if one := await _get(monitor, path, "iothread"):
        return {"iothread": str(one).rpartition("/")[2]}
    many = await _get(monitor, path, "iothread-vq-mapping")
    return {"iothread-vq-mapping": many} if many else {}


async def _told(monitor: Monitor, name: str, kind: str) -> dict[str, Any]:
    found = {key: await _get(monitor, f"/objects/{name}", key) for key in _TOLD[kind]}
    return {key: value for key, value in found.items() if value is not None}


async def _get(monitor: Monitor, path: str, name: str) -> Any:
    try:
        return await monitor.execute("qom-get", {"path": path, "property": name})
    except CommandError:
        return None  # this kind of object has no such property
