"""What the tests of journals share: records, their files, full file systems."""

import errno
import json
import os
from pathlib import Path

from drawing import RUN, record

from qmpblock.changes import journalfile as module
from qmpblock.host.statedirectory import state_directory


def of_pivot(image, **changes):
    """Return the record of an active commit of `image`."""
    wanted = {
        "operation": "commit",
        "pivot": True,
        "job": f"qmpblock-{changes.get('run', RUN)}-pivot",
        "top_file": str(image),
        "base_file": "/i/base",
    }
    return record(**(wanted | changes))


def beside(image, run=RUN):
    return image.with_name(f"{image.name}.qmpblock-{run}.journal")


def as_format_1(journal):
    """Rewrite a journal as the version before wrote it: no proofs, marks beside the image alone."""
    for path in journal.paths:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line.pop("mac", None)
        lines[0]["format"] = 1
        if path.parent == state_directory() and len(journal.paths) > 1:
            lines = [line for line in lines if "pivoted" not in line]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Full:
    """Has the file systems of some directories full, for as long as it is entered."""

    def __init__(self, monkeypatch, *directories, inodes=False, number=errno.ENOSPC):
        self.patching = monkeypatch
        self.directories = directories
        self.inodes = inodes
        self.number = number

    def __enter__(self):
        self.context = self.patching.context()
        patching = self.context.__enter__()
        real_open, keep = os.open, module.keep_size

        def is_full(path):
            return any(Path(path).parent == directory for directory in self.directories)

        def refusing(fd, offset, length):
            if is_full(os.readlink(f"/proc/self/fd/{fd}")):
                raise OSError(self.number, os.strerror(self.number))
            keep(fd, offset, length)

        def opening(path, flags, *more, dir_fd=None):
            if self.inodes and flags & os.O_CREAT:
                where = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else "."
                if is_full(Path(where) / path):
                    raise OSError(self.number, os.strerror(self.number), str(path))
            return real_open(path, flags, *more, dir_fd=dir_fd)

        patching.setattr(module, "keep_size", refusing)
        patching.setattr(os, "open", opening)

    def __exit__(self, *error):
        self.context.__exit__(*error)


def elsewhere(image):
    return image.with_name(f"{image.name}.qmpblock-{RUN}.elsewhere")
