"""Reading what a VM is, by its monitor: nothing is changed, and no image is activated.

Queries and readings of properties alone, on whatever status: a destination that waits has its
images inactive, and an export of one, be it to look at it, would activate them (K21).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qmpblock.errors import CommandError, GraphError, UnsupportedError
from qmpblock.graph.model import BlockGraph, Device, Layer
from qmpblock.graph.openings import part_of
from qmpblock.graph.options import discard_of
from qmpblock.graph.places import Place
from qmpblock.graph.sharedfiles import files_of
from qmpblock.host.openfiles import OpenFiles
from qmpblock.host.processes import command_line
from qmpblock.migration.devicetree import GuestDevice, read_tree
from qmpblock.migration.machine import WITH_BITMAPS, Block, GuestDisk, LowerLayer, Machine
from qmpblock.migration.properties import CPU, MACHINE_OPTIONS, TOPOLOGY
from qmpblock.qemu.connection import Connection
from qmpblock.qemu.iothread import iothread_of
from qmpblock.qemu.monitor import Monitor
from qmpblock.qemu.ownership import Owner, situation
from qmpblock.qemu.refusals import no_command

__all__ = ["describe", "machine_types", "place_of", "read_blocks"]

_BLOCK = re.compile(r"\s*(\S.*?)\s+\d+ \w+\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s+0x([0-9a-f]+)(?:\s.*)?")
_Command = tuple[str, Mapping[str, object]]
_MACHINE = "/machine"
_WORDS = "feature-words"  # of a CPU: all that it can do
_LONGEST = 400  # characters of a line of it; a name has 255 at most


async def describe(vm: Connection, graph: BlockGraph | None = None) -> Machine:
    """Read what a VM is.

    :param graph: its block graph, where it has just been read.
    :raise GraphError: what QEMU says makes no sense.
    """
    (
        machine,
        memory,
        cpus,
        capabilities,
        migration,
        runs,
        told,
        tree,
        blocks,
        threads,
        nodes,
    ) = await vm.monitor.read(
        _property(_MACHINE, "type"),
        "query-memory-size-summary",
        "query-hotpluggable-cpus",
        "query-migrate-capabilities",
        "query-migrate",
        "query-status",
        "query-uuid",
        _hmp("info qtree"),
        _hmp("info ramblock"),
        "query-iothreads",
        ("query-named-block-nodes", {"flat": True}),
    )
    cpus = [one for one in cpus if "qom-path" in one]
    status = str(runs["status"])
    owned = situation(status, str(migration.get("status", "none")))
    devices = read_tree(str(tree))
    words = command_line(vm.monitor.peer_pid)
    graph = await vm.graph() if graph is None else graph
    options, features = await _values(vm, str(cpus[0]["qom-path"]) if cpus else None)
    return Machine(
        version=vm.monitor.version,
        type=str(machine).removesuffix("-machine"),
        options=options,
        uuid=str(told["UUID"]),
        memory=memory["base-memory"],
        plugged=memory.get("plugged-memory", 0),
        blocks=read_blocks(str(blocks)),
        cpu=_model(cpus[0]["type"]) if cpus else "",
        features=features,
        cpus=frozenset(_text(one["props"]) for one in cpus),
        devices=devices,
        disks=await _disks(vm, graph, devices, words, threads, nodes),
        capabilities={str(one["capability"]): one["state"] for one in capabilities},
        status=status,
        elsewhere="" if owned.owner is Owner.THIS else owned.why,
        listens="socket-address" in migration or migration.get("status", "none") != "none",
        blocked=tuple(map(str, migration.get("blocked-reasons", ()))),
        paused="-S" in words or "--S" in words if words else None,
    )


async def machine_types(monitor: Monitor) -> frozenset[str]:
    """Return the machines that a QEMU knows."""
    known = await monitor.execute("query-machines")
    types = {str(one["name"]) for one in known} | {str(one.get("alias", "")) for one in known}
    return frozenset(types - {""})


async def _values(vm: Connection, cpu: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """Return the options of the machine, and what the guest finds of a CPU: none where it is None.

    By one command, where there is one: those for each value have thirty times its bytes.
    """
    monitor, paths = vm.monitor, [_MACHINE, *([] if cpu is None else [cpu])]
    if vm.capabilities.lists_values:
        try:
            listed = await monitor.execute("qom-list-get", {"paths": paths})
        except CommandError as error:
            if not no_command(error):
                raise
        else:
            said = [
                {one["name"]: one["value"] for one in each["properties"] if "value" in one}
                for each in listed
            ]
            if len(said) != len(paths):
                raise GraphError("QEMU's answer makes no sense: what objects it has")
            return _options(said[0]), {} if cpu is None else _features(said[1])
    options = _options(await _machine(monitor))
    return options, {} if cpu is None else _features(await _cpu(monitor, cpu))


async def _machine(monitor: Monitor) -> dict[str, Any]:
    listed = await monitor.execute("qom-list", {"path": _MACHINE})
    names = sorted({str(one["name"]) for one in listed} & MACHINE_OPTIONS)
    values = await monitor.read(*(_property(_MACHINE, name) for name in names))
    return dict(zip(names, values, strict=True))


async def _cpu(monitor: Monitor, path: str) -> dict[str, Any]:
    names = (*sorted(CPU), _WORDS)
    values = await monitor.each(*(_property(path, one) for one in names))
    return {
        name: value
        for name, value in zip(names, values, strict=True)
        if not isinstance(value, CommandError)  # a CPU of another kind, or QEMU
    }


def _options(values: Mapping[str, Any]) -> dict[str, str]:
    options: dict[str, str] = {}
    for name in sorted(MACHINE_OPTIONS & values.keys()):
        value = values[name]
        if name == "smp" and isinstance(value, dict):
            options |= {f"smp.{key}": _text(value[key]) for key in TOPOLOGY if key in value}
        else:
            options[name] = _text(value)
    return options


def _property(path: str, name: str) -> _Command:
    return "qom-get", {"path": path, "property": name}


def _hmp(line: str) -> _Command:
    return "human-monitor-command", {"command-line": line}


def read_blocks(text: str) -> dict[str, Block]:
    """Read what `info ramblock` prints; blocks without a name are not sent."""
    lines = [line for line in text.splitlines()[1:] if len(line) <= _LONGEST]
    found = (_BLOCK.fullmatch(line) for line in lines)
    return {one[1]: Block(int(one[2], 16), int(one[3], 16)) for one in found if one}


def _features(values: Mapping[str, Any]) -> dict[str, str]:
    """Return what the guest finds of a CPU; where it is no x86, what its type says must do."""
    found = {name: _text(values[name]) for name in sorted(CPU) if name in values}
    try:
        for word in values.get(_WORDS, ()):
            leaf = f"{int(word['cpuid-input-eax']):#x}"
            if "cpuid-input-ecx" in word:
                leaf += f".{int(word['cpuid-input-ecx'])}"
            found[f"CPUID {leaf} {word['cpuid-register']}"] = f"{int(word['features']):#x}"
    except (KeyError, TypeError, ValueError):
        raise GraphError("QEMU's answer makes no sense: what a CPU can do") from None
    return found


def _model(kind: str) -> str:
    """Return the name that -cpu takes for a type: `qemu64` of `qemu64-x86_64-cpu`."""
    return re.sub(r"-[a-z0-9_]+-cpu$", "", kind)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)


def place_of(device: Device, tree: Sequence[GuestDevice]) -> str:
    """Return where the guest finds a disk's device; empty where that cannot be told."""
    named = {one.place: one.id for one in tree}
    holders = [one for one in tree if "drive" in one.properties]
    if device.id is not None:
        found = [one for one in holders if device.id == (one.id or named.get(_above(one.place)))]
    else:
        root = None if device.chain is None else device.chain.root.name
        found = [one for one in holders if one.properties["drive"] in (device.drive or root, root)]
        found = [one for one in found if one.properties["drive"]]
    if len(found) > 1:  # what is built of two devices has handed the disk to the inner one
        found = [one for one in found if one.properties["drive"]]
    return found[0].place if len(found) == 1 else ""


