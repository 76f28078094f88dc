"""Names of all that we make in a VM and on its host: given here, and read back here. Pure.

By its name whoever finds a thing tells that it is ours, of which run, and what it is for: the next
controller, of whatever version, and a person at night. So no name ever changes, and nothing else
makes one, or looks into one. RUN is 8 random hex digits, new for each use; N counts from 0::

    in a VM, objects      qmpblock-disk-DEVICE       lock of a disk, by its qdev id; by -HASH of its
                                                     path in QEMU's object tree where it has none
                          qmpblock-ahead-DEVICE      lock of the watcher of a disk's room
                          qmpblock-nbd               lock of QEMU's NBD server
                          qmpblock-polling           lock under which guards come and go
                          qmpblock-migration         lock of a VM that leaves, or is to come
                          qmpblock-backup-SET        lock of a VM whose disks are backed up into
                                                     the directory SET; RUN-like, as POINT is
                          qmpblock-RUN-handover      at a migration's source: its arbiter; at the
                                                     destination: says that it decided for that
                          qmpblock-poll-RUN          guard: meanwhile no iothread polls
                          LOCK-undo-RUN              turn: whose it is to undo what RUN, which
                                                     died, left of that lock
                          qmpblock-RUN-tls           credentials of an NBD server of ours
                          qmpblock-RUN-N-wire-tls    credentials for the wire to target N
                          qmpblock-RUN-memory-wire-tls
                                                     for disks and memory of a VM that migrates
    jobs                  qmpblock-RUN-stream        a stream
                          qmpblock-RUN-commit        a commit of frozen layers
                          qmpblock-RUN-pivot         a commit of the active layer
                          qmpblock-RUN-create-N      has QEMU make an image
                          qmpblock-RUN-copy-N        copies disk N of a copy
                          qmpblock-RUN-migrate-N     mirrors disk N of a VM that is migrated
                          qmpblock-RUN-measure       sends nothing, to measure a migration's wire
                          qmpblock-RUN-z             has zeros stored as data
    nodes                 qmpblock-RUN-N             overlay N
                          qmpblock-RUN-N-file        its storage
                          qmpblock-RUN-to-N, -to-N-image, -to-N-file
                                                     what disk N is copied to
                          qmpblock-RUN-to-N-left     on which is drawn what of it is left to copy
                          qmpblock-RUN-z, -window, -view, -filter, -kept, -kept-file
                                                     for zeros to be stored (`allocation.filling`)
                          qmpblock-RUN-joint         by which these lie on the image
                          qmpblock-RUN-N-w           holds the right to write for export N,
                          qmpblock-RUN-N-w-j         by this joint
                          JOINT-null                 what a joint lies on at first
                          qmpblock-RUN-no-migration  has QEMU migrate nothing
                          qmpblock-RUN-N-wire        the wire to target N of a copy, by NBD
                          qmpblock-RUN-N-view, -filter, -kept
                                                     disk N as it was (`copying.fleecing`)
                          qmpblock-RUN-null          what measuring a migration's wire reads, and
                                                     what it writes to: nothing
                          qmpblock-RUN-paused        meanwhile the VM is paused by us
                          qmpblock-RUN-stopped       at a migration's source: the guest had
                                                     stopped, and is to stay so
    exports               qmpblock-RUN-N             export N, and its export name
    named descriptors     qmpblock-RUN-N             our end of its connection
                          qmpblock-RUN-listen        listening socket
                          qmpblock-RUN-stream        an end of the connection by which a VM migrates
                          qmpblock-RUN-no-migration  image of that node, also its memfd; after it
                                                     that of -to-N-left, whose memfd is called so
    dirty bitmaps         qmpblock-RUN-BITMAP        becomes BITMAP once its node is writable
                          qmpblock-RUN-to-N-left     what of disk N is left to copy
                          qmpblock-RUN-to-N-even, -to-N-odd
                                                     what the guest writes to disk N meanwhile
                          qmpblock-backup-SET-POINT-N
                                                     stays: what the guest writes to disk N from
                                                     backup POINT on
                          qmpblock-backup-SET-POINT-N-end
                                                     stays: tells whether that is all of it
                          qmpblock-backup-SET-POINT-N-open
                                                     stays while QEMU has the image open

    on a host, files      IMAGE.qmpblock-RUN         temporary overlay of an allocation
                          OVERLAY-z, OVERLAY-k       beside it: zeros; what the filter keeps
                          IMAGE.qmpblock-RUN-fleece-N
                                                     what disk N held when it was written to
                          TARGET.partial             what is to be TARGET once it is whole
                          WHEN-DISK.qcow2            in a directory of backups, and only there:
                                                     a disk as it was
                          WHEN.json                  the backup that it is of: it is made
                          WHEN.begun                 that one was begun
                          .qmpblock-backup.lock      held by whoever makes one
                          IMAGE.qmpblock-RUN.journal
                          IMAGE.qmpblock-RUN.elsewhere
                                                     empty: that journal is not here
                          UUID-PID-START-WHICH-RUN.journal
                                                     in the state directory: of which QEMU process;
                                                     WHICH is a hash of the paths of its disks
                          UUID-PID-START-RUN.migration
                                                     likewise, of a migration: of its source
    sockets               TMPDIR/qmpblock-RUN/nbd    of an NBD server of ours
                          TMPDIR/qmpblock-RUN-N-wire/nbd
                                                     of the relay on that wire
                          TMPDIR/qmpblock-RUN-memory-wire/nbd
                                                     of the relays of a VM's memory, by several
                                                     channels
                          TMPDIR/qmpblock-RUN-arrival-wire/nbd
                                                     where its destination waits for them
                          TMPDIR/qmpblock-RUN-WHAT/nbd
                                                     of an ssh to another host's socket, WHAT being
                                                     monitor, nbd or stream; gone once it listens
                          DIRECTORY/qmpblock-RUN-nbd, -stream
                                                     on that host, beside the monitor: of QEMU
                          TMPDIR/qmpblock-read-.../nbd
                                                     of a server through which a closed image is
                                                     read; gone before that begins
    directories           TMPDIR/qmpblock-demo-...   of `qmpblock demo`
                          TMPDIR/qmpblock-vm-...     sockets and log of a VM that we started

What says more than a name can (a lock's data, a journal) is told by whoever writes it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from enum import Enum
from pathlib import PurePath
from typing import Protocol

__all__ = [
    "BACKUP_LOCK_FILE",
    "DEMO_FOLDER",
    "MIGRATION_LOCK",
    "NBD_LOCK",
    "OURS",
    "POLLING_LOCK",
    "READ_FOLDER",
    "SOCKET",
    "VM_FOLDER",
    "Device",
    "LockKind",
    "ahead_lock_name",
    "arrival_wire",
    "backup_bitmap",
    "backup_lock_name",
    "backup_when",
    "backups_of",
    "begun_file",
    "blocker_name",
    "commit_job",
    "copy_job",
    "create_job",
    "credentials_name",
    "elsewhere_beside",
    "end_bitmap",
    "export_name",
    "filling_job",
    "filling_nodes",
    "fleecing_file",
    "fleecing_nodes",
    "forward_folder",
    "forwarded_socket",
    "guard_name",
    "handover_name",
    "helper_bitmap",
    "holder_node",
    "image_node",
    "is_backup_bitmap",
    "is_beside",
    "is_create_job",
    "is_elsewhere",
    "is_forwarded",
    "is_holders_run",
    "is_migration",
    "is_of_run",
    "is_of_vm",
    "is_ours",
    "is_pivot",
    "is_run",
    "is_socket",
    "is_socket_of",
    "is_turn_of",
    "is_when",
    "joint_node",
    "joint_nodes",
    "journal_beside",
    "journal_in_state",
    "kept_file",
    "left_bitmap",
    "listener_name",
    "lock_kind",
    "lock_name",
    "lock_names",
    "lock_of_turn",
    "measuring_job",
    "migration_in_state",
    "migration_job",
    "new_run",
    "null_node",
    "open_bitmap",
    "overlay_file",
    "overlay_node",
    "partial_file",
    "paused_node",
    "pivot_job",
    "point_file",
    "prefix_of_run",
    "run_of",
    "run_of_journal",
    "socket_folder",
    "stopped_node",
    "storage_node",
    "stream_job",
    "stream_socket",
    "stream_wire",
    "target_node",
    "turn_name",
    "wire_credentials",
    "wire_node",
    "written_bitmaps",
    "zeros_file",
]

#: What the name of everything of ours begins with, in a VM and in the temporary directory.
OURS = "qmpblock-"
#: The lock of QEMU's NBD server, of which a VM has one.
NBD_LOCK = f"{OURS}nbd"
#: The lock under which guards come and go.
POLLING_LOCK = f"{OURS}polling"
#: The lock of a VM that is migrated, at either side: it leaves, or is to come, once at a time.
MIGRATION_LOCK = f"{OURS}migration"
#: The name of a socket of ours, in a directory of its own.
SOCKET = "nbd"
#: The name of the file that whoever makes a backup holds a lock of, in the directory of backups.
BACKUP_LOCK_FILE = f".{OURS}backup.lock"
#: What the directory of a demonstration begins with.
DEMO_FOLDER = f"{OURS}demo-"

#: What the directory of a VM begins with that waits for a migration.
VM_FOLDER = f"{OURS}vm-"
READ_FOLDER = f"{OURS}read-"
"""Prefix of the directory for the socket of a server through which a closed image is read."""

_DISK_LOCKS = f"{OURS}disk-"
_AHEAD_LOCKS = f"{OURS}ahead-"
_BACKUPS = f"{OURS}backup-"
_GUARDS = f"{OURS}poll-"
_TURN = "-undo-"
_BESIDE = f".{OURS}"
_JOURNAL = ".journal"
_ELSEWHERE = ".elsewhere"
_MIGRATION = ".migration"
_POINT = ".json"
_BEGUN = ".begun"
_END = "-end"
_OPEN = "-open"
_WHEN = re.compile(r"[0-9]{8}T[0-9]{6}Z(-[0-9]+)?")

_RUN = re.compile(r"[0-9a-f]{8}")
_HOLDERS_RUN = re.compile(r"[0-9a-z]{1,32}")
_OF_A_RUN = re.compile(rf"{OURS}({_RUN.pattern})-(.+)")
_A_TURN = re.compile(rf"(.+?){_TURN}[0-9a-z]+")
_A_JOURNAL = re.compile(
    rf".*?[.-]({_RUN.pattern})(?:{re.escape(_JOURNAL)}|{re.escape(_ELSEWHERE)})",
    re.DOTALL,
)


class Device(Protocol):
    """What a guest's disk goes by in QEMU."""

    @property
    def id(self) -> str | None:
        """Its qdev id."""

    @property
    def qom_path(self) -> str:
        """Its path in QEMU's object tree."""


