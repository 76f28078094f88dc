"""Who started a VM, by what it names inside QEMU, and what that manager does by itself."""

from typing import get_args

import pytest

from qmpblock.graph.model import Device
from qmpblock.managers import Manager, Traits, Verb, Work, disks_called, recognise, refused

OURS = Traits(
    nodes={"disk0": "qcow2", "#block123": "file", "libvirt": "raw", "drive-scsi0": "qcow2"},
    devices=("vd0", "/machine/peripheral/vd0/virtio-backend", "drive-virtio-disk0"),
    chardevs={"qmp": "unix:/run/qmpblock/vm.qmp,server=on", "compat_monitor0": "stdio"},
    name="a vm",
    arguments=("qemu-system-x86_64", "-id", "x", "-name", "libvirt-1-format"),
)
LIBVIRT = Traits({"libvirt-1-format": "qcow2", "libvirt-1-storage": "file"}, name="web")
OLD_LIBVIRT = Traits(
    devices=("drive-virtio-disk0",),
    chardevs={"charmonitor": "unix:/var/lib/libvirt/qemu/domain-1-web/monitor.sock,server=on"},
    name="web",
)
PROXMOX = Traits(
    nodes={"drive-scsi0": "throttle", "f" + 30 * "a": "qcow2", "e" + 30 * "a": "file"},
    chardevs={
        "qmp": "unix:/var/run/qemu-server/104.qmp,server=on",
        "qmp-event": "unix:/var/run/qmeventd.sock",
    },
    name="web",
    arguments=("/usr/bin/kvm", "-id", "104", "-name", "web,debug-threads=on"),
)
INCUS = Traits({"incus_root": "raw"}, ("dev-incus_root",), name="web")
CASES = {
    "libvirt": (LIBVIRT, "libvirt", "web"),
    "libvirt before -blockdev": (OLD_LIBVIRT, "libvirt", "web"),
    "proxmox": (PROXMOX, "Proxmox VE", "104"),
    "proxmox by its nodes": (Traits({"drive-virtio1": "throttle"}), "Proxmox VE", ""),
    "proxmox by its socket": (
        Traits(chardevs={"x": "unix:/run/qemu-server/7.qmp,server=on"}),
        "Proxmox VE",
        "7",
    ),
    "proxmox by qmeventd": (
        Traits(chardevs={"qmp-event": "unix:/var/run/qmeventd.sock"}),
        "Proxmox VE",
        "",
    ),
    "proxmox before -blockdev": (
        Traits(devices=("drive-scsi0",), arguments=("kvm", "-id", "9")),
        "Proxmox VE",
        "9",
    ),
    "incus": (INCUS, "Incus", "web"),
    "incus by its device": (Traits(devices=("dev-incus_root",), name="x"), "Incus", "x"),
    "incus by its socket": (
        Traits(chardevs={"m": "unix:/run/incus/web/qemu.monitor,server=on"}, name="web"),
        "Incus",
        "web",
    ),
    "incus by its command line": (
        Traits(name="web", arguments=("qemu", "-readconfig", "/run/incus/web/qemu.conf")),
        "Incus",
        "web",
    ),
    "incus in a project": (
        Traits(name="web", arguments=("qemu", "-pidfile", "/run/incus/dev_web/qemu.pid")),
        "Incus",
        "dev_web",
    ),
    "lxd": (Traits({"lxd_root": "raw"}, name="web"), "LXD", "web"),
    "ganeti": (
        Traits(chardevs={"m": "unix:/var/run/ganeti/kvm-hypervisor/ctrl/web.qmp,server=on"}),
        "Ganeti",
        "",
    ),
}
VERBS = (
    *("snapshot", "pivot", "commit", "stream", "independent", "reserve"),
    *("point", "copy", "freeze", "backup", "move", "migrate"),
)


@pytest.mark.parametrize(("traits", "name", "vm"), CASES.values(), ids=CASES)
def test_managers_are_recognised(traits, name, vm):
    manager = recognise(traits)
    assert (manager.name, manager.vm) == (name, vm)
    assert manager.told_by


@pytest.mark.parametrize("traits", [Traits(), OURS])
def test_whoever_runs_qemu_alone_is_no_manager(traits):
    assert recognise(traits) is None


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", CASES)
def test_each_has_a_word_for_every_verb(case, verb):
    way = recognise(CASES[case][0]).way(Work(verb, "/images/disk.qcow2"))
    assert way == way.strip()
    assert len(way) > 10


@pytest.mark.parametrize(
    ("work", "way"),
    [
        (Work("snapshot", "/i/a"), "virsh snapshot-create-as web --disk-only --atomic"),
        (Work("pivot", "/i/a"), "virsh blockcommit web /i/a --active --pivot"),
        (
            Work("pivot", "/i/a", base="/i/b"),
            "virsh blockcommit web /i/a --base /i/b --active --pivot",
        ),
        (
            Work("commit", "/i/a", "/i/b", "/i/c d"),
            "virsh blockcommit web /i/a --top /i/b --base '/i/c d' --wait",
        ),
        (Work("stream", "/i/a", base="/i/b"), "virsh blockpull web /i/a --base /i/b --wait"),
        (Work("independent", "/i/a"), "virsh blockpull web /i/a --wait"),
        (Work("commit", ""), "virsh blockcommit web DISK --top TOP --wait"),
        (
            Work("copy", "/i/a"),
            "virsh blockcopy web /i/a TARGET --transient-job --wait --finish",
        ),
    ],
)
def test_libvirts_own_ways(work, way):
    assert recognise(LIBVIRT).way(work) == way


