"""Managers: programs that own the chains of their VMs, and start them from what they remember.

After a snapshot behind its back a manager knows nothing of the overlay: at the next start the
guest is back on the old image, and every write since is gone from its view (measured with
libvirt 9.0: domblklist, dumpxml and domstats unchanged). The same holds for whatever else leaves
the VM with another active image or another recorded chain, and for windows in which the newest
data is in an overlay of ours: a save, a backup or a restart in them does not know of it.

A manager is known by what it names inside QEMU, so over whatever socket we came. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from qmpblock.address import IncusAddress
from qmpblock.errors import printable, shell_words
from qmpblock.graph.model import Device

__all__ = ["Manager", "Traits", "Verb", "Work", "disks_called", "recognise", "refused"]

Verb = Literal[
    "snapshot",
    "pivot",
    "commit",
    "stream",
    "independent",
    "reserve",
    "point",
    "copy",
    "freeze",
    "backup",
    "move",
    "migrate",
]

_EFFECTS: Mapping[str, str] = {
    "snapshot": "the VM goes on in an overlay: started again, it would be from the old image",
    "pivot": "the VM goes on in another image: started again, it would be from a stale one",
    "commit": "images leave the chain that it has recorded",
    "stream": "images leave the chain that it has recorded",
    "independent": "images leave the chain that it has recorded",
    "reserve": "the newest data is in an overlay for a while: a start, a save or a backup in "
    "that time would not see it",
    "point": "the guest's writes go through a filter of ours for a while, which it would meet when "
    "it changes the chain",
    "copy": "a job that it does not know is on the disk for a while: what it begins in that time "
    "(a snapshot, a pull, a backup) may fail, or have QEMU abort",
    "freeze": "the newest data is in an overlay for a while: a start, a save or a backup in that "
    "time would not see it",
    "backup": "a job that it does not know is on the disk for a while, when what it begins itself "
    "may fail, or have QEMU abort; nor that dirty bitmaps stay in the image",
    "move": "the VM goes on in another image: started again, it would be from a stale one",
    "migrate": "the VM goes on in another QEMU: started again, there would be two",
}

#: What people call each, who ask for it by a command.
_CALLED: Mapping[Verb, str] = {
    "snapshot": "snapshot",
    "pivot": "commit of the active layer",
    "commit": "commit",
    "stream": "stream",
    "independent": "allocate --independent",
    "reserve": "allocate --full of qcow2 and QED",
    "point": "a point in time",
    "copy": "copy",
    "freeze": "copy of frozen layers",
    "backup": "backup",
    "move": "copy --pivot",
    "migrate": "migrate",
}


@dataclass(frozen=True)
class Work:
    """What is to be done to a chain that somebody may own.

    :ivar verb: `pivot` is a commit of the active layer, `reserve` a staged commit (allocate
        --full of qcow2 and QED), `freeze` a copy of frozen layers.
    :ivar file: of the active layer; `top` and `base`: of the layers that were named.
    """

    verb: Verb
    file: str
    top: str = ""
    base: str = ""

    @property
    def effect(self) -> str:
        """What the manager is not told of, as the end of a sentence."""
        return _EFFECTS[self.verb]

    @property
    def called(self) -> str:
        """What people call it."""
        return _CALLED[self.verb]


@dataclass(frozen=True)
class Traits:
    """What a VM shows of whoever started it.

    :ivar nodes: node names and their drivers.
    :ivar devices: every name of the guest's disks: qdev ids, drive ids, QOM paths.
    :ivar chardevs: labels and QEMU's descriptions (`unix:/run/x.qmp,server=on`) of them.
    :ivar name: of query-name.
    :ivar arguments: of the process, where they can be seen.
    """

    nodes: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    chardevs: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manager:
    """A manager that owns a VM's chain.

    :ivar vm: what it calls the VM; empty where that cannot be told.
    :ivar told_by: by what it was recognised.
    """

    name: str
    vm: str
    told_by: str

    def way(self, work: Work) -> str:
        """Say how it does that by itself."""
        return _WAYS[self.name](self.vm, work)

    def holds(self, chardev: str, description: str) -> bool:
        """Whether a monitor is its own: whoever else takes that keeps it out.

        :param chardev: the label of its character device; `description`: QEMU's words for that.
        """
        return _HOLDS[self.name](chardev, description)

    @property
    def shares(self) -> bool:
        """Whether its own monitor can be had by turns: it comes to that, and goes."""
        return self.name == "Proxmox VE"

    def monitor_to_add(self) -> str:
        """Say how a VM of its gets a second monitor, for qmpblock.

        It is there when the VM has been shut down and started again.
        """
        return _ADDS[self.name](self.vm)


def refused(manager: Manager | None, *, lent: bool = False) -> tuple[Verb, ...]:
    """Return what is not done to the chains of a VM because of whose it is.

    :param lent: whether the manager lends its monitor, and is asked to do itself what it can.
    """
    if manager is None:
        return ()
    asked = _ASKED.get(manager.name, ()) if lent else ()
    return tuple(verb for verb in get_args(Verb) if verb not in asked)


def recognise(traits: Traits) -> Manager | None:
    """Return the manager of a VM, or None."""
    for find in (_libvirt, _proxmox, _incus, _ganeti):
        manager = find(traits)
        if manager is not None:
            return manager
    return None


def disks_called(devices: Iterable[Device]) -> dict[str, str]:
    """Return disks by what their manager calls them, where that is none of QEMU's names.

    As Incus lists its devices (`root`), and as Proxmox VE's configuration has a disk that is no
    device with an id (`efidisk0`).
    """
    found = {}
    for device in devices:
        called = _incuss_disk(device) or _proxmoxs_disk(device)
        if called and called != device.name:
            found[called] = device.name
    return found


# -- libvirt, and all that stands on it: oVirt, OpenStack, KubeVirt, CloudStack, virt-manager

_LIBVIRT_NODE = re.compile(r"libvirt-\d+-\w+")


def _libvirt(traits: Traits) -> Manager | None:
    node = next((name for name in traits.nodes if _LIBVIRT_NODE.fullmatch(name)), None)
    if node is not None:
        return Manager("libvirt", traits.name, f"the node {node}")
    if "charmonitor" in traits.chardevs:
        return Manager("libvirt", traits.name, "the monitor charmonitor")
    return None


def _libvirts_way(vm: str, work: Work) -> str:
    domain, disk = _word(vm, "DOMAIN"), _word(work.file, "DISK")
    top, base = _option("top", work.top), _option("base", work.base)
    # Such a job ends with QEMU, and libvirt begins it on no persistent domain unless that is said.
    blockcopy = f"virsh blockcopy {domain} {disk} TARGET --transient-job --wait"
    ways = {
        "snapshot": f"virsh snapshot-create-as {domain} --disk-only --atomic",
        "pivot": f"virsh blockcommit {domain} {disk}{base} --active --pivot",
        # Without a top it would be the active layer.
        "commit": f"virsh blockcommit {domain} {disk}{top or ' --top TOP'}{base} --wait",
        "stream": f"virsh blockpull {domain} {disk}{base} --wait",
        "independent": f"virsh blockpull {domain} {disk} --wait",
        "point": f"virsh backup-begin {domain} PULL.xml, with mode='pull' in that; it serves the "
        f"disks until virsh domjobabort {domain}",
        "copy": f"{blockcopy} --finish",
        "freeze": f"virsh backup-begin {domain}, which makes images of all its disks, beside them",
        "backup": f"virsh backup-begin {domain} BACKUP.xml CHECKPOINT.xml",
        "move": f"{blockcopy} --pivot",
        "migrate": "virsh migrate --live --persistent --undefinesource --copy-storage-all "
        f"{domain} DESTURI",
    }
    if work.verb == "stream" and work.top:
        return (
            f"libvirt has no way to stream into {printable(work.top)}; what shortens a chain from "
            f"above is virsh blockcommit {domain} {disk} --top TOP --base BASE --wait"
        )
    if work.verb not in ways:
        return (
            "libvirt has no way of its own while the VM runs; thin allocation, and --full of raw "
            "images, change nothing that it knows"
        )
    return ways[work.verb]


# -- Proxmox VE

_PVE_DRIVE = re.compile(r"drive-((?:ide|sata|scsi|virtio|efidisk|tpmstate)\d+)")
_PVE_SOCKET = re.compile(r"/qemu-server/(\d+)\.(?:qmp|qga|vnc|serial\d*)")


def _proxmox(traits: Traits) -> Manager | None:
    said = " ".join((*traits.chardevs.values(), *traits.arguments))
    socket = _PVE_SOCKET.search(said)
    drive = next(
        (
            name
            for name, driver in traits.nodes.items()
            if driver == "throttle" and _PVE_DRIVE.fullmatch(name)
        ),
        None,
    )
    legacy = next((name for name in traits.devices if _PVE_DRIVE.fullmatch(name)), None)
    told = None
    if socket is not None:
        told = f"the socket {socket[0].lstrip('/')}"
    elif "qmp-event" in traits.chardevs:
        told = "the monitor qmp-event"
    elif drive is not None:
        told = f"the throttle node {drive}"
    elif legacy is not None and _after("-id", traits.arguments).isdigit():
        told = f"the drive {legacy} and -id"
    if told is None:
        return None
    vmid = _after("-id", traits.arguments) or (socket[1] if socket else "")
    return Manager("Proxmox VE", vmid, told)


def _proxmoxs_disk(device: Device) -> str:
    """Return its name in the configuration: what it is for the firmware, pflash, has no id."""
    root = "" if device.chain is None else device.chain.root.name
    match = _PVE_DRIVE.fullmatch(device.drive or root)
    return match[1] if match else ""


def _proxmoxs_way(vm: str, work: Work) -> str:
    vmid = _word(vm, "VMID")
    move = f"qm disk move {vmid} DISK STORAGE"
    return {
        "snapshot": f"qm snapshot {vmid} NAME",
        "pivot": f"qm delsnapshot {vmid} NAME",
        "commit": f"qm delsnapshot {vmid} NAME",
        "stream": f"{move} copies the disk whole",
        "independent": f"{move} copies the disk whole",
        "reserve": f"{move}, to a storage with preallocation",
        "point": f"vzdump {vmid} --mode snapshot",
        "copy": f"vzdump {vmid} --mode snapshot",
        "freeze": f"vzdump {vmid} --mode snapshot",
        "backup": f"vzdump {vmid} --mode snapshot",
        "move": move,
        "migrate": f"qm migrate {vmid} TARGET --online --with-local-disks",
    }[work.verb]


# -- Incus, and LXD, of which it is a fork

_INCUS = re.compile(r"(?:dev-)?(incus|lxd)_.+")
_INCUS_DISK = re.compile(r"dev-(?:incus|lxd)_(.+)", re.DOTALL)
_INCUS_SOCKET = re.compile(r"/(incus|lxd)/(?:[^,]*/)?([^/,]+)/qemu\.(?:monitor|qmp|pid|conf)")


def _incus(traits: Traits) -> Manager | None:
    names = (*traits.nodes, *traits.devices)
    node = next((match for match in map(_INCUS.fullmatch, names) if match), None)
    sockets = map(_INCUS_SOCKET.search, (*traits.chardevs.values(), *traits.arguments))
    socket = next((match for match in sockets if match), None)
    match = node or socket
    if match is None:
        return None
    kind = "Incus" if match[1] == "incus" else "LXD"
    where = "the node or device" if node else "the socket"
    named = socket is not None and socket[2].endswith(f"_{traits.name}")
    vm = socket[2] if socket is not None and named else traits.name
    return Manager(kind, vm, f"{where} {match[0].lstrip('/')}")


def _incuss_disk(device: Device) -> str:
    """Return its name among an instance's devices: in ids `/` is written as `-`, that twice."""
    match = _INCUS_DISK.fullmatch(device.id or "")
    return "-".join(part.replace("-", "/") for part in match[1].split("--")) if match else ""