class Process(Protocol):
    """Which QEMU process it is."""

    @property
    def uuid(self) -> str:
        """Of the VM; zeros where it has none."""

    @property
    def pid(self) -> int:
        """Its process id; 0 where it is unknown."""

    @property
    def start(self) -> int:
        """When it began, in clock ticks since boot; 0 where it is unknown."""


# -- whose


def new_run() -> str:
    """Return a run id that nobody has."""
    return secrets.token_hex(4)


def is_run(text: str) -> bool:
    """Whether it is the id of a run, as `new_run` makes them."""
    return _RUN.fullmatch(text) is not None


def is_holders_run(text: str) -> bool:
    """Whether it can be the run of a lock's holder, of whatever version."""
    return _HOLDERS_RUN.fullmatch(text) is not None


def is_ours(name: str) -> bool:
    """Whether an object, job, node or export is one of ours."""
    return name.startswith(OURS)


def prefix_of_run(run: str) -> str:
    """Return what the name of all that a run makes in a VM begins with; locks have their own."""
    return f"{OURS}{run}-"


def is_of_run(name: str, run: str) -> bool:
    """Whether a job, node, export or bitmap was made by that run."""
    return name.startswith(prefix_of_run(run))


def run_of(name: str) -> str:
    """Return the run that made a job or node; empty where none of ours did."""
    match = _OF_A_RUN.fullmatch(name)
    return match[1] if match else ""


