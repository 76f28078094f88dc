"""What is missing here for which command: programs, rights, this kernel, one VM.

Nothing is changed, and nothing but the monitor is asked. Each `Finding` says what was looked for,
what there is, and what needs it; it is for people, who then decide whether they need that.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.errors import Error, printable
from qmpblock.graph.places import Place
from qmpblock.host.openfiles import NOWHERE, OpenFiles, sees_directory
from qmpblock.host.processes import describe_process
from qmpblock.host.statedirectory import StateDirectory, state_directory

if TYPE_CHECKING:
    from qmpblock.graph.model import Layer
    from qmpblock.vm import VM

__all__ = ["Finding", "examine_host", "examine_vm", "no_monitor"]

_NEWEST_TOO_OLD = (7, 1)  # of qemu-img; as of QEMU itself (README)
_CREATE_RULESET = 444  # landlock_create_ruleset(2), on every architecture
_SECCOMP = Path("/proc/sys/kernel/seccomp/actions_avail")
#: What the VM's process and its open files are looked at for.
_PROVING = (
    "copy; backup; allocate --full; proving the names that snapshot, stream and commit record"
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    :ivar what: it.
    :ivar missing: whether something that a command needs is not there.
    :ivar found: what there is.
    :ivar needed_for: which commands need it.
    :ivar remedy: what to do; empty if nothing is missing.
    """

    what: str
    missing: bool
    found: str
    needed_for: str
    remedy: str = ""


def examine_host() -> list[Finding]:
    """Look at this host, as this user."""
    return [
        _program(
            "qemu-img",
            "map of an image, verify, copy, backup, restore, snapshot, allocate --full of qcow2, "
            "recover IMAGE",
        ),
        _program("qemu-io", "allocate --full of qcow2 and QED"),
        _program(
            "qemu-nbd",
            "verify: which byte differs first, and how many do; copy and backup --verify",
        ),
        _landlock(),
        _seccomp(),
        _state(),
        _temporary(),
    ]


def no_monitor(error: Error) -> Finding:
    """Return the finding that a VM's monitor cannot be used."""
    return Finding(
        "monitor", True, error.message, "every command but those on images", error.remedy or ""
    )


async def examine_vm(vm: VM) -> list[Finding]:
    """Look at a VM whose monitor is connected.

    :raise MonitorError: the monitor is lost.
    """
    monitor = vm.monitor
    version = await monitor.execute("query-version")
    numbers = version.get("qemu", {})
    said = ".".join(str(numbers.get(part)) for part in ("major", "minor", "micro"))
    findings = [Finding("monitor", False, f"QEMU {printable(said)} answers", "every command")]
    pid = monitor.peer_pid
    findings.append(_process(pid, local=monitor.can_pass_fds))
    files = OpenFiles(pid)
    findings.append(_open_files(files))
    if files.blind is None and files.is_qemu:
        for device in (await vm.graph()).devices:
            if device.chain is not None:
                findings += _images(files, device.name, device.chain.layers)
    return findings


def _program(name: str, needed_for: str) -> Finding:
    path = shutil.which(name)
    if path is None:
        return Finding(name, True, "is not in PATH", needed_for, "install Debian's qemu-utils")
    command = [path, "--version"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, True, f"{path} cannot be run: {error}", needed_for, "install it anew")
    match = re.search(r"(?:version|qemu-nbd) (\d+)\.(\d+)\S*", done.stdout)
    if match is None:
        return Finding(name, True, f"{path} tells no version", needed_for, "install it anew")
    old = (int(match[1]), int(match[2])) <= _NEWEST_TOO_OLD
    remedy = "install that of QEMU 7.2 or newer" if old else ""
    mode = Path(path).stat().st_mode
    if os.geteuid() == 0 and not mode & stat.S_IXOTH:
        old, remedy = True, f"let everybody run it: chmod a+rx {path}"
    return Finding(name, old, f"{match[0]}, {path}", needed_for, remedy)


def _landlock() -> Finding:
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    needed_for = (
        "keeping qemu-img to the files that it is handed; as root, opening images of root's"
    )
    if version > 0:
        return Finding("Landlock", False, f"version {version}", needed_for)
    off = ctypes.get_errno() == errno.EOPNOTSUPP
    return Finding(
        "Landlock",
        True,
        "is switched off" if off else "this kernel has none",
        needed_for,
        "boot with lsm=landlock,..." if off else "use Linux 5.13 or newer",
    )


def _seccomp() -> Finding:
    needed_for = "keeping qemu-img from the network and from sockets"
    try:
        actions = _SECCOMP.read_text().split()
    except OSError:
        actions = []
    if "errno" in actions:
        return Finding("seccomp", False, f"filters, on {platform.machine()}", needed_for)
    return Finding(
        "seccomp", True, "this kernel has no filters", needed_for, "use one with CONFIG_SECCOMP"
    )


