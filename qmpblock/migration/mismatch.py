"""Kinds of mismatches between the two ends of a migration: when QEMU would notice, what it means.

One table, for what is said to people and for docs/migration.md. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["KINDS", "Kind"]

_AT_ONCE = "at once"
_AT_END_OF_COPY = "at the end of the copy"
_WITH_MEMORY = "when the memory is sent"
_AT_SWITCH = "at the hand-over, while the guest stands"
_NEVER = "never"

_DIES = "the destination ends with an error, and with it what was copied to it"
_STANDS = (
    "all is copied by then, and the guest stands; the source goes on, where return-path is on, and "
    "the destination ends"
)
_ABI = "the guest goes on, on hardware that it did not start on"


@dataclass(frozen=True)
class Kind:
    """One kind of mismatch.

    :ivar what: differs, in a few words.
    :ivar noticed: when QEMU itself would notice.
    :ivar otherwise: what would happen.
    :ivar remedy: what to do.
    :ivar refused: whether nothing is begun; else it is a warning.
    """

    what: str
    noticed: str
    otherwise: str
    remedy: str
    refused: bool = True


_REBUILD = (
    "start the destination as the source is (qmpblock migrate --command-line SOURCE prints how)"
)

#: By the name that a finding has.
KINDS: Mapping[str, Kind] = {
    "source-state": Kind(
        "the source is not in a state to be migrated",
        _AT_ONCE,
        "the source refuses to migrate, or its guest is elsewhere already",
        "migrate the VM in which the guest is, when nothing else migrates or saves it",
    ),
    "source-blocked": Kind(
        "something in the source forbids migration",
        _AT_ONCE,
        "the source refuses to migrate",
        "take away what the message names",
    ),
    "source-job": Kind(
        "a background job runs on a disk of the source",
        _AT_ONCE,
        "the source refuses to mirror the disk, or the job ends with the source",
        "wait for the job, or cancel it",
    ),
    "destination-state": Kind(
        "the destination waits for no migration",
        _AT_ONCE,
        "it takes none; a guest may run in it",
        "start it with -S -incoming defer",
    ),
    "destination-listens": Kind(
        "the destination has begun to wait at an address already",
        _AT_ONCE,
        "it can be told no other address, and whoever connects there first ends it",
        "start it anew with -incoming defer",
    ),
    "destination-runs": Kind(
        "the destination was not started with -S",
        _NEVER,
        "it runs by itself as soon as it has everything; where the last acknowledgement is lost "
        "both guests run then",
        "start it with -S; where nothing tells whether it was, see to it",
    ),
    "machine-unknown": Kind(
        "the destination's QEMU does not know the machine type",
        _WITH_MEMORY,
        _DIES,
        "use a QEMU at the destination that knows it: one that is no older than the source's",
    ),
    "machine": Kind("the machine type", _WITH_MEMORY, _DIES, _REBUILD),
    "machine-options": Kind("options of the machine", _NEVER, _ABI, _REBUILD),
    "older": Kind(
        "the destination's QEMU is older",
        _AT_SWITCH,
        "where the source sends what the destination does not know, " + _STANDS,
        "use a QEMU at the destination that is no older than the source's",
        refused=False,
    ),
    "uuid": Kind("the UUID", _NEVER, "the guest's next start finds another system", _REBUILD),
    "memory": Kind("the size of the memory", _WITH_MEMORY, _DIES, _REBUILD),
    "memory-blocks": Kind("blocks of memory", _WITH_MEMORY, _DIES, _REBUILD),
    "cpus": Kind("number or places of the CPUs", _AT_SWITCH, _STANDS, _REBUILD),
    "cpu": Kind(
        "what the CPUs can do",
        _NEVER,
        "the guest goes on, and fails when it uses what is not there any more",
        "give both the same -cpu, by name: of -cpu host each host makes what it can",
    ),
    "cpu-name": Kind(
        "the CPU model's name, not what it can do",
        _NEVER,
        "nothing now; another version of QEMU may have the models differ",
        "give both the same -cpu",
        refused=False,
    ),
    "device-missing": Kind("a device that the destination has not", _AT_SWITCH, _STANDS, _REBUILD),
    "device-extra": Kind(
        "a device that only the destination has",
        _NEVER,
        "the guest finds it, sooner or later, though nobody plugged it in",
        _REBUILD,
    ),
    "device-type": Kind("what is at an address", _AT_SWITCH, _STANDS, _REBUILD),
    "device-features": Kind("features of a device", _AT_SWITCH, _STANDS, _REBUILD),
    "device-queues": Kind("queues of a device", _AT_SWITCH, _STANDS, _REBUILD),
    "device-properties": Kind("properties of a device", _NEVER, _ABI, _REBUILD),
    "device-id": Kind(
        "the id of a device",
        _NEVER,
        "nothing for the guest; but who manages the VM finds nothing under the old name",
        "give it the same id",
        refused=False,
    ),
    "disk-iothread": Kind(
        "whether a disk runs in an iothread",
        _NEVER,
        "nothing for the guest, but for the speed",
        "have it run in an iothread at both ends, or at none",
        refused=False,
    ),
    "disk-place": Kind(
        "a disk of which cannot be told where the guest finds it",
        _NEVER,
        "which disk is which at the other end cannot be told",
        "give its device an id at both ends",
    ),
    "disk-size": Kind(
        "the size of a disk",
        _AT_END_OF_COPY,
        "the copy fails when all is copied; with shared storage the guest writes past the end",
        "make the destination's image of the very same size, to the byte",
    ),
    "disk-read-only": Kind(
        "a disk that can be written to at one end only",
        _NEVER,
        "the copy cannot be written, or the guest's writes fail there",
        "open the image in the same way at both ends",
    ),
    "disk-medium": Kind(
        "a medium that is in a drive at one end only",
        _NEVER,
        "the guest finds another medium, or none",
        "insert or eject it",
    ),
    "disk-same": Kind(
        "an image that the source uses itself, where disks are copied",
        _NEVER,
        "the disk is copied onto itself under the guest, and destroyed",
        "give the destination an image of its own; or migrate the memory alone",
    ),
    "backing-missing": Kind(
        "an image that lies on none, where only the active layer is copied onto it",
        _NEVER,
        "the guest reads zeros where the layers below the active one hold data",
        "give the destination a qcow2 image that lies on the disk's own backing image "
        "(qmpblock migrate --command-line SOURCE --layers top prints how); or copy all layers",
    ),
    "backing-size": Kind(
        "the size of what an image lies on, where only the active layer is copied onto it",
        _NEVER,
        "the guest reads what is not there, or what the shorter one hides",
        "have it lie on the very same image, or on a copy of that; or copy all layers",
    ),
    "backing-unproven": Kind(
        "what an image lies on, where only the active layer is copied onto it",
        _NEVER,
        "where it holds anything else the guest reads that, from its first moment there on",
        "have it lie on the very same files; or see that it lies on a copy of them (qmpblock "
        "verify IMAGE IMAGE), and say so (--same-backing); or copy all layers",
    ),
    "backing-unnamed": Kind(
        "an image whose header does not say what it lies on",
        _NEVER,
        "whoever opens it by its name alone finds nothing of what lies below",
        "write it there, when the VM has ended: qemu-img rebase -u -b BACKING -F FORMAT IMAGE",
        refused=False,
    ),
    "disk-apart": Kind(
        "different images, where none is copied",
        _NEVER,
        "the guest goes on, on a disk that is another one",
        "give both the same image; or have the disks copied, too",
    ),
    "disk-shared": Kind(
        "a disk to which others may write (share-rw=on), where it is copied",
        _NEVER,
        "what another VM writes to its image is missing in the copy",
        "give the device share-rw=off if nobody else writes; or migrate the memory alone, on "
        "storage that both have",
    ),
    "disk-plaintext": Kind(
        "a disk that is encrypted at the source only",
        _NEVER,
        "its plaintext would be stored",
        "make the destination's image encrypted, too",
    ),
    "disk-filled": Kind(
        "a raw image of which nothing is given back (discard=ignore), before QEMU 10.0",
        _NEVER,
        "the copy takes the disk's whole size",
        "open it with discard=unmap, node and file",
        refused=False,
    ),
    "space": Kind(
        "host space that is asked for, and that an image cannot have",
        _NEVER,
        "zeros have host space there that they were not to have, or have none",
        "make the image anew, preallocated (qemu-img create -o preallocation=falloc), or open it "
        "with discard=unmap and detect-zeroes=off; or leave --allocation out",
    ),
    "bitmap-lost": Kind(
        "a persistent dirty bitmap, and an image that cannot store one",
        _NEVER,
        "it is lost when the destination ends; what makes increments by it misses changes",
        "make the destination's image qcow2, or remove the bitmap",
    ),
    "bitmap-exists": Kind(
        "a dirty bitmap of a name that the destination's disk has already",
        _AT_SWITCH,
        _STANDS,
        "remove it there, or make the image anew",
    ),
    "bitmap-unusable": Kind(
        "a dirty bitmap that is in use, or inconsistent",
        _AT_ONCE,
        "the source refuses to migrate its bitmaps",
        "wait for what uses it; remove one that is inconsistent",
    ),
    "bitmap-left": Kind(
        "a dirty bitmap of a lower layer, or of an image that can only be read",
        _NEVER,
        "it stays behind: the destination has no such layer, or the image itself has it",
        "copy what it tells of before, if that is needed",
        refused=False,
    ),
    "snapshot-left": Kind(
        "internal snapshots (savevm) of a disk that is copied",
        _NEVER,
        "they stay in the image at the source, and cannot be loaded at the destination",
        "copy what they hold before, if that is needed: qemu-img convert -l",
        refused=False,
    ),
    "capability-unknown": Kind(
        "a capability that is needed and not known",
        _AT_ONCE,
        "it cannot be switched on, and without it a migration is not safe",
        "use QEMU 7.2 or newer at both ends",
    ),
    "capability-differs": Kind(
        "a capability that has to be the same at both ends",
        _WITH_MEMORY,
        _DIES,
        "set it alike: migrate-set-capabilities",
    ),
    "room": Kind(
        "room for what is copied",
        "when it runs full",
        "the copy fails when much is copied",
        "make room at the destination, or place its images elsewhere",
    ),
}