# -- locks


class LockKind(Enum):
    """What an object of ours that is a lock, or like one, is about."""

    DISK = "a disk, while it is changed"
    AHEAD = "the room of a disk, while it is watched"
    NBD = "QEMU's NBD server"
    POLLING = "the coming and going of guards"
    GUARD = "iothreads, which do not poll"
    MIGRATION = "the VM, while it is migrated"
    BACKUP = "a directory, while disks are backed up into it"


def lock_name(device: Device) -> str:
    """Return the lock of a disk."""
    return _DISK_LOCKS + _of_device(device)


def lock_names(devices: Iterable[Device]) -> tuple[str, ...]:
    """Return the locks of several disks, in the order in which they are taken."""
    return tuple(sorted(lock_name(device) for device in devices))


def ahead_lock_name(device: Device) -> str:
    """Return the lock of the watcher of a disk's room."""
    return _AHEAD_LOCKS + _of_device(device)


def guard_name(run: str) -> str:
    """Return the guard with which a run has no iothread poll."""
    return _GUARDS + run


def backup_lock_name(backups: str) -> str:
    """Return the lock of a VM whose disks are backed up; `backups`: the id of the directory."""
    return _BACKUPS + backups


def handover_name(run: str) -> str:
    """Return the object that says where the guest goes on: at the source the arbiter itself."""
    return _named(run, "handover")