def _state() -> Finding:
    path = state_directory().absolute()
    needed_for = "snapshot, stream, commit, copy, backup, allocate --full, apply, recover"
    name = "state directory"
    shown = printable(path)
    elsewhere = "set QMPBLOCK_STATE to a directory of this user's that survives a reboot"
    try:
        there = StateDirectory.proven() is not None
    except OSError as error:
        return Finding(name, True, f"{shown}: {error.strerror}", needed_for, elsewhere)
    above = path
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        return Finding(
            name, True, f"{shown}: {printable(above)} is no directory", needed_for, elsewhere
        )
    if not os.access(above, os.W_OK | os.X_OK):
        return Finding(
            name, True, f"{shown}: this user may not write to {above}", needed_for, elsewhere
        )
    return Finding(name, False, shown if there else f"{shown}, not there yet", needed_for)


def _temporary() -> Finding:
    name, needed_for = "temporary directory", "map and allocate over a TCP monitor of this host"
    try:
        path = Path(tempfile.gettempdir())
    except OSError as error:
        return Finding(name, True, str(error.strerror), needed_for, "set TMPDIR to one")
    status = path.stat()
    trusted = status.st_uid in (0, os.geteuid()) and (
        status.st_mode & stat.S_ISVTX or not status.st_mode & stat.S_IWOTH
    )
    if not trusted:
        return Finding(
            name,
            True,
            f"{path}: others may remove and replace what lies there",
            needed_for,
            "set TMPDIR to a directory of this user's, or chmod +t that one",
        )
    return Finding(name, False, str(path), needed_for)


def _process(pid: int | None, *, local: bool) -> Finding:
    name, needed_for = "VM's process", f"{_PROVING}; whose the journals are"
    if pid is None:
        return Finding(
            name,
            True,
            "cannot be told: the monitor is reached over TCP, or QEMU runs in another container"
            if not local
            else "cannot be told: QEMU runs in another process namespace",
            needed_for,
            "run qmpblock on the VM's host, by a monitor on a UNIX socket",
        )
    if not OpenFiles(pid).is_qemu:
        return Finding(
            name,
            True,
            f"{describe_process(pid)} made the monitor's socket, and is not seen to be QEMU",
            needed_for,
            "give QEMU a monitor whose socket it makes itself: -qmp unix:PATH,server=on,wait=off",
        )
    try:
        owner = _user(Path(f"/proc/{pid}").stat().st_uid)
    except OSError:
        owner = "a user who cannot be told"
    return Finding(name, False, f"{pid}, of {owner}; this is {_user(os.geteuid())}", needed_for)


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"


def _open_files(files: OpenFiles) -> Finding:
    if files.blind is None:
        return Finding("VM's open files", False, "can be seen", _PROVING)
    return Finding(
        "VM's open files",
        True,
        files.blind,
        _PROVING,
        "run as the VM's user (unless QEMU has -runas), as root, or with the capabilities "
        "SYS_PTRACE and DAC_READ_SEARCH (docs/privileges.md)",
    )


def _images(files: OpenFiles, disk: str, layers: tuple[Layer, ...]) -> Iterator[Finding]:
    """Look at the files of a chain, and at the directory of the active one."""
    for layer in layers:
        if layer.storage is None or layer.storage.driver not in ("file", "host_device"):
            continue  # on another host: nothing of it is looked for here
        name = f"{disk} @{layer.depth}"
        place = files.place(layer.storage)
        file = printable(layer.file)
        if not isinstance(place, Place):
            yield Finding(
                name, True, f"{file} {place.reason}", "snapshot, stream, commit", _GIVE_BACK
            )
            continue
        needed_for = "map --layers, commit and stream of what lies above it"
        mode = os.R_OK
        if layer.depth == 0:
            needed_for, mode = "recover IMAGE, allocate --full of raw images", os.R_OK | os.W_OK
        if not os.access(place.here, mode):
            yield Finding(
                name,
                True,
                f"{file}: this user may not {'write to' if layer.depth == 0 else 'read'} it",
                needed_for,
                "join the group of the images, or run as the VM's user",
            )
        else:
            yield Finding(name, False, file, needed_for)
        if layer.depth == 0:
            yield _home(files.pid, disk, Path(place.here).parent)


_GIVE_BACK = "give the file its name back"


def _home(pid: int | None, disk: str, directory: Path) -> Finding:
    name, needed_for = f"{disk} directory", "commit of the active layer, allocate --full of qcow2"
    shown = printable(directory)
    why = sees_directory(pid, str(directory))
    if why is not None and why != NOWHERE:
        return Finding(name, True, f"{shown} {why}", needed_for, "make it the same for both")
    if not os.access(directory, os.W_OK | os.X_OK):
        return Finding(
            name,
            True,
            f"{shown}: this user may not write to it",
            needed_for,
            "let the group of the images write to it (chmod g+rwxs), and join that",
        )
    return Finding(name, False, shown, needed_for)
