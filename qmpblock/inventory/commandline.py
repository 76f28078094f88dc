"""What a QEMU was started with: which program it is, its name, its monitors. Pure.

A monitor of QMP is given in one of three ways, and its character device by itself or in a file::

    -qmp unix:PATH,server=on          -qmp tcp:HOST:PORT,server=on        (or -qmp-pretty)
    -qmp chardev:ID                   -mon chardev=ID,mode=control
    -chardev socket,id=ID,path=PATH,server=on        ...,host=HOST,port=PORT    ...,fd=N
    -readconfig FILE, in which stands [chardev "ID"] and [mon]

What cannot be connected to from outside (a pipe, stdio, QEMU as the client) is none.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from qmpblock.migration.options import options, program

__all__ = ["Listening", "Started", "is_vm", "read_command_line"]

_SYSTEM = re.compile(r"qemu-system-[\w.-]+|qemu-kvm|kvm")
_LOADER = re.compile(r"ld(?:-linux|-musl)?[\w.-]*\.so[.\d]*")
_OWN = frozenset(("-qmp", "-mon", "-chardev", "-blockdev", "-drive", "-device", "-machine", "-M"))
_ENOUGH = 2  # of these options: no other program has them
_ON = ("on", "yes", "true", "y")
_PART = re.compile(r"((?:[^,]|,,)*)(?:,|$)")
_SECTION = re.compile(r'\s*\[\s*([\w-]+)(?:\s+"([^"]*)")?\s*\]')
_SETTING = re.compile(r'\s*([\w.-]+)\s*=\s*"([^"]*)"')
_HOST_PORT = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<host>[^:]*)):(?P<port>\d+)")


@dataclass(frozen=True)
class Listening:
    """A QMP monitor that listens: one of the last three says where.

    :ivar chardev: the label of its character device.
    :ivar path: of a UNIX socket, as QEMU was given it.
    :ivar tcp: host and port; `fd`: its descriptor of a socket that it was given.
    :ivar abstract: whether the path is an abstract name, which no file bears.
    """

    chardev: str
    path: str = ""
    tcp: tuple[str, int] | None = None
    fd: int | None = None
    abstract: bool = False


@dataclass(frozen=True)
class Started:
    """What a command line says.

    :ivar name: of the VM; empty where it has none.
    :ivar monitors: of QMP, that listen, in their order.
    :ivar chardevs: labels and descriptions, as `qmpblock.managers.Traits` has them.
    """

    name: str = ""
    monitors: tuple[Listening, ...] = ()
    chardevs: Mapping[str, str] = field(default_factory=dict)


def is_vm(file: str, words: Sequence[str]) -> bool:
    """Whether a process is a QEMU that runs a VM, by whatever name.

    Not qemu-img and its like, nor what starts a QEMU and waits for it.

    :param file: of the program; where that cannot be seen, the first of its words.
    :param words: that it was started with.
    """
    name = posixpath.basename(file)
    if _SYSTEM.fullmatch(name):
        return True
    if _LOADER.fullmatch(name):
        by = program(words)[0]
        return len(by) > 1 and _is_system(by[-1])
    starts = (word for before, word in pairwise(words) if (before, word) != ("-accel", "kvm"))
    if name.startswith("qemu-") or any(map(_is_system, starts)):
        return False
    return len(_OWN.intersection(words)) >= _ENOUGH


def _is_system(word: str) -> bool:
    return _SYSTEM.fullmatch(posixpath.basename(word)) is not None


def _after_program(words: Sequence[str]) -> Sequence[str]:
    loaded = words and _LOADER.fullmatch(posixpath.basename(words[0]))
    return program(words)[1] if loaded else words[1:]


def read_command_line(words: Sequence[str], read_file: Callable[[str], str]) -> Started:
    """Read it.

    :param read_file: returns the text of a file of options (-readconfig); empty where that cannot
        be had.
    """
    name = ""
    chardevs: dict[str, dict[str, str]] = {}
    controls: list[str] = []
    for option, value in _all(_after_program(words), read_file):
        if option == "name":
            name = value.get("guest", "")
        elif option == "chardev":
            chardevs[value.get("id", "")] = value
        elif option in ("qmp", "qmp-pretty"):
            label = value.get("chardev") or f"compat_monitor{len(controls)}"
            if "chardev" not in value:
                chardevs[label] = value
            controls.append(label)
        elif option == "mon" and value.get("mode") == "control":
            controls.append(value.get("chardev", ""))
    found = (_listening(label, chardevs[label]) for label in controls if label in chardevs)
    return Started(
        name,
        tuple(one for one in found if one is not None),
        {label: _described(device) for label, device in chardevs.items()},
    )


def _all(
    words: Sequence[str], read_file: Callable[[str], str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the options that are looked at, their values taken apart."""
    for option, value in options(words):
        text = value or ""
        if option == "readconfig":
            yield from _sections(read_file(text))
        elif option in ("qmp", "qmp-pretty"):
            yield option, _compat(text)
        elif option == "name":
            yield option, _keyed(text, "guest")
        elif option == "chardev":
            yield option, _keyed(text, "backend")
        elif option == "mon":
            yield option, _keyed(text, "chardev")


def _sections(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the groups of a file of options."""
    found: list[tuple[str, dict[str, str]]] = []
    for line in text.splitlines():
        if match := _SECTION.match(line):
            found.append((match[1], {"id": match[2]} if match[2] else {}))
        elif found and (match := _SETTING.match(line)):
            found[-1][1][match[1]] = match[2]
    yield from found


def _keyed(value: str, first: str = "") -> dict[str, str]:
    """Read KEY=VALUE,... as QEMU does; `first` is the key of a first word that has none."""
    found = {}
    for number, part in enumerate(_PART.findall(value)):
        key, equals, text = part.replace(",,", ",").partition("=")
        if first and key and not equals and not number:
            found[first] = key
        elif key:
            found[key] = text if equals else "on"
    return found


def _compat(value: str) -> dict[str, str]:
    """Read a character device as -qmp has it: unix:PATH,..., tcp:HOST:PORT,..., chardev:ID."""
    kind, _, rest = value.partition(":")
    if kind == "chardev":
        return {"chardev": rest}
    written = _PART.match(rest)
    assert written is not None  # it matches the empty text
    where = written[1].replace(",,", ",")
    found = {"backend": kind, **_keyed(rest[written.end() :])}
    if kind == "unix":
        found["path"] = where
    elif kind == "tcp" and (match := _HOST_PORT.fullmatch(where)):
        found |= {"host": match["v6"] or match["host"] or "", "port": match["port"]}
    return found


def _listening(label: str, device: Mapping[str, str]) -> Listening | None:
    """Return where a character device listens; None where nobody could connect to it."""
    if device.get("backend") not in ("socket", "unix", "tcp") or device.get("server") not in _ON:
        return None
    if device.get("fd", "").isdecimal():
        return Listening(label, fd=int(device["fd"]))
    if device.get("path"):
        return Listening(label, device["path"], abstract=device.get("abstract") in _ON)
    if device.get("port", "").isdecimal() and 0 < int(device["port"]) < 1 << 16:
        return Listening(label, tcp=(device.get("host", ""), int(device["port"])))
    return None


def _described(device: Mapping[str, str]) -> str:
    """Describe a character device about as QEMU does."""
    return f"unix:{device['path']}" if device.get("path") else device.get("backend", "")
