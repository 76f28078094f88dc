#!/usr/bin/env python3
"""Fetch a newer QEMU than the machine's own, from the newer suites of its Debian mirror.

::

    tools/fetch_qemu.py 11          # QEMU 11.x: from forky, or else sid
    tools/fetch_qemu.py trixie 11   # what a suite has now; several at once
    tools/fetch_qemu.py --list      # what the cache holds

Prints the path of each `qemu-system-x86_64`; `qemu-img`, `qemu-io`, `qemu-nbd` and
`qemu-storage-daemon` of the same version stand beside it. Nothing is installed: the
packages are unpacked in the cache (`$QMPBLOCK_CACHE`, default `~/.cache/qmpblock`), and
each program runs on the C library and the libraries of its own suite. What is in the cache
is not fetched again, and needs no network.

The packages come by name through apt itself, with an apt root of our own (sources, lists,
an empty dpkg status), so that apt resolves the dependencies and verifies every signature
and hash, and the machine's own package state is neither read nor changed. The mirror is
the one that the machine's apt is configured for. Needs no root.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("qemu-system-x86_64", "qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon")
PACKAGES = ("qemu-system-x86", "qemu-utils")  # the storage daemon is in a dependency of these

SUITES = {"10": ("trixie",), "11": ("forky", "sid", "experimental")}
"""Where to look for a major version, first the suite that moves least."""

KEYRINGS = tuple(
    Path("/usr/share/keyrings") / name
    for name in ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp")
)
KEYRING_SUITES = ("trixie", "forky")
"""Suites whose debian-archive-keyring may know the key of a newer one."""

FIRMWARE = (
    "usr/share/qemu/*.rom",
    "usr/share/qemu/kvmvapic.bin",
    "usr/share/qemu/linuxboot*.bin",
    "usr/share/qemu/multiboot*.bin",
    "usr/share/qemu/pvh.bin",
    "usr/share/qemu/keymaps/*",
    "usr/share/seabios/*",
    "usr/lib/ipxe/qemu/*",
)
"""What an x86 guest may need of the data files; the rest is for other machines."""

BUNDLE = Path("usr/bin/qemu-bundle")
"""QEMU takes every path it was built with (firmware, modules) to lie under this folder, where
it exists beside /proc/self/exe; without it, it would load the machine's own QEMU's modules.
Modules (sound, screens) are left out: QEMU passes over an absent one in silence."""


class FetchError(Exception):
    """This QEMU cannot be had; the message says why."""


def run(command: Sequence[str | Path], **environment: str) -> str:
    """Run a program and return its standard output.

    :raise FetchError: it cannot be started, or it failed; with what it said.
    """
    try:
        done = subprocess.run(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8", **environment},
        )
    except OSError as error:
        raise FetchError(f"cannot start {command[0]}: {error.strerror}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise FetchError(f"{' '.join(map(str, command))} failed:\n{said}")
    return done.stdout


# --- apt, with a root of its own ---------------------------------------------------------


def mirrors(targets: str) -> list[str]:
    """Choose the mirrors to try from `apt-get indextargets --format '$(REPO_URI) $(ORIGIN)'`.

    Those that call themselves Debian come first; a fresh machine, whose apt has not run
    yet, knows no origins. Each mirror once, in apt's order.
    """
    rows = [line.split(maxsplit=1) for line in targets.splitlines() if line.strip()]
    rows.sort(key=lambda row: row[1:] != ["Debian"])
    return list(dict.fromkeys(row[0] for row in rows))


def candidate(policy: str) -> str | None:
    """Read the candidate version from `apt-cache policy PACKAGE`; None where there is none."""
    found = re.search(r"^  Candidate: (\S+)$", policy, re.MULTILINE)
    return None if found is None or found[1] == "(none)" else found[1]


def upstream_version(version: str) -> str:
    """Strip Debian's epoch, repacking mark and revision: `1:11.1.3+ds-1` is `11.1.3`.

    A release candidate keeps its mark (`1:11.2.0~rc1+ds-1` is `11.2.0~rc1`).
    """
    found = re.fullmatch(r"(?:\d+:)?(\d[\d.]*\d(?:~rc\d+)?)(?:[+~-].*)?", version)
    if found is None:
        raise FetchError(f"cannot read the version {version!r}")
    return found[1]


class AptRoot:
    """apt with sources, lists, cache and package state of its own, under one folder.

    :param folder: where all of it lies; the caller's to remove.
    :param sources: lines of a sources.list.
    """

    def __init__(self, folder: Path, sources: Sequence[str]) -> None:
        self.archives = folder / "cache" / "archives"
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        (folder / "sources.list").write_text("".join(f"{line}\n" for line in sources))
        # The machine's proxies, timeouts and trust settings hold here too; its hooks, which
        # may clean the machine's own apt cache or want root, do not.
        acquire = run(["apt-config", "dump", "Acquire"])
        settings = {
            "Dir::State": folder,
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "Dir::Log": folder,
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::main": "/dev/null",
            "APT::Sandbox::User": "",
            "APT::Install-Recommends": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        self._config = folder / "apt.conf"
        self._config.write_text(
            acquire + "".join(f'{name} "{value}";\n' for name, value in settings.items())
        )

    def run(self, *command: str) -> str:
        """Run one of apt's programs in this root; raises FetchError with what it said."""
        return run(command, APT_CONFIG=str(self._config))

    def update(self) -> None:
        """Fetch and verify the package lists; raises FetchError, also where a key is missing."""
        # Without this, apt calls a list that could not be fetched or verified a warning.
        self.run("apt-get", "update", "-q", "-o", "APT::Update::Error-Mode=any")

    def candidate(self, package: str) -> str | None:
        """Version of a package that would be installed."""
        return candidate(self.run("apt-cache", "policy", package))

    def download(self, *packages: str) -> list[Path]:
        """Download packages with all that they depend on; returns the .deb files."""
        self.run("apt-get", "install", "-q", "-y", "--download-only", *packages)
        return sorted(self.archives.glob("*.deb"))


