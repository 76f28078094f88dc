"""libvirt's daemon for the tests: its own mount and network namespace, nothing of the host's.

What it would write to /run/libvirt, /var/lib/libvirt, /etc/libvirt and so on lies in a directory of
the test's, and no bridge, firewall or control group of the host can be seen, so two runs never
meet, nor any of them the libvirt of this host. It is reached through the root of the process that
holds the namespaces, so it can be killed and started again under the same address.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmpblock.host.processes import die_with_parent

FOLDERS = {
    "run": "/run",
    "lib": "/var/lib",
    "log": "/var/log",
    "cache": "/var/cache",
    "etc": "/etc",
}
_ENTER = "\n".join(
    [
        "mount --make-rprivate /",
        *(
            f'mkdir -p {there}/libvirt && mount --bind "$1/{here}" {there}/libvirt'
            for here, there in FOLDERS.items()
        ),
        "umount -R -l /sys/fs/cgroup || true",
        'echo && exec sleep "infinity"',
    ]
)
_START = 60.0  # seconds for the daemon; a loaded machine needs some
_DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64'>hvm</type></os><features><acpi/></features>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='{kind}'/><source file='{image}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <controller type='usb' model='none'/><memballoon model='none'/>
  </devices>
</domain>
"""


def require() -> None:
    """Skip the test, with the reason, where there is no libvirt to be had."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for namespaces of its own")
    for program in ("libvirtd", "virsh", "unshare", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian's libvirt-daemon-system)")
    pytest.importorskip("libvirt_qemu", reason="libvirt's Python binding is not installed")


class LibvirtHost:
    """A libvirtd of its own; see `libvirt_host`.

    :ivar uri: for virsh and qmpblock.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemon: subprocess.Popen[bytes] | None = None
        for name in FOLDERS:
            (folder / name).mkdir(parents=True)
        (folder / "etc" / "qemu.conf").write_text(
            'security_driver = "none"\nuser = "root"\ngroup = "root"\nstdio_handler = "file"\n'
        )
        (folder / "etc" / "libvirtd.conf").write_text('auth_unix_rw = "none"\n')
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--net", "sh", "-ec", _ENTER, "sh", str(folder)],
            stdout=subprocess.PIPE,
            preexec_fn=die_with_parent(),
        )
        assert self._holder.stdout is not None
        with self._holder.stdout as told:
            assert told.readline() == b"\n", "no namespaces of its own"
        self.socket = Path(f"/proc/{self._holder.pid}/root/run/libvirt/libvirt-sock")
        self.uri = f"qemu+unix:///system?socket={self.socket}"

    def address(self, domain: str) -> str:
        return f"libvirt:{self.uri}?{domain}"

    def start(self) -> None:
        """Start the daemon, and wait until it answers. In the main thread: it dies with that."""
        log = (self._folder / "daemon.log").open("ab")
        self._daemon = subprocess.Popen(
            # Its pid file would be in /run itself, where all would meet.
            [
                *("nsenter", "-m", "-n", "-t", str(self._holder.pid)),
                *("libvirtd", "--pid-file", "/run/libvirt/libvirtd.pid"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent(),
        )
        log.close()
        late = time.monotonic() + _START
        while self._virsh("list").returncode:
            assert self._daemon.poll() is None, (self._folder / "daemon.log").read_text()
            assert time.monotonic() < late, "libvirtd does not answer"
            time.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        assert self._daemon is not None
        self._daemon.send_signal(number)

    def kill(self) -> None:
        """Kill the daemon (-9); its domains go on."""
        self.signal(signal.SIGKILL)
        assert self._daemon is not None
        self._daemon.wait()

    def virsh(self, *words: str) -> str:
        done = self._virsh(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _virsh(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["virsh", "-q", "-c", self.uri, *words], capture_output=True, text=True, timeout=120
        )

    def domain(self, name: str, image: Path, kind: str, emulator: str) -> int:
        """Define and start a domain with one disk, vda; return QEMU's pid."""
        xml = self._folder / f"{name}.xml"
        xml.write_text(_DOMAIN.format(name=name, image=image, kind=kind, emulator=emulator))
        self.virsh("define", str(xml))
        self.virsh("start", name)
        return self.pid(name)

    def pid(self, name: str) -> int:
        return int((self._folder / "run" / "qemu" / f"{name}.pid").read_text())

    def end(self) -> None:
        try:
            if self._daemon is not None and self._daemon.poll() is None:
                self.signal(signal.SIGCONT)
                for name in self.virsh("list", "--name").split():
                    self.virsh("destroy", name)
        finally:
            for file in (self._folder / "run" / "qemu").glob("*.pid"):
                if file.stem != "driver":
                    _kill(int(file.read_text()))
            for process in (self._daemon, self._holder):
                if process is not None:
                    process.kill()
                    process.wait()


def _kill(pid: int) -> None:
    if b"qemu" in Path(f"/proc/{pid}/cmdline").read_bytes():
        os.kill(pid, signal.SIGKILL)


@contextmanager
def libvirt_host(folder: Path) -> Iterator[LibvirtHost]:
    """Run one for as long as the body does; end it then, and its domains."""
    host = LibvirtHost(folder)
    try:
        host.start()
        yield host
    finally:
        host.end()
