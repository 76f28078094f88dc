"""A monitor that answers as QEMU did, but for one hostile value; each command against it.

For tests/test_hostile_monitor.py, and in numbers in tests/soak. `check` sees that a command ends
as it should: its exit code is one of the contract's, it says one thing on stderr, prints nothing
that a terminal would obey, and stdout is JSON where that was asked for.
"""

import asyncio
import copy
import io
import json
import re
import sys
import threading
import time
from pathlib import Path

from drawing import RUN, record
from fake_objects import dead
from fake_qmp import GREETING, fake_qmp

from qmpblock.cli.app import run

RECORDINGS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "data" / "graph").glob("*.json"))
}
ASKED = {
    "query-block": "block",
    "query-named-block-nodes": "nodes",
    "query-blockstats": "stats",
    "query-jobs": "jobs",
    "query-block-exports": "exports",
    "x-debug-query-block-graph": "debug_graph",
}
POLICY = "vms: [{address: %s, disks: [{disk: vd0, backing: independent, allocation: full}]}]"
MARK = "@hostile@"
MISSING = "(no such key)"
JOB = f"qmpblock-{RUN}-stream"
LEFT = record(job=JOB, keeper="d0", top="d0", base="", nodes=(f"qmpblock-{RUN}-n",))
COMMANDS = (
    ("disks", "Q"),
    ("disks", "Q", "--json"),
    ("jobs", "Q"),
    ("jobs", "Q", "--json"),
    ("map", "Q", "vd0"),
    ("map", "Q", "vd0", "--layers", "--json"),
    ("recover", "Q", "--dry-run"),
    ("recover", "Q", "--dry-run", "--json"),
    ("recover", "Q", "--check"),
    ("recover", "Q"),
    ("recover", "Q", "--continue"),
    ("plan", "POLICY"),
    ("plan", "POLICY", "--json"),
    ("job", "Q", JOB, "pause"),
    ("job", "Q", JOB, "complete"),
    ("stream", "Q", "vd0"),
    ("commit", "Q", "vd0"),
    ("snapshot", "Q", "vd0=over.qcow2"),
    ("allocate", "Q", "vd0"),
    ("allocate", "Q", "vd0", "--full"),
    ("migrate", "Q", "--command-line"),
    ("migrate", "Q", "--command-line", "--json"),
)
# As they stand on the wire: some are no JSON that Python could write.
VALUES = (
    MISSING,
    "null",
    "true",
    "-1",
    "0",
    "18446744073709551615",
    "1e308",
    "0.5",
    '""',
    '"/"',
    '"."',
    r'"\u001b[31m\u202e\n\r\u2028\ufffe[bold]"',
    '"%s"' % ("x" * 5000),
    '"qmpblock-deadbeef-stream"',
    '"qmpblock-deadbeef-pivot"',
    '"/dev/fdset/99999999999999999999"',
    '"json:{"',
    '"json:' + "[" * 3000 + '"',
    r'"json:{\"driver\": 5, \"file\": []}"',
    '"nbd://192.0.2.1/x"',
    "[]",
    "{}",
    "[[]]",
    '[{"a": {}}]',
    '{"a": []}',
    # what ends the connection
    r'"\ud800"',
    r'"\u0000"',
    "1e999",
    "NaN",
    "9" * 10_000,
    "[" * 100_000 + "]" * 100_000,
)


def replies(version, moment):
    """Return what a QEMU says, by command, with things in it that bear our names."""
    recorded = RECORDINGS[version][moment]
    found = {command: copy.deepcopy(recorded[key]) for command, key in ASKED.items()}
    found |= {
        "query-status": {"status": "running", "running": True, "singlestep": False},
        "query-uuid": {"UUID": "0" * 36},
        "query-name": {"name": "vm"},
        "query-migrate": {},
        "query-chardev": [{"label": "a", "filename": "unix:/run/a", "frontend-open": True}],
        "query-iothreads": [{"id": "io0", "thread-id": 1 << 30, "poll-max-ns": 32768}],
        "query-fdsets": [{"fdset-id": 1, "fds": [{"fd": 5, "opaque": ""}]}],
        "query-block-jobs": [
            {"device": JOB, "type": "stream", "speed": 0, "len": 1}
            | {"io-status": "ok", "offset": 0, "ready": False}
        ],
        "qom-list": [
            {"name": "qmpblock-disk-vd0", "type": "child<secret>"},
            {"name": "qmpblock-nbd", "type": "child<secret>"},
        ],
        "lock": json.loads(dead(RUN).text()),
        "human-monitor-command": TREE,
        "query-machines": [{"name": "pc-i440fx-7.2", "alias": "pc", "cpu-max": 255}],
        "query-memory-size-summary": {"base-memory": 16 << 20, "plugged-memory": 0},
        "query-hotpluggable-cpus": [
            {"type": "qemu64-x86_64-cpu", "vcpus-count": 1, "props": {"socket-id": 0}}
            | {"qom-path": "/machine/unattached/device[0]"}
        ],
        "query-migrate-capabilities": [{"capability": "events", "state": False}],
        "query-kvm": {"enabled": False, "present": True},
        "device-list-properties": [{"name": "lun", "type": "uint32", "default-value": 7}],
    }
    found["lock"]["details"] = {"record": LEFT.as_json(), "exports": ["x"], "path": "/run/x"}
    found["lock"]["details"] |= {"ports": [5], "monitor": "/q", "custody": True}
    if moment == "quiet":
        return found | {"qom-list": []}
    found["query-jobs"].append(
        {"id": JOB, "type": "stream", "status": "running"}
        | {"current-progress": 5, "total-progress": 10}
    )
    return found