def lock_kind(name: str) -> LockKind | None:
    """Return what a lock is about; None where it is none of ours.

    A turn about a lock with a disk or a run in its name begins as that does, and is of its kind;
    `lock_of_turn` tells it apart.
    """
    if name in _SINGLE:
        return _SINGLE[name]
    return next((kind for begin, kind in _MANY.items() if name.startswith(begin)), None)


def turn_name(lock: str, dead: str) -> str:
    """Return the turn to undo what the run `dead` left of a lock."""
    return f"{lock}{_TURN}{dead}"


def is_turn_of(name: str, lock: str) -> bool:
    """Whether it is a turn about that lock, of whichever run."""
    return name.startswith(f"{lock}{_TURN}")


def lock_of_turn(name: str) -> str | None:
    """Return the lock, or other turn, that a turn is about; None where it is no turn."""
    match = _A_TURN.fullmatch(name)
    return match[1] if match else None


def _of_device(device: Device) -> str:
    import hashlib

    if device.id is not None:
        return device.id
    return f"-{hashlib.sha256(device.qom_path.encode()).hexdigest()[:12]}"


_SINGLE = {
    NBD_LOCK: LockKind.NBD,
    POLLING_LOCK: LockKind.POLLING,
    MIGRATION_LOCK: LockKind.MIGRATION,
}
_MANY = {
    _DISK_LOCKS: LockKind.DISK,
    _AHEAD_LOCKS: LockKind.AHEAD,
    _GUARDS: LockKind.GUARD,
    _BACKUPS: LockKind.BACKUP,
}

# -- jobs


def stream_job(run: str) -> str:
    """Return the job of a stream."""
    return _named(run, "stream")


def commit_job(run: str) -> str:
    """Return the job of a commit of frozen layers."""
    return _named(run, "commit")


def pivot_job(run: str) -> str:
    """Return the job of a commit of the active layer."""
    return _named(run, "pivot")


