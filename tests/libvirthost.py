"""libvirtd and virtlogd for the tests: own mount and network namespaces, nothing of the host's.

What they would write to /run/libvirt, /var/lib/libvirt, /etc/libvirt and so on lies in a directory
of the test's, and no bridge, firewall or control group of the host can be seen, so two runs never
meet, nor any of them the libvirt of this host. libvirtd is reached through the root of the process
that holds the namespaces, so it can be killed and started again under the same address.

What is not installed is taken from the packages that tools/fetch_daemon.py unpacks: laid over /usr
in that namespace (`tests/unpacked.py`), and loaded into this process from where they lie.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from unpacked import fetched, have_user, laid_over

from qmpblock.host.processes import die_with_parent
from qmpblock.testing.images import Tools
from qmpblock.testing.scratch import leave, private_directory

TRIPLET = f"{platform.machine()}-linux-gnu"
_PACKAGES = "usr/lib/python3/dist-packages"
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_MODULES = (
    f"libvirtmod{_SUFFIX}",
    f"libvirtmod_qemu{_SUFFIX}",
    "libvirt.py",
    "libvirt_qemu.py",
)
_PARTS = (
    "usr/sbin/libvirtd",
    "usr/sbin/virtlogd",
    f"usr/lib/{TRIPLET}/libvirt/connection-driver",
    "usr/bin/virsh",
)
FOLDERS = {
    "run": "/run",
    "lib": "/var/lib",
    "log": "/var/log",
    "cache": "/var/cache",
    "etc": "/etc",
}
_APART = ("unshare", "--mount", "--net", "--uts")
_OVERLAY = laid_over("$2")
_ENTER = "\n".join(
    [
        "mount --make-rprivate /",
        *(
            f'mkdir -p {there}/libvirt && mount --bind "$1/{here}" {there}/libvirt'
            for here, there in FOLDERS.items()
        ),
        _OVERLAY,
        # Whatever the daemon is told of users, it looks for the one that its package makes.
        have_user("libvirt-qemu", 64055, "$1"),
        "umount -R -l /sys/fs/cgroup || true",
        'hostname "libvirt-$$"',
        'echo && exec sleep "infinity"',
    ]
)
_WIRE = ("10.231.0.1", "10.231.0.2")
_START = 60.0  # seconds for the daemon; a loaded machine needs some
_DOMAIN = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>{threads}
  <os><type arch='x86_64'>hvm</type></os><features><acpi/></features>
  <devices>
    <emulator>{emulator}</emulator>
    {disks}
    <controller type='usb' model='none'/><memballoon model='none'/>
  </devices>{options}
</domain>
"""
_MONITOR = """<qemu:commandline>
    <qemu:arg value='-qmp'/><qemu:arg value='unix:{path},server=on,wait=off'/>
  </qemu:commandline>"""
_DISK = """<disk type='file' device='disk'>
      <driver name='qemu' type='{kind}'{more}/><source file='{image}'/>
      <target dev='vd{letter}' bus='virtio'/>
    </disk>
"""


def _required() -> Path:
    """Return where libvirt is; skip the test, with the reason, where there is none to be had."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for namespaces of its own")
    unpacked, why = fetched("libvirt", *_PARTS)
    if unpacked is None:
        pytest.skip(f"no libvirt: {why}")
    if not _has_binding() and _binding(unpacked) is None:
        pytest.skip(f"no Python binding of libvirt for this Python ({_MODULES[0]})")
    if why := _why_no_namespaces(unpacked):
        pytest.skip(f"no namespaces of its own: {why}")
    return unpacked


@functools.cache
def _why_no_namespaces(unpacked: Path) -> str:
    """Say why this host lets nobody have what is mounted here; empty where it does."""
    trying = f"mount --make-rprivate /\n{_OVERLAY}"
    done = subprocess.run(
        [*_APART, "sh", "-ec", trying, "sh", "", str(unpacked)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.strip() if done.returncode else ""


@functools.cache
def _has_binding() -> bool:
    """Whether this Python had the binding before any was brought in for a while."""
    return importlib.util.find_spec("libvirt_qemu") is not None


def _binding(unpacked: Path) -> Path | None:
    """Return where Debian's Python binding lies, if it is one for this Python."""
    places = (top / _PACKAGES for top in (unpacked, Path("/")))
    return next((place for place in places if (place / _MODULES[0]).exists()), None)