def test_what_libvirt_cannot_do_is_said():
    manager = recognise(LIBVIRT)
    assert "no way" in manager.way(Work("reserve", "/i/a"))
    assert "no way to stream into /i/b" in manager.way(Work("stream", "/i/a", "/i/b"))


def test_proxmoxs_and_incuss_own_ways():
    assert recognise(PROXMOX).way(Work("snapshot", "/i/a")) == "qm snapshot 104 NAME"
    assert recognise(INCUS).way(Work("snapshot", "")) == "incus snapshot create web"


@pytest.mark.parametrize(
    ("id_", "drive", "called"),
    [
        ("dev-incus_root", None, {"root": "dev-incus_root"}),
        ("dev-lxd_my--disk", None, {"my-disk": "dev-lxd_my--disk"}),
        ("dev-incus_a-b--c---d", None, {"a/b-c-/d": "dev-incus_a-b--c---d"}),
        ("dev-incus_", None, {}),
        ("scsi0", "drive-scsi0", {}),  # it is the device's own
        (None, "drive-efidisk0", {"efidisk0": "drive-efidisk0"}),
        (None, "drive-efidisk0-backup", {}),
        ("vd0", None, {}),
    ],
)
def test_what_a_disk_is_called_by_its_manager(id_, drive, called):
    device = Device(id_, drive, "/machine/x", removable=False, read_only=False, chain=None)
    assert disks_called([device]) == called


def test_names_from_a_peer_are_quoted():
    odd = Traits({"libvirt-1-format": "raw"}, name="a; rm -rf /\x1b")
    assert "'a; rm -rf /\\x1b'" in recognise(odd).way(Work("snapshot", "x"))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_the_manager_would_not_know(verb):
    assert Work(verb, "x").effect


@pytest.mark.parametrize(
    ("case", "chardev", "description", "held"),
    [
        ("libvirt", "charmonitor", "socket", True),
        ("libvirt", "mine", "unix:/run/qmpblock/web.qmp", False),
        ("proxmox", "qmp", "unix:/var/run/qemu-server/104.qmp,server=on", True),
        ("proxmox", "qmp-event", "unix:/var/run/qmeventd.sock", True),
        ("proxmox", "compat_monitor0", "unix:/run/qmpblock/104.qmp", False),
        ("incus", "monitor", "unix:/run/incus/web/qemu.monitor", True),
        ("incus", "compat_monitor0", "unix:/run/incus/web/qmpblock.qmp", False),
        ("lxd", "monitor", "unix:/run/lxd/web/qemu.monitor", True),
        ("ganeti", "m", "unix:/var/run/ganeti/kvm-hypervisor/ctrl/web.qmp", True),
        ("ganeti", "m", "unix:/run/qmpblock/web.qmp", False),
    ],
)
def test_which_monitors_are_the_managers_own(case, chardev, description, held):
    assert recognise(CASES[case][0]).holds(chardev, description) is held


def test_proxmox_alone_has_room_for_others_at_its_own_monitor():
    shared = {case for case, (traits, *_) in CASES.items() if recognise(traits).shares}
    assert shared == {case for case in CASES if case.startswith("proxmox")}


@pytest.mark.parametrize("case", CASES)
def test_each_says_how_a_second_monitor_is_added(case):
    manager = recognise(CASES[case][0])
    words = manager.monitor_to_add()
    wanted = "libvirt:" if manager.name == "libvirt" else ".qmp,server=on,wait=off'"
    assert wanted in words


def test_an_instance_of_a_project():
    manager = recognise(CASES["incus in a project"][0])
    assert manager.way(Work("snapshot", "")) == "incus snapshot create --project dev web"
    assert manager.monitor_to_add() == (
        "incus config set --project dev web raw.qemu="
        "'-qmp unix:/run/incus/dev_web/qmpblock.qmp,server=on,wait=off'"
    )


def test_whoever_manages_a_vm_all_that_he_would_not_know_is_refused():
    assert refused(None) == ()
    assert set(refused(recognise(LIBVIRT))) == set(VERBS) == set(get_args(Verb))
    assert len({Work(verb, "").called for verb in VERBS}) == len(VERBS)


def test_what_a_manager_that_lends_its_monitor_is_asked_for_is_not_refused():
    libvirt, incus = (Manager(name, "web", "") for name in ("libvirt", "Incus"))
    assert set(refused(libvirt)) - set(refused(libvirt, lent=True)) == {
        *("snapshot", "pivot", "commit", "stream", "independent", "reserve", "move"),
    }
    assert refused(incus, lent=True) == refused(incus)
    assert refused(None, lent=True) == ()