def is_pivot(job: str) -> bool:
    """Whether a job of ours ends in a pivot."""
    return job.endswith("-pivot")


def create_job(run: str, number: int) -> str:
    """Return the job by which QEMU makes an image; `number`: of those that the run makes."""
    return _named(run, f"create-{number}")


def is_create_job(job: str) -> bool:
    """Whether a job of ours makes an image."""
    return "-create-" in job


def copy_job(run: str, number: int) -> str:
    """Return the job that copies a disk; `number`: of the disks of that copy."""
    return _named(run, f"copy-{number}")


def migration_job(run: str, number: int) -> str:
    """Return the job that mirrors a disk to a migration's destination; `number`: of its disks."""
    return _named(run, f"migrate-{number}")


def measuring_job(run: str) -> str:
    """Return the job that sends nothing, to measure the wire between a migration's two VMs."""
    return _named(run, "measure")


def null_node(run: str) -> str:
    """Return the node that it reads, at the source, and the one that it ends in, at the other."""
    return _named(run, "null")


def filling_job(run: str) -> str:
    """Return the job by which zeros are stored as data."""
    return _named(run, "z")


# -- nodes, exports, descriptors, bitmaps


def overlay_node(run: str, number: int) -> str:
    """Return the node of an overlay; `number`: of those that the run makes."""
    return _named(run, str(number))


def target_node(run: str, number: int) -> str:
    """Return the node of what a disk is copied to; `number`: of the disks of that copy."""
    return _named(run, f"to-{number}")


def left_bitmap(target: str) -> str:
    """Return the dirty bitmap of what is left to copy to a target's node.

    Also the node on which it is drawn. See `qmpblock.copying.resuming`.
    """
    return f"{target}-left"


def written_bitmaps(target: str) -> tuple[str, str]:
    """Return the dirty bitmaps that take note in turn of what is written to a target's disk.

    See `qmpblock.copying.catchup`.
    """
    return f"{target}-even", f"{target}-odd"


def image_node(target: str) -> str:
    """Return the node of a target's image, where another one is above it."""
    return f"{target}-image"


def storage_node(overlay: str) -> str:
    """Return the node of an overlay's, or target's, file."""
    return f"{overlay}-file"


def filling_nodes(run: str) -> tuple[str, str, str, str, str, str]:
    """Return the nodes by which zeros are stored as data (`qmpblock.allocation.filling`).

    Z, the window, what is seen through the filter, the filter, what it keeps, and the file of that:
    each before those that it lies on.
    """
    return (
        _named(run, "z"),
        _named(run, "window"),
        _named(run, "view"),
        _named(run, "filter"),
        _named(run, "kept"),
        _named(run, "kept-file"),
    )


def joint_node(run: str) -> str:
    """Return the joint by which those lie on the image."""
    return _named(run, "joint")


def joint_nodes(joint: str) -> tuple[str, str]:
    """Return the nodes of a joint, each before what it lies on: itself, and the one over nothing.

    See `qmpblock.qemu.joint`.
    """
    return joint, f"{joint}-null"


def holder_node(export: str) -> tuple[str, str]:
    """Return the node that holds the right to write for an export, and the joint it lies on."""
    return f"{export}-w", f"{export}-w-j"


def fleecing_nodes(run: str, number: int) -> tuple[str, str, str]:
    """Return the nodes by which a disk is seen as it was; `number`: of those of the run.

    The view, the filter that the guest's writes go through, and what that keeps: each before those
    that it lies on. See `qmpblock.copying.fleecing`.
    """
    return (
        _named(run, f"{number}-view"),
        _named(run, f"{number}-filter"),
        _named(run, f"{number}-kept"),
    )


def paused_node(run: str) -> str:
    """Return the node that says that a run has paused the VM, for as long as it is there."""
    return _named(run, "paused")


def stopped_node(run: str) -> str:
    """Return the node that says that a guest that migrates had stopped, and is to stay so."""
    return _named(run, "stopped")