def _bring_in(unpacked: Path, folder: Path, patched: pytest.MonkeyPatch) -> None:
    """Let this process, and what it starts, import the binding, and nothing else of its place.

    The libraries that the machine lacks are loaded by their paths, and found by name from then on.

    :param folder: where links to it are made.
    """
    binding = _binding(unpacked)
    assert binding is not None
    folder.mkdir()
    for name in _MODULES:
        (folder / name).symlink_to(binding / name)
    libraries = unpacked / "usr" / "lib" / TRIPLET
    if unpacked != Path("/"):
        _load(sorted(libraries.glob("*.so.*")))
        patched.setenv("LD_LIBRARY_PATH", str(libraries), prepend=os.pathsep)
    patched.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    patched.syspath_prepend(folder)


def _load(libraries: list[Path]) -> None:
    """Load them all, those that another one needs first."""
    left: list[Path] = []
    for library in libraries:
        try:
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        except OSError:
            left.append(library)
    if left and len(left) < len(libraries):
        _load(left)


class LibvirtHost:
    """A libvirtd of its own, and the virtlogd through which its QEMUs log; see `libvirt_host`.

    :ivar uri: for virsh and qmpblock.
    :ivar inside: what a command is preceded by that is to run there.
    """

    def __init__(self, folder: Path, unpacked: Path, reached_at: str = "") -> None:
        self._folder = folder
        self._daemon: subprocess.Popen[bytes] | None = None
        self._logger: subprocess.Popen[bytes] | None = None
        for name in FOLDERS:
            (folder / name).mkdir(parents=True)
        (folder / "etc" / "qemu.conf").write_text(
            'security_driver = "none"\nuser = "root"\ngroup = "root"\nstdio_handler = "logd"\n'
            + (f'migration_host = "{reached_at}"\n' if reached_at else "")
        )
        (folder / "etc" / "libvirtd.conf").write_text(
            f'auth_unix_rw = "none"\nhost_uuid = "{uuid.uuid4()}"\n'
        )
        self._holder = subprocess.Popen(
            [*_APART, "sh", "-ec", _ENTER, "sh", str(folder), str(unpacked)],
            stdout=subprocess.PIPE,
            preexec_fn=die_with_parent(),
        )
        assert self._holder.stdout is not None
        with self._holder.stdout as told:
            assert told.readline() == b"\n", "no namespaces of its own"
        self.inside = ("nsenter", "-m", "-n", "-u", "-t", str(self._holder.pid))
        self.socket = Path(f"/proc/{self._holder.pid}/root/run/libvirt/libvirt-sock")
        self.uri = f"qemu+unix:///system?socket={self.socket}"

    def address(self, domain: str) -> str:
        return f"libvirt:{self.uri}?{domain}"

    def start(self) -> None:
        """Start the daemon, and wait until it answers. In the main thread: it dies with that.

        What its QEMUs say is virtlogd's, which is started with the first and goes on without it.
        """
        if self._logger is None:
            self._logger = self._begin("virtlogd")
            self._wait("virtlogd", self._logger, self.socket.with_name("virtlogd-sock").exists)
        self._daemon = self._begin("libvirtd")
        self._wait("libvirtd", self._daemon, lambda: not self._virsh("list").returncode)

    def _begin(self, name: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                # Its pid file would be in /run itself, where all would meet.
                [*self.inside, name, "--pid-file", f"/run/libvirt/{name}.pid"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent(),
            )

    def _wait(
        self, name: str, process: subprocess.Popen[bytes], answers: Callable[[], bool]
    ) -> None:
        late = time.monotonic() + _START
        while not answers():
            assert process.poll() is None, (self._folder / f"{name}.log").read_text()
            assert time.monotonic() < late, f"{name} does not answer"
            time.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        assert self._daemon is not None
        self._daemon.send_signal(number)

    def kill(self) -> None:
        """Kill the daemon (-9); its domains go on."""
        self.signal(signal.SIGKILL)
        assert self._daemon is not None
        self._daemon.wait()

    @property
    def is_running(self) -> bool:
        """Whether the daemon is."""
        return self._daemon is not None and self._daemon.poll() is None

    @property
    def daemon(self) -> int:
        """The daemon's pid: `nsenter` becomes it."""
        assert self._daemon is not None
        return self._daemon.pid

    @property
    def logger(self) -> int:
        """The pid of virtlogd."""
        assert self._logger is not None
        return self._logger.pid

    def log(self, name: str) -> Path:
        """Return where it writes what a domain's QEMU says."""
        return self._folder / "log" / "qemu" / f"{name}.log"

    def virsh(self, *words: str) -> str:
        done = self._virsh(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _virsh(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.inside, "virsh", "-q", "-c", self.uri, *words],
            capture_output=True,
            text=True,
            timeout=120,
        )

    def domain(
        self,
        name: str,
        image: Path,
        kind: str,
        emulator: str,
        *more: Path,
        iothread: bool = False,
        driver: str = "",
        monitor: Path | None = None,
    ) -> int:
        """Define and start a domain with the disk vda, and one for each of `more`.

        :param iothread: whether one serves vda.
        :param driver: what else is said of the disks' drivers.
        :param monitor: where QEMU is to have a second one, of which libvirt does not know.
        :return: QEMU's pid.
        """
        disks = "".join(
            _DISK.format(
                kind=kind,
                image=one,
                letter="abcd"[number],
                more=driver + (" iothread='1'" if iothread and not number else ""),
            )
            for number, one in enumerate((image, *more))
        )
        threads = "<iothreads>1</iothreads>" if iothread else ""
        xml = self._folder / f"{name}.xml"
        options = "" if monitor is None else _MONITOR.format(path=monitor)
        xml.write_text(
            _DOMAIN.format(
                name=escape(name), disks=disks, threads=threads, emulator=emulator, options=options
            )
        )
        self.virsh("define", str(xml))
        self.virsh("start", name)
        return self.pid(name)

    def pid(self, name: str) -> int:
        folder, entities = self._folder / "run" / "qemu", {"'": "&apos;"}
        # libvirt 9 writes this name as it would in XML.
        return int((folder / f"{escape(name, entities)}.pid").read_text())

    def end(self) -> None:
        try:
            if self._daemon is not None and self._daemon.poll() is None:
                self.signal(signal.SIGCONT)
                for name in filter(None, self.virsh("list", "--name").splitlines()):
                    self.virsh("destroy", name)
        finally:
            for file in (self._folder / "run" / "qemu").glob("*.pid"):
                if file.stem != "driver":
                    _kill(int(file.read_text()))
            for process in (self._daemon, self._logger, self._holder):
                if process is not None:
                    process.kill()
                    process.wait()


def _kill(pid: int) -> None:
    if b"qemu" in Path(f"/proc/{pid}/cmdline").read_bytes():
        os.kill(pid, signal.SIGKILL)


@contextmanager
def libvirt_host(reached_at: str = "") -> Iterator[LibvirtHost]:
    """Run one for as long as the body does; end it then, and its domains. Or skip the test.

    :param reached_at: the address that it tells who migrates a domain to it.
    """
    unpacked = _required()
    folder = private_directory()
    host = LibvirtHost(folder / "libvirt", unpacked, reached_at)
    with pytest.MonkeyPatch.context() as patched:
        try:
            if not _has_binding():
                _bring_in(unpacked, folder / "python", patched)
            host.start()
            yield host
        finally:
            host.end()
            leave(folder)


@pytest.fixture(scope="module")
def libvirt(qemu_binary: str) -> Iterator[LibvirtHost]:
    """Give a module's tests a libvirt of their own."""
    with libvirt_host() as host:
        yield host


@contextmanager
def two_libvirt_hosts(here: Path, there: Path) -> Iterator[tuple[LibvirtHost, LibvirtHost]]:
    """Run two, and a wire between them, along which domains are migrated.

    :param here: a directory of the first; at the second `there` is what has this name.
    """
    with libvirt_host() as first, libvirt_host(_WIRE[1]) as second:
        end = ("peer", "name", "wire", "netns", second.inside[-1])
        run(*first.inside, "ip", "link", "add", "wire", "type", "veth", *end)
        for host, address in zip((first, second), _WIRE, strict=True):
            run(*host.inside, "ip", "address", "add", f"{address}/30", "dev", "wire")
            run(*host.inside, "ip", "link", "set", "wire", "up")
        run(*second.inside, "mount", "--bind", there, here)
        yield first, second


def run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_chain(folder: Path, qemu: str) -> Path:
    """Make an image with a backing image, 16 MiB: 1 MiB in each, the later one half over it."""
    tools = Tools.of(qemu)
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    run(tools.img, "create", "-q", "-f", "qcow2", base, "16M")
    run(tools.io, "-f", "qcow2", "-c", "write -P 1 0 1M", base)
    run(tools.img, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    run(tools.io, "-f", "qcow2", "-c", "write -P 2 512k 1M", top)
    return top


def sockets(pid: int) -> int:
    """Return how many sockets a process has open."""
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has been closed since
            found += str(link.readlink()).startswith("socket:")
    return found


def start(
    host: LibvirtHost, name: str, image: Path, qemu_binary: str, kind: str = "qcow2"
) -> Callable[[], tuple[object, ...]]:
    """Start a domain; return what libvirt says of it, and how many sockets its QEMU has."""
    pid = host.domain(name, image, kind, qemu_binary)
    return lambda: (
        *(
            re.findall("<disk .*?</disk>", host.virsh("dumpxml", name, *which), re.DOTALL)
            for which in ([], ["--inactive"])
        ),
        host.virsh("domblklist", name),
        host.virsh("blockjob", name, "vda"),
        sockets(pid),
    )
