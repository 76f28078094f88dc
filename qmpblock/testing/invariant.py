"""The invariant: what a VM consists of, before and after; nothing of ours may be left.

A state is lines of text in categories, so that a difference reads as a sentence:

    appeared: export: qmpblock-1a2b nbd of d0
    disappeared: edge: d0 -backing-> d0-1 may consistent-read, shares write

What is compared: run state, nodes (driver, file, recorded backing, options, write threshold),
edges with their permissions, the devices' attachments, jobs, exports, bitmaps, objects, how long
iothreads poll, settings of migrations, QEMU's open files and sockets, and files on the host. What
a guest or QEMU changes by itself is left out: dirty counts, sizes, event and timer descriptors,
which monitor has a client is only waited for (see `check`).

QEMU makes up names (`#block123`) for nodes that nobody named and counts on whenever it
opens one; so the number says when, not what, and is dropped. A leaked node is still seen:
lines are counted.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpblock.errors import CommandError
from qmpblock.names import OURS
from qmpblock.qemu.monitor import Monitor

if TYPE_CHECKING:
    from qmpblock.testing.qemu import QemuProcess

__all__ = ["Invariant", "VMState", "check", "difference", "listening_sockets", "snapshot"]

_SETTLE = 3.0  # seconds for QEMU to close what it was told to close
_IMPLICIT = re.compile(r"#block\d+")
_BITMAP_FLAGS = ("persistent", "recording", "busy", "inconsistent")
_UNIX_ACCEPTING = 0x10000  # __SO_ACCEPTCON in the flags of /proc/net/unix
_TCP_LISTEN = "0A"  # TCP_LISTEN in the state column of /proc/net/tcp


@dataclass(frozen=True, slots=True)
class VMState:
    """What a VM consists of: each line, in words, and how often it holds."""

    lines: Mapping[str, int]

    def __sub__(self, other: VMState) -> list[str]:
        """Return the lines that hold here more often than in `other`, sorted."""
        return sorted((Counter(self.lines) - Counter(other.lines)).elements())


def difference(before: VMState, after: VMState) -> list[str]:
    """Return what changed, one sentence a line; empty if nothing did."""
    return [
        *(f"disappeared: {line}" for line in before - after),
        *(f"appeared: {line}" for line in after - before),
    ]


async def snapshot(monitor: Monitor, pid: int, directories: Iterable[Path] = ()) -> VMState:
    """Take the state of a VM.

    :param monitor: one that nobody else uses meanwhile.
    :param pid: QEMU's process on this host.
    :param directories: folders whose listings belong to it (those of its images).
    :raise CommandError: QEMU refused a query.
    :raise DisconnectedError: QEMU has ended.
    """
    lines: Counter[str] = Counter()
    status = await monitor.execute("query-status")
    lines[f"VM: {status['status']}"] += 1
    for node in await monitor.execute("query-named-block-nodes", {"flat": True}):
        lines.update(_node_lines(node))
    lines.update(_edge_lines(await monitor.execute("x-debug-query-block-graph")))
    lines.update(_device_line(entry) for entry in await monitor.execute("query-block"))
    for job in await monitor.execute("query-jobs"):
        lines[f"job: {job['id']} {job['type']} {job['status']}"] += 1
    for export in await monitor.execute("query-block-exports"):
        closing = ", shutting down" if export["shutting-down"] else ""
        node = _implicit(export["node-name"])
        lines[f"export: {export['id']} {export['type']} of {node}{closing}"] += 1
    for one in await monitor.execute("query-migrate-capabilities"):
        lines[f"migration: {one['capability']} is {'on' if one['state'] else 'off'}"] += 1
    for name, value in (await monitor.execute("query-migrate-parameters")).items():
        lines[f"migration: {name} is {value}"] += 1
    for thread in await monitor.execute("query-iothreads"):
        lines[f"iothread: {thread['id']} polls for {thread['poll-max-ns']} ns"] += 1
    for child in await monitor.execute("qom-list", {"path": "/objects"}):
        if child["type"].startswith("child<"):
            lines[await _object_line(monitor, child["name"], child["type"][6:-1])] += 1
    lines.update(_descriptor_lines(pid))
    lines.update(_file_lines(directories))
    return VMState(dict(lines))


def _implicit(text: object) -> str:
    return _IMPLICIT.sub("#block", str(text))


def _node_lines(node: Mapping[str, Any]) -> list[str]:
    name = _implicit(node["node-name"])
    cache = node.get("cache", {})
    words = [
        f"node: {name} {node['drv']} on {_implicit(node.get('file', ''))}",
        "read-only" if node.get("ro") else "writable",
        f"detect-zeroes {node.get('detect_zeroes')}",
        f"cache {sorted(key for key, value in cache.items() if value)}",
    ]
    if node.get("write_threshold"):
        words.append(f"write threshold {node['write_threshold']}")
    recorded = node.get("image", {}).get("backing-filename")
    if recorded is not None:
        words.append(f"records backing {recorded}")
    lines = [", ".join(words)]
    for bitmap in node.get("dirty-bitmaps", ()):
        flags = [flag for flag in _BITMAP_FLAGS if bitmap.get(flag)]
        # A bitmap without a name belongs to a job.
        own = bitmap.get("name", "(of a job)")
        lines.append(f"bitmap: {own} of {name}, {' '.join(flags)}, {bitmap['granularity']} bytes")
    return lines


def _edge_lines(graph: Mapping[str, Any]) -> list[str]:
    names = {
        node["id"]: _implicit(node["name"]) if node["name"] else f"(a {node['type']})"
        for node in graph["nodes"]
    }
    return [
        f"edge: {names[edge['parent']]} -{edge['name']}-> {names[edge['child']]} "
        f"may {' '.join(sorted(edge['perm']))}, shares {' '.join(sorted(edge['shared-perm']))}"
        for edge in graph["edges"]
    ]


def _device_line(entry: Mapping[str, Any]) -> str:
    holds = entry.get("inserted", {}).get("node-name", "nothing")
    drive = f" ({entry['device']})" if entry.get("device") else ""
    return f"device: {entry.get('qdev', 'none')}{drive} holds {_implicit(holds)}"


async def _object_line(monitor: Monitor, name: str, kind: str) -> str:
    line = f"object: {name} {kind}"
    if kind == "throttle-group":
        try:
            limits = await monitor.execute(
                "qom-get", {"path": f"/objects/{name}", "property": "limits"}
            )
        except CommandError as error:
            return f"{line}, limits not told: {error.description}"
        set_ = {key: value for key, value in limits.items() if value}
        line += f", limits {set_}"
    return line


# -- what the host knows


def _descriptor_lines(pid: int) -> list[str]:
    """Return a line for each open file, socket and pipe; not for events, timers and the like."""
    lines = []
    sockets = _sockets()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
            if target.startswith("/sys/devices/system/cpu/"):
                continue  # the C library looks for a moment how many processors there are
            if target.startswith("/"):
                # Its access mode: a backing image must not stay writable.
                info = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text()
                flags = int(info.split("flags:")[1].split()[0], 8)
                mode = {os.O_RDONLY: "reading", os.O_WRONLY: "writing"}.get(
                    flags & os.O_ACCMODE, "reading and writing"
                )
                lines.append(f"open file: {target} for {mode}")
        except FileNotFoundError:  # closed since it was listed
            continue
        if target.startswith("socket:["):
            lines.append(f"socket: {sockets.get(target[8:-1], 'of another kind')}")
        elif target.startswith("pipe:["):
            lines.append("pipe: one end")
    return lines


def listening_sockets(pid: int) -> list[str]:
    """Return the addresses on which a process listens (`unix:PATH`, `tcp:PORT`), sorted.

    QEMU has no query that tells whether its NBD server runs (F7); this does.
    """
    prefix = "socket: listening on "
    return sorted(
        line.removeprefix(prefix) for line in _descriptor_lines(pid) if line.startswith(prefix)
    )


def _sockets() -> dict[str, str]:
    """Return what each socket of this network namespace is, by inode."""
    sockets = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        # Num RefCount Protocol Flags Type St Inode [Path]
        fields = line.split(maxsplit=7)
        path = fields[7] if len(fields) > 7 else ""
        if int(fields[3], 16) & _UNIX_ACCEPTING:
            sockets[fields[6]] = f"listening on unix:{path}"
        else:
            # An accepted socket bears the listener's path.
            sockets[fields[6]] = f"connected, unix:{path}"
    for table in ("tcp", "tcp6"):
        path_ = Path(f"/proc/net/{table}")
        if not path_.exists():
            continue  # a kernel without IPv6
        for line in path_.read_text().splitlines()[1:]:
            fields = line.split()
            port = int(fields[1].rpartition(":")[2], 16)
            listens = fields[3] == _TCP_LISTEN
            sockets[fields[9]] = f"listening on tcp:{port}" if listens else "connected, tcp"
    return sockets


def _file_lines(directories: Iterable[Path]) -> list[str]:
    lines = []
    for directory in sorted(set(directories)):
        lines += [f"file: {path}" for path in directory.rglob("*") if not stat.S_ISDIR(_mode(path))]
    for directory in {Path(tempfile.gettempdir()), Path("/run"), Path("/dev/shm")}:  # noqa: S108
        if directory.is_dir():
            lines += [f"file: {path}" for path in directory.glob(f"{OURS}*")]
    state = os.environ.get("QMPBLOCK_STATE")
    if state and Path(state).is_dir():
        # The key of the installation is made once, and stays.
        lines += [f"file: {path}" for path in Path(state).rglob("*") if path.name != "key"]
    return lines


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:  # removed since it was listed
        return stat.S_IFDIR


# -- for tests


async def check(
    before: VMState,
    monitor: Monitor,
    pid: int,
    directories: Iterable[Path] = (),
    *,
    expected: Iterable[str] = (),
) -> None:
    """Compare the VM with `before`, and wait up to 3 s for QEMU to close what it was told to.

    :param expected: regular expressions, each to be found in a line of the difference: the
        documented result. Each must match at least one line, and every line one of them.
    :raise AssertionError: something else changed, or something expected did not.
    """
    patterns = list(expected)
    directories = list(directories)
    deadline = asyncio.get_running_loop().time() + _SETTLE
    while True:
        changed = difference(before, await snapshot(monitor, pid, directories))
        wrong = [
            line for line in changed if not any(re.search(pattern, line) for pattern in patterns)
        ] + [
            f"expected, but did not happen: {pattern}"
            for pattern in patterns
            if not any(re.search(pattern, line) for line in changed)
        ]
        if not wrong:
            return
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError("the VM is not as it was:\n" + "\n".join(wrong))
        await asyncio.sleep(0.05)


class Invariant:
    """The invariant of one test: every VM that it starts must end as it began.

    The fixture `invariant` is one; `start_qemu` tells it of the VMs.
    """

    def __init__(self) -> None:
        self._before: dict[QemuProcess, VMState] = {}
        self._expected: list[str] = []

    def expect(self, *patterns: str) -> None:
        """Declare the documented result; patterns as in `check`, for every VM of the test."""
        self._expected += patterns

    def forget(self, vm: QemuProcess) -> None:
        """Do not check this VM: what the test does to it is beyond description."""
        self._before.pop(vm, None)

    async def begin(self, vm: QemuProcess) -> None:
        """Take the state that `vm` must return to; again to start from here."""
        self._before[vm] = await snapshot(vm.control, vm.pid, vm.image_directories())

    async def verify(self, vm: QemuProcess) -> None:
        """Check `vm`, if it is known and still runs.

        :raise AssertionError: it is not as it was.
        """
        before = self._before.pop(vm, None)
        if before is not None and vm.running:
            await check(before, vm.control, vm.pid, vm.image_directories(), expected=self._expected)