def blocker_name(run: str) -> str:
    """Return the node with which a run keeps the VM where it is; its descriptor is called so too.

    See `qmpblock.changes.nomigration`.
    """
    return _named(run, "no-migration")


def wire_node(run: str, number: int) -> str:
    """Return the node of the wire to a target of a copy, and the directory of its relay's socket.

    :param number: of the targets that the run reaches by NBD.
    """
    return _named(run, f"{number}-wire")


def stream_wire(run: str) -> str:
    """Return what goes for a wire where a VM's memory goes with TLS: its credentials' name has it.

    Where it goes by several channels, also the directory of their relays' socket. There is never a
    node of that name.
    """
    return _named(run, "memory-wire")


def arrival_wire(run: str) -> str:
    """Return the directory of the socket at which a destination waits for several channels."""
    return _named(run, "arrival-wire")


def wire_credentials(wire: str) -> str:
    """Return the object with the TLS credentials for a wire."""
    return f"{wire}-tls"


def export_name(run: str, number: int) -> str:
    """Return an export, also its export name and our connection's; `number`: of the run's."""
    return _named(run, str(number))


def listener_name(run: str) -> str:
    """Return the descriptor of the listening socket that QEMU is handed."""
    return _named(run, "listen")


def stream_socket(run: str) -> str:
    """Return the descriptor by which a VM migrates, at either side."""
    return _named(run, "stream")


def credentials_name(run: str) -> str:
    """Return the object with the TLS credentials of an NBD server of ours."""
    return _named(run, "tls")


def helper_bitmap(run: str, bitmap: str) -> str:
    """Return the transient dirty bitmap that a persistent one begins as."""
    return _named(run, bitmap)


def backup_bitmap(backups: str, point: str, disk: int) -> str:
    """Return the dirty bitmap of what the guest writes to a disk from a backup on, which stays.

    Each disk's is called otherwise: two images may have changed places at the next backup.

    :param backups: the id of the directory; `point`: that of the backup; `disk`: the number of the
        disk in it.
    """
    return f"{_BACKUPS}{backups}-{point}-{disk}"


def end_bitmap(bitmap: str) -> str:
    """Return the dirty bitmap, of a disk's end alone, that vouches for that one."""
    return f"{bitmap}{_END}"


def open_bitmap(bitmap: str) -> str:
    """Return the dirty bitmap that is there as long as QEMU has the image of that one open."""
    return f"{bitmap}{_OPEN}"


def backups_of(lock: str) -> str:
    """Return the id of the directory of backups that a lock is of (`backup_lock_name`)."""
    return lock.removeprefix(_BACKUPS)


def is_backup_bitmap(name: str, backups: str) -> bool:
    """Whether a dirty bitmap is of a backup in that directory, or vouches for something of one."""
    return name.startswith(f"{_BACKUPS}{backups}-")


def _named(run: str, what: str) -> str:
    return f"{prefix_of_run(run)}{what}"


# -- on the host


def overlay_file(image: str, run: str) -> str:
    """Return the file of the temporary overlay of an image, beside it."""
    return f"{image}{_BESIDE}{run}"


def zeros_file(overlay: str) -> str:
    """Return the file of the zeros that are to be stored as data, beside the overlay's."""
    return f"{overlay}-z"


def kept_file(overlay: str) -> str:
    """Return the file of what the image was meanwhile, beside the overlay's."""
    return f"{overlay}-k"


def fleecing_file(image: str, run: str, number: int) -> str:
    """Return the file of what a disk held; `image` may be in another directory than its own."""
    return f"{image}{_BESIDE}{run}-fleece-{number}"


def partial_file(target: str) -> str:
    """Return what a copy is called until it is whole."""
    return f"{target}.partial"


def point_file(when: str) -> str:
    """Return the file, in a directory of backups, that says that one is made."""
    return f"{when}{_POINT}"


