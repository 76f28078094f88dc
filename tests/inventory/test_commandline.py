"""What a QEMU was started with: which programs are one, and where their monitors listen."""

import pytest

from qmpblock.inventory.commandline import Listening, is_vm, read_command_line

LD = "/lib64/ld-linux-x86-64.so.2"


@pytest.mark.parametrize(
    ("file", "words", "expected"),
    [
        ("/usr/bin/qemu-system-x86_64", "qemu-system-x86_64 -M none", True),
        ("/usr/bin/qemu-system-aarch64", "x", True),
        ("/usr/bin/qemu-system-x86_64-spice", "x", True),
        ("/usr/libexec/qemu-kvm", "x", True),
        ("/usr/bin/kvm", "/usr/bin/kvm -id 104", True),
        (LD, f"{LD} --argv0 /opt/bin/qemu-system-x86_64 /opt/usr/bin/qemu-system-x86_64 -S", True),
        ("/root/ld.so", "/root/ld.so --library-path /x /x/qemu-system-arm -S", True),
        (LD, f"{LD} /bin/cat qemu", False),
        ("/opt/vmm", "/opt/vmm -machine q35 -device virtio-blk,drive=d", True),
        ("/opt/vmm", "/opt/vmm -M q35 -accel kvm -device virtio-blk,drive=d", True),
        ("/opt/vmm", "/opt/vmm -machine q35", False),
        ("/usr/bin/qemu-img", "qemu-img create -f qcow2 x", False),
        ("/usr/bin/qemu-nbd", "qemu-nbd -k s x", False),
        ("/usr/bin/qemu-storage-daemon", "qemu-storage-daemon --blockdev x --chardev y", False),
        ("/usr/bin/qemu-x86_64", "qemu-x86_64 ./a -M -drive", False),
        ("/usr/bin/sudo", "sudo qemu-system-x86_64 -M none -qmp unix:x,server=on", False),
        ("/usr/bin/timeout", "timeout 9 /usr/bin/kvm -M none -drive x", False),
        ("/bin/sh", "sh -c qemu-system-x86_64", False),
        ("/usr/bin/python3", "python3 -m pytest", False),
        ("/usr/sbin/virtqemud", "virtqemud --timeout 120", False),
    ],
)
def test_which_processes_are_vms(file, words, expected):
    assert is_vm(file, words.split()) is expected


PATH = Listening("m", "/run/vm.qmp")
CASES = {
    "unix": ("-qmp unix:/run/vm.qmp,server=on,wait=off", PATH),
    "its old words": ("-qmp unix:/run/vm.qmp,server,nowait", PATH),
    "pretty": ("--qmp-pretty unix:/run/vm.qmp,server=yes", PATH),
    "a comma": ("-qmp unix:/run/a,,b.qmp,server=on", Listening("m", "/run/a,b.qmp")),
    "a client": ("-qmp unix:/run/vm.qmp", None),
    "no server": ("-qmp unix:/run/vm.qmp,server=off", None),
    "stdio": ("-qmp stdio", None),
    "a human monitor": ("-monitor unix:/run/vm.qmp,server=on", None),
    "tcp": ("-qmp tcp:localhost:4444,server=on", Listening("m", tcp=("localhost", 4444))),
    "tcp of all": ("-qmp tcp::4444,server=on", Listening("m", tcp=("", 4444))),
    "tcp by IPv6": ("-qmp tcp:[::1]:4444,server=on", Listening("m", tcp=("::1", 4444))),
    "a port that QEMU chooses": ("-qmp tcp:localhost:0,server=on", None),
    "a device": (
        "-chardev socket,id=m,path=/run/vm.qmp,server=on -mon chardev=m,mode=control",
        PATH,
    ),
    "in the other order": (
        "-mon m,mode=control -chardev socket,id=m,path=/run/vm.qmp,server=on",
        PATH,
    ),
    "by -qmp": ("-qmp chardev:m -chardev socket,id=m,path=/run/vm.qmp,server", PATH),
    "a human monitor's device": (
        "-chardev socket,id=m,path=/run/vm.qmp,server=on -mon chardev=m",
        None,
    ),
    "a device of another": (
        "-chardev socket,id=x,path=/run/agent,server=on -mon chardev=m,mode=control",
        None,
    ),
    "given": (
        "-chardev socket,id=m,fd=33,server=on,wait=off -mon chardev=m,mode=control",
        Listening("m", fd=33),
    ),
    "given when connected": ("-chardev socket,id=m,fd=33 -mon chardev=m,mode=control", None),
    "abstract": (
        "-chardev socket,id=m,path=vm,abstract=on,server=on -mon chardev=m,mode=control",
        Listening("m", "vm", abstract=True),
    ),
    "a device of TCP": (
        "-chardev socket,id=m,host=0.0.0.0,port=5,server=on -mon chardev=m,mode=control",
        Listening("m", tcp=("0.0.0.0", 5)),
    ),
    "in a file": ("-readconfig /run/incus/web/qemu.conf", Listening("m", "/run/incus/web/m")),
    "a file that is not to be had": ("-readconfig /nowhere", None),
}
FILE = """\
# Machine
[machine]
graphics = "off"

[chardev "m"]
backend = "socket"
path = "/run/incus/web/m"
server = "on"
wait = "off"

[mon]
chardev = "m"
mode = "control"
"""


def read(words):
    files = {"/run/incus/web/qemu.conf": FILE}
    return read_command_line(
        ["qemu-system-x86_64", *words.split()], lambda name: files.get(name, "")
    )


@pytest.mark.parametrize(("words", "expected"), CASES.values(), ids=CASES)
def test_where_a_monitor_listens(words, expected):
    started = read(words)
    if expected is None:
        assert started.monitors == ()
        return
    [found] = started.monitors
    assert found.chardev in started.chardevs
    label = "m" if "-qmp " not in words and "pretty" not in words else found.chardev
    assert found == Listening(label, expected.path, expected.tcp, expected.fd, expected.abstract)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("-name web", "web"),
        ("-name guest=web,debug-threads=on", "web"),
        ("-name web,process=x", "web"),
        ("-name a,,b", "a,b"),
        ("-S -M none", ""),
        ("-nodefaults -name qemu -S", "qemu"),
    ],
)
def test_its_name(words, name):
    assert read(words).name == name


def test_several_monitors_keep_their_order():
    started = read("-qmp unix:a,server=on -qmp unix:b,server=on -qmp stdio")
    assert [one.path for one in started.monitors] == ["a", "b"]
    assert len({one.chardev for one in started.monitors}) == 2


def test_what_managers_are_recognised_by():
    started = read("-chardev socket,id=charmonitor,fd=3,server=on -chardev socket,id=q,path=/a,b=c")
    assert started.chardevs == {"charmonitor": "socket", "q": "unix:/a"}
