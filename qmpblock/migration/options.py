"""The words that a QEMU was started with, and which of them its destination is to have. Pure.

What the monitor tells better (devices, disks, iothreads) is not taken from here: see
`qmpblock.migration.launch`. Addresses and files that only one process can have are moved to a
directory of the destination's own.
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qmpblock.errors import printable
from qmpblock.migration.properties import names

__all__ = ["Kept", "has_key", "joined", "objects_of", "options", "program", "sort_out"]

_PROGRAM = re.compile(r"(?:.*/)?qemu(?:-system-[\w-]+|-kvm)?")
_ALONE = names(
    "daemonize enable-kvm full-screen mem-prealloc no-acpi no-fd-bootchk no-hpet no-reboot"
    " no-shutdown no-user-config nodefaults nographic old-param only-migratable preconfig s S"
    " semihosting singlestep snapshot usb"
)
_KEPT = names(
    "L M accel acpitable action append audio audiodev bios boot chardev compat cpu debugcon"
    " display enable-kvm fw_cfg global icount initrd k kernel m machine mem-path mem-prealloc msg"
    " name net netdev nic no-acpi no-fd-bootchk no-hpet no-reboot no-shutdown no-user-config"
    " nodefaults nographic numa only-migratable overcommit parallel rtc sandbox serial smbios smp"
    " tpmdev usb uuid vga watchdog-action"
)
#: Left out without a word: told by the monitor, or of that process alone.
_ELSEWHERE = names(
    "D S blockdev cdrom d daemonize device drive gdb hda hdb hdc hdd incoming loadvm mon monitor"
    " object pidfile qmp qmp-pretty s snapshot trace"
)
_KEYS = re.compile(r"""(?<![\w-])(?:data|password|passwd|passphrase|token)["']?\s*[=:]""")
_ADDRESSES = re.compile(r"(?<![\w-])(?:unix:|path=)((?:[^,]|,,)+)")


@dataclass(frozen=True)
class Kept:
    """What is to be taken over.

    :ivar words: options and their values.
    :ivar missing: options that a person has to add, for a key stands in them.
    :ivar notes: what was left out, or is to be looked at, in words.
    """

    words: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def has_key(value: str) -> bool:
    """Whether a key or a password stands in the value of an option."""
    return _KEYS.search(value) is not None


def program(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what a QEMU was started by, and its options: a loader may stand before it."""
    for number, word in enumerate(words):
        if _PROGRAM.fullmatch(word) and not word.startswith("-"):
            if number + 1 < len(words) and _PROGRAM.fullmatch(words[number + 1]):
                continue  # the name that a loader is to give it
            return tuple(words[: number + 1]), tuple(words[number + 1 :])
    return tuple(words[:1]), tuple(words[1:])


def options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the options, without their dashes, and the value of each; None where it has none."""
    rest = iter(words)
    for word in rest:
        name = word.lstrip("-") if word.startswith("-") else ""
        if not name:
            yield "drive", word  # an image by itself is the first disk
        elif name in _ALONE:
            yield name, None
        else:
            yield name, next(rest, "")


def sort_out(words: Sequence[str], directory: str) -> Kept:
    """Say which options the destination has, too.

    :param words: the source's options.
    :param directory: of the destination's sockets.
    """
    monitors = set(_monitors(words))
    kept: list[str] = []
    missing: list[str] = []
    notes: list[str] = []
    for name, value in options(words):
        if name in _ELSEWHERE:
            if name == "drive" and value is not None and "if=pflash" in value:
                kept += ["-drive", value]
                if "readonly=on" not in value:
                    notes.append(f"-drive {printable(value)}: give it a copy of that file")
            continue
        if name not in _KEPT:
            notes.append(f"-{printable(name)} is left out: it is the source's own")
            continue
        if value is not None and has_key(value):
            missing.append(f"the option -{name}: a key stands in it, and keys are never shown")
            continue
        kept.append(f"-{name}")
        if value is None:
            continue
        if name == "chardev" and _id(value) in monitors:
            del kept[-1]
            continue
        moved = value
        if name in ("chardev", "serial", "parallel"):
            moved = _moved(value, directory)
        kept.append(moved)
    return Kept(tuple(kept), tuple(missing), tuple(notes))


def objects_of(words: Sequence[str]) -> dict[str, str]:
    """Return the values of -object by the ids of the objects."""
    return {_id(value): value for name, value in options(words) if name == "object" and value}


def _monitors(words: Sequence[str]) -> Iterator[str]:
    """Yield the ids of the character devices that are monitors."""
    for name, value in options(words):
        if name in ("qmp", "qmp-pretty", "monitor") and value:
            yield value.removeprefix("chardev:")
        elif name == "mon" and value:
            yield from re.findall(r"(?:^|,)(?:chardev=)?([^,=]+)(?:,|$)", value)


def _id(value: str) -> str:
    if value.startswith("{"):
        try:
            found = json.loads(value)
        except ValueError:
            return ""
        return str(found.get("id", "")) if isinstance(found, dict) else ""
    match = re.search(r"(?:^|,)id=([^,]+)", value)
    return match[1] if match else ""


def _moved(value: str, directory: str) -> str:
    """Return a character device with its UNIX socket in the destination's directory."""

    def move(match: re.Match[str]) -> str:
        file = posixpath.join(directory, posixpath.basename(match[1]))
        return match[0].replace(match[1], file.replace(",", ",,"))

    return _ADDRESSES.sub(move, value)


def joined(words: Iterable[str]) -> str:
    """Write a command line as a shell takes it, an option a line."""
    text = ""
    for word in words:
        between = "" if not text else " \\\n  " if word.startswith("-") else " "
        text += between + _quoted(word)
    return text


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.encode("unicode_escape", "backslashreplace").decode()
    return "$'" + escaped.replace("'", "\\'") + "'"