def unpack(archives: Sequence[Path], folder: Path) -> None:
    """Unpack .deb files over each other into a folder."""
    for archive in archives:
        run(["dpkg-deb", "-x", archive, folder])


def newer_keyring(mirror: str, keyring: Path, scratch: Path) -> Path | None:
    """Fetch the debian-archive-keyring of the newest suite that the given keyring verifies."""
    for suite in reversed(KEYRING_SUITES):
        folder = scratch / f"keyring-{suite}"
        apt = AptRoot(folder, [f"deb [signed-by={keyring}] {mirror} {suite} main"])
        try:
            apt.update()
            unpack(apt.download("debian-archive-keyring"), folder / "root")
        except FetchError:
            continue
        for known in KEYRINGS:
            found = folder / "root" / known.relative_to("/")
            if found.is_file():
                return found
    return None


def open_suite(suite: str, scratch: Path) -> AptRoot:
    """Return an apt root with the verified lists of one suite.

    :raise FetchError: no mirror of this machine has the suite, or no key verifies it.
    """
    keyring = next((path for path in KEYRINGS if path.is_file()), None)
    if keyring is None:
        raise FetchError("no Debian keyring here: install the package debian-archive-keyring")
    targets = run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN)"])
    reasons = []
    for number, mirror in enumerate(mirrors(targets)):
        folder = scratch / f"{suite}-{number}"
        # experimental is no whole suite: what its packages depend on is in sid.
        suites = ("sid", suite) if suite == "experimental" else (suite,)

        def opened(name: str, key: Path) -> AptRoot:
            apt = AptRoot(
                folder / name,  # noqa: B023  (called in this turn of the loop only)
                [f"deb [signed-by={key}] {mirror} {each} main" for each in suites],  # noqa: B023
            )
            apt.update()
            return apt

        try:
            return opened("apt", keyring)
        except FetchError as error:
            reasons.append(str(error))
            if "NO_PUBKEY" not in str(error):
                continue
        newer = newer_keyring(mirror, keyring, folder)
        if newer is not None:
            try:
                return opened("apt-newer-key", newer)
            except FetchError as error:
                reasons.append(str(error))
    raise FetchError("\n".join(reasons) or "this machine's apt has no sources")


# --- from packages to programs that run --------------------------------------------------


def libraries(listed: str) -> list[Path]:
    """Read the libraries from what `ld.so --list PROGRAM` prints.

    :raise FetchError: one of them was not found.
    """
    found = []
    for line in listed.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        if not arrow:
            continue  # the vDSO, or the loader itself
        path = rest.rpartition(" (")[0]
        if not path.startswith("/"):
            raise FetchError(f"the packages lack the library {name}")
        found.append(Path(path))
    return found