TREE = """\
bus: main-system-bus
  type System
  dev: i440FX-pcihost, id ""
    bus: pci.0
      type PCI
      dev: virtio-blk-pci, id "vd0"
        addr = 04.0
        bus: virtio-bus
          type virtio-pci-bus
          dev: virtio-blk-device, id ""
            drive = "d0"
"""
REFUSED = '"error": {"class": "GenericError", "desc": "%s"}'
MISSED = '"error": {"class": "DeviceNotFound", "desc": "not found"}'


def places(value, path=()):
    """Yield the way to every value inside one; of a list, to the first and the last."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list) and value:
        for n in sorted({0, len(value) - 1}):
            yield from places(value[n], (*path, n))


def altered(value, path, how):
    """Return it as JSON, with something else in one place."""

    def change(inner, path):
        if not path:
            return MARK
        changed = copy.copy(inner)
        if how == MISSING and len(path) == 1:
            del changed[path[0]]
        else:
            changed[path[0]] = change(inner[path[0]], path[1:])
        return changed

    return json.dumps(change(value, path)).replace(f'"{MARK}"', "null" if how == MISSING else how)


class Answers(dict):
    """Answers of one peer: those recorded, one of them altered; it has locks, and deletes them."""

    def __init__(self, said, lie, path, how):
        super().__init__(said)  # not empty: fake_qmp would take another one then
        self.said = {command: json.dumps(reply) for command, reply in said.items()}
        self.said[lie] = altered(said[lie], path, how)
        self.objects = {one["name"]: json.dumps(self.said["lock"]) for one in said["qom-list"]}
        self.fake = None

    def get(self, command, default=None):
        message = self.fake.seen[-1]
        arguments = message.get("arguments", {})
        name = arguments.get("id", str(arguments.get("path", "")).rpartition("/")[2])
        reply = '"return": {}'
        if command == "object-add":
            if name in self.objects:
                reply = REFUSED % "duplicate"
            else:
                self.objects[name] = json.dumps(arguments.get("data", ""))
        elif command == "qom-get" and arguments["property"] == "data":
            found = self.objects.get(name)
            reply = MISSED if found is None else f'"return": {found}'
        elif command == "qom-get" and arguments["property"] == "type":
            reply = '"return": "virtio-blk-device"'
        elif command == "qom-get":
            reply = REFUSED % "no such property"
        elif command == "object-del" or command.endswith(("-del", "closefd")):
            if self.objects.pop(name, None) is None:
                reply = REFUSED % "not found"
        elif command == "qom-list" and self.said[command] == json.dumps(self[command]):
            kinds = [{"name": one, "type": "child<secret>"} for one in self.objects]
            reply = f'"return": {json.dumps(kinds)}'
        elif command in self.said:
            reply = f'"return": {self.said[command]}'
        return f'{{{reply}, "id": {json.dumps(message.get("id"))}}}\n'.encode()


def served(path, version, answers, work):
    """Do `work` while a peer of that version listens at `path`, in a thread of its own."""
    greeting = copy.deepcopy(GREETING)
    major, minor, micro = RECORDINGS[version]["version"]
    greeting["QMP"]["version"]["qemu"] = {"major": major, "minor": minor, "micro": micro}
    ready, over = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve():
        async with fake_qmp(path, json.dumps(greeting).encode() + b"\n", answers) as fake:
            answers.fake = fake
            ready.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    try:
        return work()
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(30)
        assert not thread.is_alive()
        loop.close()


def case(chance):
    """Choose a lie: the version, the moment, the answer, the place in it, what is there."""
    version, moment = chance.choice(sorted(RECORDINGS)), chance.choice(["quiet", "jobs"])
    said = replies(version, moment)
    lie = chance.choice(sorted(said))
    path = chance.choice(list(places(said[lie])))
    missing = path and isinstance(path[-1], str)
    return version, moment, lie, path, chance.choice(VALUES if missing else VALUES[1:])


def check(command, lying, directory, monkeypatch):
    """Run one command against one lie, and see that it ends as it should."""
    version, moment, lie, path, value = lying
    socket = directory / "q"
    answers = Answers(replies(version, moment), lie, path, value)
    (directory / "p.yaml").write_text(POLICY % socket)
    places_ = {"Q": str(socket), "POLICY": str(directory / "p.yaml")}
    arguments = [places_.get(word, word) for word in command] + ["--stall", "0.3"]
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in "oe")
    begun = time.process_time()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = served(socket, version, answers, lambda: run(arguments))
    seconds = time.process_time() - begun
    out, err = (stream.buffer.getvalue().decode("utf-8") for stream in (out, err))
    said = f"{command} {lie} {path} {value[:40]}: {code}\n{out[:500]}\n{err}"
    assert code in (0, 1, 2, 3, 4), said
    assert "Traceback" not in err, said
    assert "should not" not in err, said  # the last resort of cli/app.py
    assert bool(err) or code in (0, 4) or "plan" in command, said
    assert len(re.findall(r"^qmpblock: ", err, re.MULTILINE)) <= 3, said
    assert all(c.isprintable() or c == "\n" for c in out + err), said
    if "--json" in command and code in (0, 4):
        json.loads(out)
    assert seconds < 20, said
    return said