def begun_file(when: str) -> str:
    """Return the file, beside it, that says that one was begun."""
    return f"{when}{_BEGUN}"


def backup_when(name: str) -> tuple[str, bool] | None:
    """Return when the backup was begun that a file is of, and whether it says that it is made.

    :return: None where it is neither such a file.
    """
    for end, made in ((_POINT, True), (_BEGUN, False)):
        if name.endswith(end) and is_when(name.removesuffix(end)):
            return name.removesuffix(end), made
    return None


def is_when(text: str) -> bool:
    """Whether a backup can be called so: by the time at which it was begun, in UTC."""
    return _WHEN.fullmatch(text) is not None


def journal_beside(image: str, run: str) -> str:
    """Return the journal of a change, beside its image."""
    return f"{image}{_BESIDE}{run}{_JOURNAL}"


def elsewhere_beside(image: str, run: str) -> str:
    """Return the empty file, beside its image, that says that a change's journal is elsewhere."""
    return f"{image}{_BESIDE}{run}{_ELSEWHERE}"


def journal_in_state(process: Process, devices: Iterable[str], run: str) -> str:
    """Return the journal of a change in the state directory.

    :param devices: the paths of its disks in QEMU's object tree.
    """
    import hashlib

    which = hashlib.sha256(" ".join(devices).encode()).hexdigest()[:8]
    return f"{_of_process(process)}{which}-{run}{_JOURNAL}"


def migration_in_state(source: Process, run: str) -> str:
    """Return the journal of a migration, in the state directory of whoever runs it."""
    return f"{_of_process(source)}{run}{_MIGRATION}"


def is_migration(name: str) -> bool:
    """Whether a file in the state directory is the journal of a migration."""
    return name.endswith(_MIGRATION)


def is_of_vm(journal: str, process: Process) -> bool:
    """Whether a journal in the state directory is of that QEMU process."""
    return journal.startswith(_of_process(process))


def run_of_journal(name: str) -> str:
    """Return the run of a journal, or of a file that says where one is; empty if it is neither.

    :param name: of the file, without its directory.
    """
    match = _A_JOURNAL.fullmatch(name)
    return match[1] if match else ""


def is_beside(name: str, image: str) -> bool:
    """Whether a file is a journal beside an image, or says that one is elsewhere."""
    return name.startswith(f"{image}{_BESIDE}") and bool(run_of_journal(name))


def is_elsewhere(name: str) -> bool:
    """Whether a file that `run_of_journal` knows says that its journal is elsewhere."""
    return name.endswith(_ELSEWHERE)


def socket_folder(run: str) -> str:
    """Return the directory of a socket of ours, in the temporary directory."""
    return f"{OURS}{run}"


def is_socket(path: str, run: str) -> bool:
    """Whether a path, of anybody's writing, leads to the socket of that run by its form."""
    return is_socket_of(path, socket_folder(run))


def is_socket_of(path: str, wire: str) -> bool:
    """Whether a path, of anybody's writing, leads to the socket of that wire's relay by its form.

    :param wire: the name of its node.
    """
    folder, _, name = path.rpartition("/")
    return name == SOCKET and PurePath(folder).name == wire


def forward_folder(run: str, what: str) -> str:
    """Return the directory of the socket at which an ssh of ours listens.

    :param run: of the ssh; `what`: is reached by it: `monitor`, `nbd` or `stream`.
    """
    return _named(run, what)


def forwarded_socket(monitor: str, run: str, what: str) -> str:
    """Return the socket that a QEMU on another host is to make, beside its monitor."""
    return f"{monitor.rpartition('/')[0]}/{_named(run, what)}"


def is_forwarded(path: str) -> bool:
    """Whether a path, of anybody's writing, is by its form that of an NBD server's such socket."""
    run = run_of(path.rpartition("/")[2])
    return bool(run) and path.endswith(f"/{_named(run, 'nbd')}")


def _of_process(process: Process) -> str:
    return f"{process.uuid}-{process.pid}-{process.start}-"