def _above(place: str) -> str:
    return place.rpartition("/")[0]


def _stored(nodes: Sequence[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """Return the dirty bitmaps that images have, by node; an inactive node has none yet."""
    found: dict[str, frozenset[str]] = {}
    for node in nodes:
        try:
            listed = node["image"]["format-specific"]["data"]["bitmaps"]
            found[node["node-name"]] = frozenset(str(one["name"]) for one in listed)
        except (KeyError, TypeError):
            continue  # of another format, or it has none
    return found


def _taken(nodes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many bytes of host space images take, by node."""
    found = {node["node-name"]: node["image"].get("actual-size") for node in nodes}
    return {name: size for name, size in found.items() if isinstance(size, int)}


async def _disks(
    vm: Connection,
    graph: BlockGraph,
    tree: Sequence[GuestDevice],
    words: Sequence[str],
    threads: list[dict[str, Any]],
    nodes: Sequence[Mapping[str, Any]],
) -> tuple[GuestDisk, ...]:
    files = OpenFiles(vm.monitor.peer_pid)
    stored, taken = _stored(nodes), _taken(nodes)
    found = []
    for device in graph.devices:
        place = place_of(device, tree)
        if device.chain is None:
            found.append(GuestDisk(place, device.name, None, device.qom_path))
            continue
        active = device.chain.active
        at = files.place(active.storage or active.node)
        discard = discard_of(words, active.node) if words else None
        found.append(
            GuestDisk(
                place,
                device.name,
                device.chain.root.size,
                device.qom_path,
                read_only=device.read_only or active.node.read_only,
                format=active.format,
                file=active.file,
                here=at.here if isinstance(at, Place) else "",
                identity=(at.file.device, at.file.inode) if isinstance(at, Place) else None,
                encrypted=active.node.encrypted,
                bitmaps=active.node.bitmaps,
                lower=tuple(
                    bitmap
                    for name in sorted(device.chain.node_names() - {active.node.name})
                    for bitmap in graph.nodes[name].bitmaps
                ),
                stored=stored.get(active.node.name, frozenset()),
                keeps_bitmaps=active.format in WITH_BITMAPS,
                snapshots=active.node.snapshots,
                holes=None if discard is None else discard == "unmap",
                iothread=await iothread_of(vm.monitor, device, threads),
                jobs=tuple(job.id for job in device.jobs),
                below=tuple(_lower(layer, files) for layer in device.chain.layers[1:]),
                taken=taken.get(active.node.name),
                zeroes=active.node.detect_zeroes,
                names_backing=active.node.backing_filename is not None,
            )
        )
    return tuple(found)


def _lower(layer: Layer, files: OpenFiles) -> LowerLayer:
    """Say what a lower layer is, and by which files; by none where one cannot be told."""
    places = [files.place(node) for node in files_of(layer)]
    found = [(one.file.device, one.file.inode) for one in places if isinstance(one, Place)]
    whole, part = len(found) == len(places), None
    try:
        within = part_of(layer)
        part = None if within is None else (within.offset, within.size)
    except UnsupportedError:
        whole = False
    known = tuple(found) if whole else None
    return LowerLayer(layer.file, layer.format, layer.size, known, part)
