"""A kernel and an initramfs for the Linux guest, from Debian packages of this machine's apt.

Debian's cloud kernel and its static busybox are downloaded by name, unpacked, and kept in
the cache: they are not ours to commit. Nothing is installed and no root is needed. Without
apt or without a network there is no Linux guest, and `LinuxUnavailableError` says why.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpblock.errors import Error, printable

__all__ = ["Boot", "LinuxUnavailableError", "build", "default_cache"]

KERNEL_PACKAGE = "linux-image-cloud-amd64"  # depends on the kernel of the day
BUSYBOX_PACKAGE = "busybox-static"
MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "button", "evdev")

INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /dev /proc /sys /tmp /mnt
/bin/busybox --install -s /bin
export PATH=/bin HOME=/
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in $(cat /modules/order); do insmod /modules/$module; done

# ACPI's power button is an input device; the first event on it is a press.
for event in /sys/class/input/event*; do
  if grep -q 'Power Button' $event/device/name; then
    (dd if=/dev/input/${event##*/} of=/dev/null bs=24 count=1 2>/dev/null; sync; poweroff -f) &
  fi
done

# A raw line: no echo, no limit on the length of a line, nothing translated.
stty -F /dev/ttyS0 raw -echo clocal
exec </dev/ttyS0 >/dev/ttyS0 2>&1
echo "*READY $(uname -r)"
while read -r number command; do
  echo "$command" | base64 -d >/tmp/command
  sh /tmp/command </dev/null >/tmp/output 2>&1
  code=$?
  tail -c OUTPUT_LIMIT /tmp/output | base64 | sed 's/^/|/'
  echo "OK $number $code"
done
"""
"""The guest's first and only program. A command comes as one line, `NUMBER BASE64`; its
output goes back as lines of `|BASE64`, and then `OK NUMBER EXIT-CODE`."""

OUTPUT_LIMIT = 64 << 10
"""Bytes of a command's output that come back, from its end."""

_TIMEOUT = 300.0  # seconds for one of apt's programs


class LinuxUnavailableError(Error):
    """There can be no Linux guest here; the message says why, for a skipped test."""


@dataclass(frozen=True, slots=True)
class Boot:
    """What QEMU boots: a bzImage and an initramfs."""

    kernel: Path
    initrd: Path