def wrapper(program: str, library_path: str) -> str:
    """Return a shell script that becomes `program` of the root beside its folder.

    It execs, so that the process id is QEMU's own, and finds the root from its own path, so
    that the folder may be moved. The loader is a copy beside the programs, because it is
    what /proc/self/exe then names (see BUNDLE).
    """
    return f"""\
#!/bin/sh
self=$0
[ -L "$self" ] && self=$(readlink -f -- "$self")
root=${{self%/*}}/../root
exec "$root/usr/bin/ld.so" --library-path "$root/{library_path}" --argv0 "$0" \\
  "$root/usr/bin/{program}" "$@"
"""


def build(whole: Path, target: Path) -> None:
    """Copy what the programs need from the unpacked packages, and write the wrappers.

    :param whole: root of everything unpacked.
    :param target: gets `root/` (the same tree, pruned) and `bin/` (the wrappers).
    :raise FetchError: a program, library or the loader is not there.
    """
    loader = next(whole.glob("usr/lib/*/ld-linux*.so.*"), None)
    if loader is None:
        raise FetchError("the packages hold no dynamic loader")
    library_path = f"usr/lib/{loader.parent.name}"

    root = target / "root"
    programs = [whole / "usr/bin" / program for program in PROGRAMS]
    wanted = [*programs, *(path for each in FIRMWARE for path in sorted(whole.glob(each)))]
    copies = {path.relative_to(whole): path for path in wanted}
    copies[Path("usr/bin/ld.so")] = loader
    for program in programs:
        if not program.is_file():
            raise FetchError(f"the packages hold no {program.name}")
        for library in libraries(run([loader, "--library-path", loader.parent, "--list", program])):
            if not library.is_relative_to(whole):
                raise FetchError(f"the packages lack the library {library.name}")
            copies[Path(library_path) / library.name] = library
    for relative, source in copies.items():
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, root / relative)
    (root / BUNDLE).symlink_to("../..")

    (target / "bin").mkdir()
    for name in PROGRAMS:
        script = target / "bin" / name
        script.write_text(wrapper(name, library_path))
        script.chmod(0o755)


