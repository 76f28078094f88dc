"""A daemon that is not installed, as if it were: for a process with a mount namespace of its own.

`tools/fetch_daemon.py` unpacks its packages; laid over /usr, with the user that installing it would
make, they are there for whoever is in that namespace, and for nobody else.
"""

from __future__ import annotations

import functools
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
