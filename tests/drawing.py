"""Block graphs that are drawn rather than recorded, and records of changes to them.

A drawing can be changed afterwards, as QEMU's graph would be.
"""

from dataclasses import fields

from qmpblock.changes.operations import _KINDS
from qmpblock.changes.record import VMIdentity
from qmpblock.graph.builder import Replies, build

MIB = 1 << 20
RUN = "deadbeef"
VM = VMIdentity("vm", "0" * 36, 0, 0, "no-such-boot", "unix:/run/vm.qmp")


def record(operation="stream", pivot=False, **changes):
    """Return the record of a change to the disk vd0; what such a change does not have is none."""
    kind = _KINDS[operation, pivot]
    known = {one.name for one in fields(kind)}
    changes = {name: value for name, value in changes.items() if name in known or value}
    assert changes.keys() <= known, f"a {operation} has no {changes.keys() - known}"
    return kind(
        **{
            "run": RUN,
            "vm": VM,
            "devices": ("/machine/peripheral/vd0",),
            "names": ("vd0",),
            "locks": ("qmpblock-disk-vd0",),
            "images": ("/i/d0",),
        }
        | changes
    )


def bitmap(name, granularity=65536, *, recording=True, persistent=False, busy=False, bad=False):
    """Return QEMU's description of a dirty bitmap."""
    found = {
        "name": name,
        "granularity": granularity,
        "recording": recording and not bad,
        "persistent": persistent,
        "busy": busy,
        "count": 0,
    }
    return found | ({"inconsistent": True} if bad else {})


class Drawing:
    """Nodes, devices, jobs and exports."""

    def __init__(self):
        self.nodes = {}
        self.devices = {}
        self.jobs = {}
        self.exports = {}

    def image(
        self,
        name,
        fmt="qcow2",
        *,
        backing=None,
        size=64 * MIB,
        file=None,
        recorded=None,
        filename=None,
        encrypted=False,
        bitmaps=(),
        under=None,
    ):
        """Draw a format node `name` over its protocol node `name-f`.

        :param backing: the node that it lies on; what lies there is recorded by its full name.
        :param file: its path; `filename` is what QEMU calls the format node, where not that.
        :param under: a filter between the two.
        """
        file = f"/i/{name}" if file is None else file
        self._node(f"{name}-f", "file", size, file)
        edges = {"file": under or f"{name}-f"}
        if backing is not None:
            edges["backing"] = backing
            if recorded is None:
                recorded = self.nodes[backing]["file"]
        self._node(name, fmt, size, filename or file, edges)
        info = self.nodes[name]
        info["dirty-bitmaps"] = list(bitmaps)
        info["image"]["encrypted"] = encrypted
        if recorded is not None:
            info["image"]["backing-filename"] = recorded
        return self

    def filter(self, name, driver, below, edge="file"):
        """Draw a filter node over another node."""
        self._node(name, driver, 64 * MIB, f"/i/{name}", {edge: below})
        return self

    def device(self, root, name="vd0"):
        """Have a guest device use a node."""
        self.devices[name] = root
        return self

    def job(self, name, kind, status, *nodes, error=None):
        """Draw a job that works on these nodes."""
        self.jobs[name] = (kind, status, nodes, error)
        return self

    def export(self, name, node):
        """Draw an export of a node."""
        self.exports[name] = node
        return self

    def rebase(self, name, backing):
        """Have a node lie on another one, or on nothing."""
        edges = [one for one in self.nodes[name]["children"] if one["child"] != "backing"]
        if backing is not None:
            edges.append({"child": "backing", "node-name": backing})
        self.nodes[name]["children"] = edges

    def _node(self, name, driver, size, file, edges=()):
        self.nodes[name] = {
            "node-name": name,
            "drv": driver,
            "file": file,
            "ro": False,
            "image": {"virtual-size": size, "filename": file},
            "children": [{"child": edge, "node-name": edges[edge]} for edge in edges],
        }

    def graph(self):
        """Build the graph."""
        return build(self.replies())

    def replies(self):
        """Return what QEMU would say."""
        names = [*self.nodes, *self.jobs]
        debug = {
            "nodes": [
                {"id": n, "type": "block-job" if name in self.jobs else "block-driver"}
                | {"name": name}
                for n, name in enumerate(names)
            ],
            "edges": [
                {"parent": names.index(job), "child": names.index(node), "name": "main node"}
                for job, (_, _, nodes, _) in self.jobs.items()
                for node in nodes
                if node in self.nodes
            ],
        }
        return Replies(
            block=[
                {"device": "", "qdev": name, "removable": False, "inserted": {"node-name": root}}
                for name, root in self.devices.items()
            ],
            nodes=list(self.nodes.values()),
            stats=[],
            jobs=[
                {"id": name, "type": kind, "status": status} | ({"error": error} if error else {})
                for name, (kind, status, _, error) in self.jobs.items()
            ],
            exports=[{"id": name, "node-name": node} for name, node in self.exports.items()],
            debug_graph=debug,
        )


def chain(*names, size=64 * MIB, **last):
    """Draw a disk vd0 of qcow2 images, the active one first."""
    drawing = Drawing()
    below = None
    for name in reversed(names):
        drawing.image(name, backing=below, size=size, **(last if below is None else {}))
        below = name
    return drawing.device(names[0])