def check(binaries: Path, version: str, scratch: Path) -> None:
    """Start every program once, a machine and an image among it; raises FetchError."""
    for program in PROGRAMS:
        if version.partition("~")[0] not in run([binaries / program, "--version"]):
            raise FetchError(f"{program} does not say that it is {version}")
    image = scratch / "check.qcow2"
    run([binaries / "qemu-img", "create", "-q", "-f", "qcow2", image, "1M"])
    run([binaries / "qemu-img", "map", "--output=json", "-f", "qcow2", image])
    disk = {"driver": "file", "node-name": "f"}
    machine = subprocess.run(  # the monitor is its standard input and output
        [
            *(binaries / "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-S"),
            *("-display", "none", "-accel", "tcg", "-m", "16", "-M", "pc", "-qmp", "stdio"),
            *("-blockdev", json.dumps({**disk, "filename": str(image)})),
            *("-blockdev", '{"driver": "qcow2", "node-name": "d0", "file": "f"}'),
            *("-device", "virtio-blk-pci,drive=d0"),
        ],
        # Listing the types loads every module that can be found: there must be none.
        input="".join(
            f'{{"execute": "{command}"}}\n'
            for command in ("qmp_capabilities", "qom-list-types", "quit")
        ),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if machine.returncode or '"SHUTDOWN"' not in machine.stdout or "module" in machine.stderr:
        raise FetchError(f"it does not start a machine:\n{machine.stderr.strip()[-2000:]}")


# --- the cache -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cached:
    """One QEMU in the cache: its folder, version (`11.1.3`) and the suite it came from."""

    folder: Path
    version: str
    suite: str

    @property
    def qemu(self) -> Path:
        """The wrapper of qemu-system-x86_64."""
        return self.folder / "bin" / "qemu-system-x86_64"

    def answers(self, wanted: str) -> bool:
        """Whether this is what was asked for: a version, the start of one, or a suite."""
        return wanted in (self.version, self.suite) or self.version.startswith(f"{wanted}.")


def default_cache() -> Path:
    """Return the cache folder: `$QMPBLOCK_CACHE`, else `qmpblock` in the user's cache."""
    if own := os.environ.get("QMPBLOCK_CACHE"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qmpblock"


def version_key(version: str) -> tuple[int, ...]:
    """Sort key of a version; a release candidate sorts before its release."""
    numbers, _, candidate_number = version.partition("~rc")
    return (*map(int, numbers.split(".")), int(candidate_number or 99))


def cached(cache: Path) -> list[Cached]:
    """List the QEMUs in the cache, newest first."""
    found = []
    for record in (cache / "qemu").glob("*/fetched.json"):
        facts = json.loads(record.read_text())
        found.append(Cached(record.parent, facts["version"], facts["suite"]))
    return sorted(found, key=lambda each: version_key(each.version), reverse=True)


def find(cache: Path, wanted: str) -> Cached | None:
    """Find the newest QEMU in the cache that answers to `wanted`."""
    return next((each for each in cached(cache) if each.answers(wanted)), None)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file: of two runs at once, one fetches and the other waits and finds."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch(cache: Path, wanted: str) -> Cached:
    """Return the wanted QEMU from the cache, fetching it first where it is not there.

    Atomic: it is unpacked and tried out beside its place, and then renamed.

    :param wanted: a major version (`11`) or a Debian suite (`sid`).
    :raise FetchError: it cannot be had; says what was tried.
    """
    if there := find(cache, wanted):
        return there
    if wanted not in SUITES and not re.fullmatch(r"[a-z][a-z-]*", wanted):
        known = ", ".join(SUITES)
        raise FetchError(f"{wanted!r} is neither a major version ({known}) nor a Debian suite")
    place = cache / "qemu"
    place.mkdir(parents=True, exist_ok=True)
    with locked(place / ".lock"), tempfile.TemporaryDirectory(prefix=".new-", dir=place) as name:
        if there := find(cache, wanted):
            return there
        reasons = []
        for suite in SUITES.get(wanted, (wanted,)):
            try:
                return _fetch_from(suite, wanted, place, Path(name) / suite)
            except FetchError as error:
                reasons.append(f"{suite}: {error}")
    raise FetchError("\n".join(reasons))


def _fetch_from(suite: str, wanted: str, place: Path, scratch: Path) -> Cached:
    print(f"fetching QEMU from Debian's {suite} ...", file=sys.stderr, flush=True)
    apt = open_suite(suite, scratch)
    package = apt.candidate(PACKAGES[0])
    if package is None:
        raise FetchError(f"has no {PACKAGES[0]}")
    version = upstream_version(package)
    result = Cached(place / version, version, suite)
    if not result.answers(wanted):
        raise FetchError(f"has QEMU {version}, not {wanted}")
    archives = apt.download(*PACKAGES)
    unpack(archives, scratch / "whole")
    target = scratch / "target"
    build(scratch / "whole", target)
    check(target / "bin", version, scratch)
    facts = {"version": version, "suite": suite, "packages": [deb.name for deb in archives]}
    (target / "fetched.json").write_text(json.dumps(facts, indent=1) + "\n")
    # The same version from another suite may stand there: programs in use keep their files.
    if result.folder.exists():
        result.folder.rename(scratch / "old")
    target.rename(result.folder)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Fetch newer QEMUs from newer Debian suites into a cache folder."
    )
    parser.add_argument("wanted", nargs="*", metavar="10|11|SUITE", help="what to fetch")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="show what the cache holds")
    parser.add_argument(
        "--print-path", action="store_true", help="fetch nothing: print paths in the cache, or fail"
    )
    options = parser.parse_args(arguments)
    if options.list:
        for each in cached(options.cache):
            print(f"{each.version}\t{each.suite}\t{each.qemu}")
    elif not options.wanted:
        parser.error("say which QEMU: 10, 11 or a Debian suite")
    for wanted in options.wanted:
        try:
            found = (find if options.print_path else fetch)(options.cache, wanted)
        except (FetchError, OSError) as error:
            print(f"cannot have QEMU {wanted}: {error}", file=sys.stderr)
            return 1
        if found is None:
            print(f"QEMU {wanted} is not in the cache {options.cache}", file=sys.stderr)
            return 1
        print(found.qemu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
