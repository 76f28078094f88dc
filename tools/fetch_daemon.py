#!/usr/bin/env python3
"""Have a daemon or a tool for the tests without installing it: nothing to leave behind.

::

    tools/fetch_daemon.py libvirt|libvirt-dev|sshd|restic|borg|promtool

Prints the folder under which the packages lie that this machine lacks, unpacked in the cache
(`$QMPBLOCK_CACHE`, default `~/.cache/qmpblock`): laid over the machine's own /usr, in a mount
namespace, they are what an installed one would be (tests/unpacked.py). On a machine that
has it all, the folder is empty. What is in the cache is not fetched again, and needs no network.

They are those of the machine's own Debian, by its own apt, which resolves the dependencies and
verifies every signature and hash; its package state is read, and not changed. Needs no root.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fetch_qemu import FetchError, default_cache, locked, run, unpack


@dataclass(frozen=True)
class Daemon:
    """What is asked of Debian, and the program that has to come of it.

    :ivar tried: words with which it is tried out; none: that its libraries are there has to do.
    :ivar alone: whether it needs nothing but itself: all else of its package is left out, and
        what that depends on is not fetched.
    """

    program: str
    packages: tuple[str, ...]
    tried: tuple[str, ...] = ()
    alone: bool = False


DAEMONS = {
    "libvirt": Daemon(
        "usr/sbin/libvirtd",
        ("libvirt-daemon", "libvirt-daemon-driver-qemu", "libvirt-clients", "python3-libvirt"),
    ),
    "libvirt-dev": Daemon(f"usr/lib/{platform.machine()}-linux-gnu/libvirt.so", ("libvirt-dev",)),
    "sshd": Daemon("usr/sbin/sshd", ("openssh-server",)),
    "restic": Daemon("usr/bin/restic", ("restic",), ("version",)),
    "borg": Daemon("usr/bin/borg", ("borgbackup",), ("--version",)),
    "promtool": Daemon("usr/bin/promtool", ("prometheus",), ("--version",), alone=True),
}
MERGED = ("bin", "lib", "lib64", "sbin")  # links into /usr, which packages may not know


def download(daemon: Daemon, folder: Path) -> list[Path]:
    """Download what is missing here of the packages and of what they depend on.

    :raise FetchError: apt cannot have them, by the machine's lists nor by fresh ones.
    """
    (folder / "archives" / "partial").mkdir(parents=True)
    (folder / "lists" / "partial").mkdir(parents=True)
    settings = [f"Dir::Cache={folder}", "Debug::NoLocking=1", "APT::Sandbox::User="]
    options = [word for one in settings for word in ("-o", one)]
    words = ("install", "-q", "-y", "--download-only", "--no-install-recommends")
    archives = folder / "archives"
    asked = (*(("download", "-q") if daemon.alone else words), *daemon.packages)
    apt = ("env", "-C", archives, "apt-get")  # it downloads to where it is
    try:
        run([*apt, *options, *asked])
    except FetchError:  # the lists are old, or there are none
        options += ["-o", f"Dir::State::lists={folder / 'lists'}"]
        run(["apt-get", *options, "update", "-q", "-o", "APT::Update::Error-Mode=any"])
        run([*apt, *options, *asked])
    return sorted(archives.glob("*.deb"))


def take_out(program: str, archives: Sequence[Path], folder: Path) -> None:
    """Unpack one file of a package: of some it is a small part.

    :raise FetchError: it is in none of them.
    """
    taking = 'dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2" "./$3"'
    for archive in archives:
        run(["sh", "-c", taking, "sh", archive, folder, program])


def merge(root: Path) -> None:
    """Put what lies in /lib and the like to where those links lead."""
    for name in MERGED:
        if (root / name).is_dir():
            shutil.copytree(root / name, root / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(root / name)


def environment(root: Path) -> dict[str, str]:
    """Return the variables with which a program finds what is unpacked with it."""
    libraries = sorted((root / "usr" / "lib").glob("*-linux-*"))
    return {
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "PYTHONPATH": str(root / "usr" / "lib" / "python3" / "dist-packages"),
    }


def check(daemon: Daemon, root: Path) -> None:
    """See that the daemon finds all of its libraries, or that it runs; raises FetchError."""
    places_of = (top / daemon.program for top in (root, Path("/")))
    program = next((path for path in places_of if path.exists()), None)
    if program is None:
        raise FetchError(f"the packages hold no {daemon.program}")
    if daemon.tried:
        run([program, *daemon.tried], **environment(root))
        return
    listed = run(["ldd", program], **environment(root))
    lacking = [line.split()[0] for line in listed.splitlines() if line.endswith("not found")]
    if lacking:
        raise FetchError(f"the packages lack the libraries {', '.join(lacking)}")


def place_in(cache: Path, name: str) -> Path:
    """Return where it is in a cache: packages of one Debian are of no use to another."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    return cache / name / f"{release.get('VERSION_CODENAME', 'unknown')}-{platform.machine()}"


def fetch(cache: Path, name: str) -> Path:
    """Return the folder in the cache, fetching it first where it is not there.

    Atomic: it is unpacked and tried out beside its place, and then renamed.

    :raise FetchError: it cannot be had; says why.
    """
    daemon, place = DAEMONS[name], place_in(cache, name)
    place.parent.mkdir(parents=True, exist_ok=True)
    with (
        locked(place.parent / ".lock"),
        tempfile.TemporaryDirectory(prefix=".new-", dir=place.parent) as new,
    ):
        if (place / "fetched.json").exists():
            return place / "root"
        print(f"fetching the packages of {name}, to unpack and not to install", file=sys.stderr)
        made = Path(new) / "made"
        archives = download(daemon, Path(new) / "apt")
        (made / "root").mkdir(parents=True)
        if daemon.alone:
            take_out(daemon.program, archives, made / "root")
        else:
            unpack(archives, made / "root")
        merge(made / "root")
        check(daemon, made / "root")
        said = {"packages": [archive.name for archive in archives]}
        (made / "fetched.json").write_text(json.dumps(said, indent=1) + "\n")
        made.rename(place)
    return place / "root"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Unpack packages of Debian in a cache folder.")
    parser.add_argument("name", choices=DAEMONS, metavar="|".join(DAEMONS))
    parser.add_argument("--cache", type=Path, default=default_cache(), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        print(fetch(options.cache, options.name))
    except (FetchError, OSError) as error:
        print(f"cannot have {options.name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