def _incuss_way(command: str, vm: str, work: Work) -> str:
    instance = _instance(vm)
    return {
        "snapshot": f"{command} snapshot create {instance}",
        "pivot": f"{command} snapshot delete {instance} SNAPSHOT",
        "commit": f"{command} snapshot delete {instance} SNAPSHOT",
        "backup": f"{command} export {instance}",
        "migrate": f"{command} move {instance} --target MEMBER",
    }.get(work.verb, f"{command} copy {instance} NEW makes an instance of its own")


def _incuss_monitor(vm: str) -> str:
    """Say how it gets one where AppArmor's profile for it lets QEMU make a socket."""
    path = IncusAddress.of(vm or "INSTANCE").path
    return f"incus config set {_instance(vm)} raw.qemu='-qmp unix:{path},server=on,wait=off'"


def _instance(vm: str) -> str:
    """Name an instance to the command: in its names is no underscore, after a project's one is."""
    project, _, name = vm.rpartition("_")
    return f"--project {_word(project, '')} {_word(name, '')}" if project else _word(vm, "INSTANCE")


# -- Ganeti

_GANETI_FOLDER = "/ganeti/kvm-hypervisor/"


def _ganeti(traits: Traits) -> Manager | None:
    for description in traits.chardevs.values():
        if _GANETI_FOLDER in description:
            return Manager("Ganeti", traits.name, "its monitor's socket")
    return None


