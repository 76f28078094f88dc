"""How a new image of a running VM gets its header: from qemu-img, not from the VM.

QEMU can make an image by itself (`blockdev-create`), but it opens what it has just made, in a
job, and on QEMU 7.2 anybody's query meanwhile makes it abort (K11). So qemu-img makes
the header, in memory; its bytes are in the file before that has a name, and QEMU only opens it
(`blockdev-add`). Every option is given, so that the image does not depend on the version of
qemu-img, and is what QEMU's own job would make.

Where the file is on another host, the bytes go there through a private NBD export of its node.

Where qemu-img cannot do it, QEMU's job does, if this QEMU survives that; else it is refused. On
a QEMU that does, its job is also what makes images on another host.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qmpblock.errors import UNTOUCHED, UnsupportedError
from qmpblock.export.session import check_access
from qmpblock.host.contents import Contents
from qmpblock.host.qemuimg import QemuImg
from qmpblock.qemu.keys import read_keys

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["CLUSTER", "Header", "by_qemu_img", "make"]

CLUSTER = 64 << 10
"""Bytes of a cluster, where nothing else is asked for: QEMU's default of qcow2 and QED."""

_REMEDY = "run qmpblock on the VM's host, by a UNIX monitor, as a user who may read the key"
_QCOW2: dict[str, str | int] = {
    "compat": "1.1",
    "lazy_refcounts": "off",
    "refcount_bits": 16,
    "extended_l2": "off",
    "compression_type": "zlib",
}
_LUKS: dict[str, str | int] = {
    "encrypt.format": "luks",
    "encrypt.cipher-alg": "aes-256",
    "encrypt.cipher-mode": "xts",
    "encrypt.ivgen-alg": "plain64",
    "encrypt.hash-alg": "sha256",
}


@dataclass(frozen=True)
class Header:
    """What a new image is to be.

    :ivar format: `qcow2` or `qed`.
    :ivar size: of the disk, in bytes.
    :ivar backing: the name and the format to record of its backing image; None for none.
    :ivar cluster: in bytes.
    :ivar key_secret: the id of the secret object that encrypts it.
    :ivar data_elsewhere: whether whoever opens it names another file for its data (qcow2).
    :ivar preallocated: whether it has a place for each cluster in its file, which is as long then
        (qcow2); what is there reads as zeros, where it is not encrypted.
    """

    format: str
    size: int
    backing: tuple[str, str] | None = None
    cluster: int = CLUSTER
    key_secret: str | None = None
    data_elsewhere: bool = False
    preallocated: bool = False

    def options(self, key: str) -> dict[str, str | int]:
        """Return the options for qemu-img.

        :param key: the id of the secret object that encrypts the image, there.
        """
        options: dict[str, str | int] = {"cluster_size": self.cluster}
        if self.format == "qcow2":
            options |= _QCOW2
        if self.preallocated:
            options["preallocation"] = "metadata"
        if self.key_secret is not None:
            options |= _LUKS | {"encrypt.key-secret": key}
        return options

    def job(self, storage: str) -> dict[str, Any]:
        """Return the options for blockdev-create.

        :param storage: the node of the image's file.
        """
        options: dict[str, Any] = {
            "driver": self.format,
            "file": storage,
            "size": self.size,
            "cluster-size": self.cluster,
        }
        if self.preallocated:
            options["preallocation"] = "metadata"
        if self.backing is not None:
            options["backing-file"], options["backing-fmt"] = self.backing
        if self.key_secret is not None:
            options["encrypt"] = {"format": "luks", "key-secret": self.key_secret}
        return options


async def by_qemu_img(vm: Connection, key_secret: str | None, *, local: bool) -> bool:
    """Whether qemu-img makes images for this VM; if not, QEMU itself does, by a job.

    :param key_secret: the id of the secret object that encrypts the image.
    :param local: whether the image's file is made by this process, not by QEMU.
    :raise UnsupportedError: neither is possible, or neither is safe.
    """
    job_is_safe = not vm.capabilities.create_jobs_endanger_queries
    if not local and job_is_safe:
        return False
    try:
        await _check(vm, key_secret, local=local)
    except UnsupportedError as error:
        if job_is_safe:
            return False
        error.message = (
            f"an overlay cannot be made safely: {error.message}. QEMU can make it by itself, but "
            f"QEMU {vm.capabilities} aborts if anybody asks it for its block nodes meanwhile"
        )
        error.standing = UNTOUCHED
        error.remedy = f"{error.remedy or _REMEDY}; or use QEMU 10.0 or newer"
        raise
    return True


async def _check(vm: Connection, key_secret: str | None, *, local: bool) -> None:
    """Refuse what qemu-img cannot do."""
    program = QemuImg().program
    if shutil.which(program) is None:
        raise UnsupportedError(
            f"there is no {program} on this host", remedy="install it (Debian: qemu-utils)"
        )
    if key_secret is not None:
        await read_keys(vm.monitor, key_secret)
    if not local:
        await check_access(vm.monitor, vm.nbd)


async def make(vm: Connection, header: Header) -> Contents:
    """Make an image in memory.

    Cancelling leaves nothing.

    :raise UnsupportedError: its key cannot be had.
    :raise ToolError: qemu-img failed.
    """
    keys = () if header.key_secret is None else await read_keys(vm.monitor, header.key_secret)
    return await QemuImg(stall=vm.stall).create(
        header.format,
        header.size,
        header.options(f"key{len(keys) - 1}"),
        backing=header.backing,
        keys=keys,
        data_elsewhere=header.data_elsewhere,
    )
