"""That nothing was touched: what was asked of a QEMU, how it stands, what lies in a directory."""

import json
from pathlib import Path

#: What only asks.
READS = ("query-", "qom-get", "qom-list", "x-debug-query-", "qmp_capabilities")
#: What a map takes: an export for a moment, and its lock.
OF_A_MAP = {
    *("object-add", "getfd", "nbd-server-start", "block-export-add"),
    *("block-export-del", "closefd", "nbd-server-stop", "object-del"),
}


def every_file(directory):
    """Return all that is there, and when each was changed, but the folder of temporary files."""
    found = Path(directory).rglob("*")
    return {path: path.lstat().st_mtime_ns for path in found if path.name != "t"}


def changing(vm, *, since=""):
    """Return the commands that somebody gave this QEMU, but those that only ask.

    :param since: of those after this time (`now`).
    """
    lines = [line.split(" ", 3) for line in vm.qmp_log()]
    asked = [
        json.loads(text)
        for at, who, way, text in lines
        if way == ">" and who != "control" and at > since
    ]
    named = [one.get("execute") for one in asked]
    assert named  # else nobody was heard
    return {name for name in named if not name.startswith(READS)}


def now(vm):
    """Return the time of the last command, as a QEMU's log has it."""
    return list(vm.qmp_log())[-1].split(" ", 1)[0]


async def state_of(vm):
    """Return how a QEMU stands: nodes with their bitmaps, jobs, exports, objects."""
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    asked = [
        await vm.execute("query-jobs"),
        await vm.execute("query-block-exports"),
        sorted(one["name"] for one in await vm.execute("qom-list", path="/objects")),
        await vm.execute("query-status"),
    ]
    bitmaps = [(one["node-name"], one.get("dirty-bitmaps")) for one in nodes]
    return sorted(bitmaps, key=lambda one: one[0]), asked
