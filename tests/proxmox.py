"""VMs as Proxmox VE starts them, and its daemons, which share their monitors.

No Proxmox runs here: names, options and manners are those of its source (qemu-server 9.2). A
machine of 10.0 or newer has a throttle node over a format node and a file node whose names are
hashes, an iothread for each disk that wants one, and the monitor `VMID.qmp`.
"""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

VMID = "104"
DISK = "virtio0"
_LIMIT = 5.0  # seconds that Proxmox's client waits by default, for a connection or for an answer
_RETRY = 0.1


def arguments(directory, built=None, drive=DISK):
    """Return the options of a VM with one disk, or with none; its monitor is at `monitor`."""
    Path(monitor(directory)).parent.mkdir(exist_ok=True)
    options = [
        *("-name", "guest=web,debug-threads=on"),
        *("-chardev", f"socket,id=pve,path={monitor(directory)},server=on,wait=off"),
        *("-mon", "chardev=pve,mode=control"),
    ]
    if built is None:
        return options
    top = {
        "driver": "throttle",
        "node-name": f"drive-{drive}",
        "throttle-group": f"throttle-drive-{drive}",
        # A hash there, of 30 digits, which leave no room for the suffixes of the harness.
        "file": built.disks[0].active.describe(node="f0123", live=True),
    }
    return [
        *options,
        *("-object", f"throttle-group,id=throttle-drive-{drive}"),
        *("-object", f"iothread,id=iothread-{drive}"),
        *("-blockdev", json.dumps(top)),
        *("-device", f"virtio-blk-pci,drive=drive-{drive},id={drive},iothread=iothread-{drive}"),
    ]


def monitor(directory):
    """Return the path of the VM's monitor."""
    return f"{directory}/qemu-server/{VMID}.qmp"


async def started(start_qemu, vm_dir, qemu_binary, text, **options):
    """Start such a VM, of a scenario of one disk; return it, and what was built."""
    built = await build(parse_scenario(text, "pve"), vm_dir / "images", Tools.of(qemu_binary))
    vm = await start_qemu([], extra=arguments(vm_dir, built), **options)
    return vm, built


class Daemon:
    """A client with the manners of Proxmox's: it connects, asks and goes, again and again.

    :ivar asked: how often it was answered; `error`: how it was not.
    :ivar strays: what it read that was an answer to somebody else.
    """

    def __init__(self, path, apart=0.05):
        self._path = str(path)
        self._apart = apart
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.asked = 0
        self.strays = 0
        self.error = None

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self):
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self.ask()
            except Exception as error:
                error.add_note(f"after {time.monotonic() - began:.2f} s, {self.asked} times asked")
                self.error = error
                return
            self.asked += 1
            self._stop.wait(self._apart)

    def ask(self):
        """Have a few questions answered, by a connection of their own.

        :raise OSError: it took longer than Proxmox waits.
        """
        with contextlib.closing(_connected(self._path)) as sock, sock.makefile("rwb") as file:
            self._until("QMP", file)
            for number, command in enumerate(("qmp_capabilities", "query-status", "query-block")):
                said = {"execute": command, "id": f"{os.getpid()}:{number}"}
                file.write(json.dumps(said).encode())
                file.flush()
                while self._until("return", file).get("id") != said["id"]:
                    self.strays += 1

    def _until(self, key, file):
        while key not in (message := json.loads(file.readline())):
            self.strays += "event" not in message
        return message


def _connected(path):
    late = time.monotonic() + _LIMIT
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(0)
        try:
            sock.connect(path)
        except BlockingIOError:  # the queue is full
            sock.close()
            if time.monotonic() > late:
                raise
            time.sleep(_RETRY)
        else:
            sock.settimeout(_LIMIT)
            return sock


@contextlib.contextmanager
def daemons(directory):
    """Have two of them ask; leaving fails if one was not answered in time."""
    with Daemon(monitor(directory)) as first, Daemon(monitor(directory), 0.02) as second:
        yield first, second


@contextlib.contextmanager
def answered(both):
    """See that each of them is answered again and again in the body, and reads nothing of ours."""
    before = [(one.asked, one.strays) for one in both]
    yield
    for one, (asked, strays) in zip(both, before, strict=True):
        assert one.asked > asked + 2
        assert one.strays == strays
