"""A script that starts a QEMU again, by hand, on the images as a test left them."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

__all__ = ["again", "write_again"]

NAME = "again"

_HEAD = """\
#!/bin/sh
# Starts a QEMU of {test} again, on its images as they are now.
# More options may follow:  ./{name} -S -gdb tcp::1234
# QMP, in this directory: {monitors}. By hand:  socat READLINE UNIX-CONNECT:qmp
"""
_GUEST = """\
# The tiny guest's serial line is the socket `serial`:  socat READLINE UNIX-CONNECT:serial
# and then, say:  1 hello
"""
_INCOMING = "# It waits for a migration, as it did in the test.\n"


def again(
    command: Sequence[str], directory: Path, monitors: Sequence[str], test: str
) -> tuple[str, dict[str, str]]:
    """Return the script, and the files with passphrases that it needs beside it.

    :param command: QEMU's command line in the test.
    :param directory: QEMU's own, where the script is to be.
    """
    files: dict[str, str] = {}
    words = [shutil.which(command[0]) or command[0]]
    for word in command[1:]:
        word = _with_key_file(word.replace(f"{directory}/", ""), files)
        if word.startswith("socket,id=guest-serial,"):
            word += ",server=on,wait=off"  # in the test the harness listened
        words.append(word)
    text = _HEAD.format(test=test, name=NAME, monitors=", ".join(monitors))
    if "guest-serial" in " ".join(words):
        text += _GUEST
    if "-incoming" in words:
        text += _INCOMING
    lines = [shlex.quote(words[0])]
    for word in words[1:]:
        if word.startswith("-") or not lines[-1].startswith("-") or " " in lines[-1]:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    text += 'cd "$(dirname "$0")" || exit 1\n'
    return text + "exec " + " \\\n  ".join([*lines, '"$@"']) + "\n", files


def _with_key_file(word: str, files: dict[str, str]) -> str:
    """Have a secret read from a file: the script may be shown, and its process be listed."""
    try:
        described = json.loads(word) if word.startswith("{") else None
    except ValueError:
        return word
    if not isinstance(described, dict) or described.get("qom-type") != "secret":
        return word
    if described.get("format", "raw") != "raw" or not isinstance(described.get("data"), str):
        return word
    name = f"secret-{described['id']}"
    files[name] = described.pop("data")
    return json.dumps({**described, "file": name})


def write_again(
    command: Sequence[str], directory: Path, monitors: Sequence[str], test: str
) -> Path:
    """Write the script into QEMU's own directory; return its path."""
    text, files = again(command, directory, monitors, test)
    for name, data in files.items():
        path = directory / name
        path.touch(mode=0o600)
        path.write_text(data)
    script = directory / NAME
    script.write_text(text)
    script.chmod(0o700)
    return script
