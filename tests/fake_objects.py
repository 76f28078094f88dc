"""A fake QMP peer with objects, jobs and a block graph; for what finds locks and steers jobs.

Tested by those tests: each command that changes it is seen to have changed it.
"""

import json
from contextlib import asynccontextmanager

from fake_qmp import GREETING, fake_qmp

from qmpblock.qemu.lock import Holder
from qmpblock.vm import connect


class Objects(dict):
    """Answers of one peer, by command; keeps the `secret` objects that it is given."""

    def __init__(self, drawing):
        super().__init__(
            {
                "qmp_capabilities": {"return": {}},
                "query-uuid": {"return": {"UUID": "0" * 36}},
                "query-block-jobs": {"return": []},
                "query-status": {"return": {"status": "running", "running": True}},
                "query-chardev": {"return": []},
            }
        )
        self.drawing = drawing
        self.objects = {}
        self.fake = None
        self.verbs = []
        self.pivot_to = ""  # where a commit that is finalized takes the guest

    def hold(self, name, holder):
        """Put a lock there, as its controller would have."""
        self.objects[name] = holder.text()

    def get(self, command, default=None):
        """Answer a command, whose arguments are those of the last message."""
        arguments = self.fake.seen[-1].get("arguments", {})
        done = {"return": {}}
        name = arguments.get("id", str(arguments.get("path", "")).rpartition("/")[2])
        if command == "object-add":
            if name in self.objects:
                return _error("GenericError", f"attempt to add duplicate property '{name}'")
            self.objects[name] = arguments["data"]
            return done
        if command == "object-del":
            return done if self.objects.pop(name, None) else _error("GenericError", "not found")
        if command == "qom-list":
            return {"return": [{"name": one, "type": "child<secret>"} for one in self.objects]}
        if command == "qom-get":
            if name not in self.objects:
                return _error("DeviceNotFound", f"Device '{name}' not found")
            return {"return": self.objects[name]}
        if command == "qom-set":
            self.objects[name] = arguments["value"]
            return done
        if command.startswith(("job-", "block-job-")):
            self.verbs.append((command, arguments))
            self._steer(command, name)
            return done
        if command == "block-export-del":
            if self.drawing.exports.pop(name, None) is None:
                return _error("GenericError", f"Export '{name}' is not found")
            self.fake.event("BLOCK_EXPORT_DELETED", id=name)
            return done
        if command == "blockdev-del" and arguments["node-name"] in self.drawing.nodes:
            if arguments["node-name"] in self.drawing.exports.values():
                return _error("GenericError", f"Node {arguments['node-name']} is in use")
            del self.drawing.nodes[arguments["node-name"]]
            return done
        asked = {
            "query-block": "block",
            "query-named-block-nodes": "nodes",
            "query-blockstats": "stats",
            "query-jobs": "jobs",
            "query-block-exports": "exports",
            "x-debug-query-block-graph": "debug_graph",
        }
        if command in asked:
            return {"return": getattr(self.drawing.replies(), asked[command])}
        return super().get(command, default)

    def _steer(self, command, name):
        jobs = self.drawing.jobs
        kind, _, nodes, _ = jobs.get(name, ("", "", (), None))
        if command == "job-cancel":
            jobs[name] = (kind, "concluded", nodes, "Operation canceled")
        elif command == "job-complete":
            jobs[name] = (kind, "pending", nodes, None)
        elif command == "job-finalize":
            jobs[name] = (kind, "concluded", nodes, None)
            if self.pivot_to:
                self.drawing.device(self.pivot_to)
        elif command == "job-dismiss":
            jobs.pop(name)


def _error(kind, words):
    return {"error": {"class": kind, "desc": words}}


def dead(run, **details):
    """Return a holder of this boot whose process is gone: no pid is that large."""
    me = Holder.me(run, **details)
    return Holder(me.run, me.host, 1 << 30, 1, me.boot, me.pids, me.details)


@asynccontextmanager
async def fake_vm(path, drawing, *, major=11, **answers):
    """Yield a VM that is connected to such a peer, and the peer's Objects."""
    greeting = json.loads(json.dumps(GREETING))
    greeting["QMP"]["version"]["qemu"]["major"] = major
    objects = Objects(drawing)
    objects.update(answers)
    async with fake_qmp(path, json.dumps(greeting).encode() + b"\n", objects) as fake:
        objects.fake = fake
        async with connect(str(path)) as vm:
            yield vm, objects