def _ganetis_way(vm: str, work: Work) -> str:
    if work.verb == "migrate":
        return f"gnt-instance migrate {_word(vm, 'INSTANCE')}"
    return f"gnt-instance shutdown {_word(vm, 'INSTANCE')}, then work on its closed images"


_WAYS = {
    "libvirt": _libvirts_way,
    "Proxmox VE": _proxmoxs_way,
    "Incus": lambda vm, work: _incuss_way("incus", vm, work),
    "LXD": lambda vm, work: _incuss_way("lxc", vm, work),
    "Ganeti": _ganetis_way,
}

#: What a manager that lends its monitor is asked to do itself (`qmpblock.chains.owner`).
_ASKED: Mapping[str, tuple[Verb, ...]] = {
    "libvirt": ("snapshot", "pivot", "commit", "stream", "independent", "reserve", "move")
}

_HOLDS: Mapping[str, Callable[[str, str], bool]] = {
    "libvirt": lambda chardev, _: chardev == "charmonitor",
    "Proxmox VE": lambda chardev, said: chardev == "qmp-event" or bool(_PVE_SOCKET.search(said)),
    "Incus": lambda _, said: bool(_INCUS_SOCKET.search(said)),
    "LXD": lambda _, said: bool(_INCUS_SOCKET.search(said)),
    "Ganeti": lambda _, said: _GANETI_FOLDER in said,
}

_OPTION = "-qmp unix:/run/qmpblock/VM.qmp,server=on,wait=off"
_ADDS: Mapping[str, Callable[[str], str]] = {
    "libvirt": lambda vm: f"none is needed: give libvirt:{_word(vm, 'DOMAIN')} as the address",
    "Proxmox VE": lambda vm: f"as root: qm set {_word(vm, 'VMID')} --args '{_OPTION}'",
    "Incus": _incuss_monitor,
    "LXD": lambda vm: f"lxc config set {_word(vm, 'INSTANCE')} raw.qemu='{_OPTION}'",
    "Ganeti": lambda vm: f"gnt-instance modify -H kvm_extra='{_OPTION}' {_word(vm, 'INSTANCE')}",
}


# -- words


def _after(option: str, arguments: tuple[str, ...]) -> str:
    """Return the word that follows an option."""
    for at, word in enumerate(arguments[:-1]):
        if word == option:
            return arguments[at + 1]
    return ""


def _word(text: str, placeholder: str) -> str:
    return shell_words([text]) if text else placeholder


def _option(name: str, text: str) -> str:
    return f" --{name} {shell_words([text])}" if text else ""
