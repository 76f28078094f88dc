"""A daemon or tool that is not installed, as if it were.

`tools/fetch_daemon.py` unpacks its packages. A daemon's, laid over /usr in a mount namespace, with
the user that installing it would make, are there for whoever is in that namespace, and for nobody
else. A tool is started from where it lies (`started`).
"""

from __future__ import annotations

import functools
import shlex
import subprocess
import sys
from pathlib import Path

_FETCH = Path(__file__).parents[1] / "tools" / "fetch_daemon.py"


@functools.cache
def fetched(name: str, *parts: str) -> tuple[Path | None, str]:
    """Return under which folder lies what is not installed of a daemon, or why it cannot be had.

    :param parts: paths from the root that are there where it is installed.
    """
    if all((Path("/") / part).exists() for part in parts):
        return Path("/"), ""
    command = [sys.executable, str(_FETCH), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None, done.stderr.strip()
    return Path(done.stdout.strip()), ""


def started(name: str, program: str) -> tuple[str | None, str]:
    """Return a script of sh that is a tool, wherever it lies; or None, and why it is not to be had.

    :param program: its path from the root.
    """
    folder, why = fetched(name, program)
    if folder is None:
        return None, why
    words = [str(folder / program)]
    if folder != Path("/"):
        libraries = ":".join(map(str, sorted((folder / "usr/lib").glob("*-linux-*"))))
        modules = folder / "usr/lib/python3/dist-packages"
        words = ["env", f"LD_LIBRARY_PATH={libraries}", f"PYTHONPATH={modules}", *words]
    return f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', ""


def laid_over(folder: str) -> str:
    """Return a line of sh that lays such a folder over /usr, if it is not the root."""
    return f'[ "{folder}" = / ] || mount -t overlay -o "lowerdir={folder}/usr:/usr" overlay /usr'


def have_user(name: str, number: int, place: str) -> str:
    """Return lines of sh that have a user be there, and its group, where they are not.

    :param place: a directory for the lists that have them.
    """
    entries = {
        "passwd": f"{name}:x:{number}:{number}::/:/bin/false",
        "group": f"{name}:x:{number}:",
    }
    return "\n".join(
        f"""getent {which} {name} >"{place}/{which}" || {{
  {{ cat /etc/{which} && echo {entry}; }} >"{place}/{which}"
  mount --bind "{place}/{which}" /etc/{which}
}}"""
        for which, entry in entries.items()
    )
