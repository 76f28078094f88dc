"""QEMU's words: why it refused a command, where what to do next depends on that.

Of its error classes QEMU gives two a meaning, and all else is `GenericError`, so that only the
words tell. They are no interface: each is here, once, under a name. All of them were seen on 7.2.22
and 11.1.2, where nothing else is said, and `tests/live/test_refusals.py` provokes them on the QEMU
under test, so that one which changes its words fails there and not at night.

Nothing else looks into QEMU's words, but `qmpblock.luks`, whose fault qemu-img and jobs have, too,
and `qmpblock.host.qemuimg`, for the tools.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from qmpblock.errors import CommandError

__all__ = [
    "already_running",
    "already_shutting_down",
    "bitmap_is_fixed",
    "could_not_open",
    "duplicate_node",
    "duplicate_object",
    "in_use",
    "iothread_is_fixed",
    "is_busy",
    "is_ejected",
    "migration_in_progress",
    "no_command",
    "no_file",
    "no_node",
    "no_object",
    "not_found",
    "not_owned",
    "not_running",
    "read_only",
    "read_only_file_system",
    "tolerate",
    "wrong_key",
]


async def tolerate(refusal: Callable[[CommandError], bool], command: Awaitable[Any]) -> bool:
    """Await a command; False if QEMU refused it so.

    :raise CommandError: it refused it otherwise.
    """
    try:
        await command
    except CommandError as error:
        if not refusal(error):
            raise
        return False
    return True


# -- there is none


def not_found(error: CommandError) -> bool:
    """Whether there is no named descriptor, object, export, bitmap or job of that name.

    "File descriptor named 'X' not found", "Export 'X' is not found".
    """
    return "not found" in error.description


def no_node(error: CommandError) -> bool:
    """Whether there is no node of that name: "Failed to find node with node-name='X'".

    So says blockdev-del; commands on bitmaps say "Node 'X' not found".
    """
    return "Failed to find node" in error.description


def no_object(error: CommandError) -> bool:
    """Whether there is nothing at that path of the object tree, by its class.

    Of an object that lacks a property the words ("not found") are the same, not the class.
    """
    return error.error_class == "DeviceNotFound"


def no_command(error: CommandError) -> bool:
    """Whether this QEMU has no such command, by its class."""
    return error.error_class == "CommandNotFound"


def no_file(error: CommandError) -> bool:
    """Whether there is no such file: "Could not open 'X': No such file or directory"."""
    return "No such file" in error.description


# -- there is one already


def duplicate_object(error: CommandError) -> bool:
    """Whether there is an object of that id.

    "attempt to add duplicate property 'X' to object (type 'container')".
    """
    return "duplicate" in error.description


def duplicate_node(error: CommandError) -> bool:
    """Whether there is a node of that name: "Duplicate nodes with node-name='X'"."""
    return "Duplicate nodes with node-name" in error.description


def already_running(error: CommandError) -> bool:
    """Whether an NBD server runs: "NBD server already running"."""
    return "already running" in error.description


# -- it is needed


def in_use(error: CommandError) -> bool:
    """Whether somebody uses it: a node, an export that has a client, or a TCP port.

    "Block device X is in use", "Node X is in use", "export 'X' still in use", "Failed to find an
    available port: Address already in use".
    """
    return "in use" in error.description


def is_busy(error: CommandError) -> bool:
    """Whether a node lies on it: "Node 'X' is busy: node is used as backing hd of 'Y'"."""
    return "is busy" in error.description


def not_owned(error: CommandError) -> bool:
    """Whether it goes with the nodes that lie on it: "Node X is not owned by the monitor"."""
    return "not owned by the monitor" in error.description


def iothread_is_fixed(error: CommandError) -> bool:
    """Whether a device keeps its node in another thread than an export is to have it.

    "Cannot change iothread of active block backend".
    """
    return "Cannot change iothread" in error.description


# -- it is ending, or has ended


def already_shutting_down(error: CommandError) -> bool:
    """Whether an export is about to go: "Export 'X' is already shutting down"."""
    return "already shutting down" in error.description


def not_running(error: CommandError) -> bool:
    """Whether no NBD server runs: "NBD server not running"."""
    return "not running" in error.description


def is_ejected(error: CommandError) -> bool:
    """Whether QEMU gave up an image that it found corrupt: "Block device X is ejected".

    So it refuses to describe any node, with the name of the one that it gave up.
    """
    return "is ejected" in error.description


def migration_in_progress(error: CommandError) -> bool:
    """Whether a node may not come that keeps the VM here, since it is leaving.

    "disallowing migration blocker (migration/snapshot in progress) for: ...".
    """
    return "in progress" in error.description


# -- it cannot be written to, or opened


def read_only(error: CommandError) -> bool:
    """Whether what a job is to write to cannot be written to.

    "Block node is read-only"; of the host's files the words of strerror(3): "Permission denied",
    "Operation not permitted", "Read-only file system".
    """
    return any(words in error.description for words in ("read-only", "Read-only", "ermi"))


def read_only_file_system(error: CommandError) -> bool:
    """Whether that is because of the file system: "Read-only file system", of strerror(3)."""
    return "Read-only file system" in error.description


def could_not_open(error: CommandError) -> bool:
    """Whether a file could not be opened as it is to be: "Could not open 'X': ..."."""
    return any(words in error.description for words in ("Could not open", "Could not reopen"))


def bitmap_is_fixed(error: CommandError) -> bool:
    """Whether a persistent dirty bitmap lies in an image that cannot be written to now.

    7.2: "Bitmap 'X' is readonly and cannot be modified"; 11.1: "Cannot remove persistent bitmap
    'X': no write access to node 'Y'".
    """
    return any(words in error.description for words in ("is readonly", "no write access"))


def wrong_key(error: CommandError) -> bool:
    """Whether the key does not open the image: "Invalid password, cannot unlock any keyslot"."""
    return "password" in error.description