def default_cache() -> Path:
    """Return the cache: `$QMPBLOCK_CACHE`, else `qmpblock` in the user's cache folder."""
    if own := os.environ.get("QMPBLOCK_CACHE"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qmpblock"


def build(folder: Path) -> Boot:
    """Return the kernel and initramfs in `folder`, made first where there is none.

    What is there is used as it is, without apt. The folder's name tells which INIT and
    MODULES it was made with, so another version of this module makes another. The caller
    holds a lock. Blocks for seconds.

    :raise LinuxUnavailableError: the packages cannot be had, or lack something.
    """
    recipe = hashlib.sha256("\0".join((INIT, str(OUTPUT_LIMIT), *MODULES)).encode())
    place = folder / f"boot-{recipe.hexdigest()[:12]}"
    boot = Boot(place / "vmlinuz", place / "initrd")
    if boot.initrd.exists():
        return boot
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as name:
        root, ready = Path(name) / "root", Path(name) / "ready"
        _unpack(_kernel_package(), BUSYBOX_PACKAGE, folder=Path(name), root=root)
        ready.mkdir()
        shutil.copy(_only(root, "boot/vmlinuz-*"), ready / "vmlinuz")
        busybox = _only(root, "bin/busybox", "usr/bin/busybox")
        (ready / "initrd").write_bytes(initramfs(busybox.read_bytes(), _modules(root)))
        ready.rename(place)
    return boot


# --- packages ------------------------------------------------------------------------------


def _run(command: Sequence[str | Path], folder: Path | None = None) -> str:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=_TIMEOUT,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except FileNotFoundError as error:
        raise LinuxUnavailableError(
            f"the Linux guest needs {words[0]}, as Debian has it"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LinuxUnavailableError(f"{words[0]} took longer than {_TIMEOUT:g} s") from error
    except subprocess.CalledProcessError as error:
        raise LinuxUnavailableError(
            f"{' '.join(words)} failed: {printable(error.stderr.strip())}",
            remedy="run `apt-get update`; packages that apt still knows may be gone",
        ) from error
    return done.stdout


def kernel_of(depends: str) -> str | None:
    """Read the kernel's package from what `apt-cache depends` says of the metapackage."""
    match = re.search(r"^\s*Depends: (linux-image-\d\S*)$", depends, re.MULTILINE)
    return match[1] if match else None


def _kernel_package() -> str:
    package = kernel_of(_run(["apt-cache", "depends", KERNEL_PACKAGE]))
    if package is None:
        raise LinuxUnavailableError(
            f"apt knows no package {KERNEL_PACKAGE}", remedy="run `apt-get update`"
        )
    return package


def _unpack(*packages: str, folder: Path, root: Path) -> None:
    _run(["apt-get", "download", "-q", *packages], folder)
    for archive in sorted(folder.glob("*.deb")):
        _run(["dpkg-deb", "-x", archive, root])


def _only(root: Path, *patterns: str) -> Path:
    paths = [path for pattern in patterns for path in root.glob(pattern)]
    if len(paths) != 1:
        raise LinuxUnavailableError(f"the packages hold {len(paths)} files {' or '.join(patterns)}")
    return paths[0]


# --- modules and the initramfs -------------------------------------------------------------


def _modules(root: Path) -> dict[str, bytes]:
    """Read MODULES and what they depend on, in the order of loading."""
    paths = {
        path.name.partition(".")[0].replace("-", "_"): path
        for pattern in ("*.ko", "*.ko.xz")
        for path in root.glob(f"**/modules/*/kernel/**/{pattern}")
    }
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in loaded or name not in paths:
            return  # built into the kernel
        content = paths[name].read_bytes()
        if paths[name].suffix == ".xz":
            content = lzma.decompress(content)
        for needed in dependencies(content):
            load(needed)
        loaded[name] = content

    for name in MODULES:
        load(name)
    return loaded


def dependencies(module: bytes) -> list[str]:
    """Read the modules that a kernel module needs, from `depends=` in its .modinfo."""
    match = re.search(rb"\0depends=([\w,-]*)\0", module)
    names = match[1].decode() if match else ""
    return [name.replace("-", "_") for name in names.split(",") if name]


def initramfs(busybox: bytes, modules: Mapping[str, bytes]) -> bytes:
    """Pack the guest's root file system: busybox, modules in their order, INIT."""
    files = {
        "bin/busybox": busybox,
        "init": INIT.replace("OUTPUT_LIMIT", str(OUTPUT_LIMIT)).encode(),
        "modules/order": "".join(f"{name}.ko\n" for name in modules).encode(),
        **{f"modules/{name}.ko": content for name, content in modules.items()},
    }
    return cpio(["bin", "dev", "modules"], files)


def cpio(folders: Iterable[str], files: Mapping[str, bytes]) -> bytes:
    """Pack a newc archive, as the kernel's initramfs takes it, with /dev/console in it.

    The form: Documentation/driver-api/early-userspace/buffer-format.rst in the kernel.
    """
    entries = [(name, 0o040755, b"", (0, 0)) for name in folders]
    entries += [(name, 0o100755, content, (0, 0)) for name, content in files.items()]
    entries += [("dev/console", 0o020600, b"", (5, 1)), ("TRAILER!!!", 0, b"", (0, 0))]
    packed = bytearray()
    for inode, (name, mode, content, device) in enumerate(entries, start=1):
        path = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
        packed += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        packed += bytes(-len(packed) % 4) + content
        packed += bytes(-len(packed) % 4)
    return bytes(packed)
