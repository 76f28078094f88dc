"""What `qmpblock backup` tells, as a playbook and its report use it."""

from __future__ import annotations

import posixpath
from datetime import datetime

#: The options of `backup` that are the command's, with a value and without.
_VALUES = ("speed", "latency", "fleece", "fleece_limit")
_FLAGS = ("compress", "verify")


def words(params):
    """Return the command's words, behind the address and the directory, for a backup."""
    found = [word for disk in params["disks"] for word in ("--disk", disk)]
    if params["kind"] is not None:
        found.append("--" + params["kind"])
    for option in _VALUES:
        if params[option] is not None:
            found += ["--" + option.replace("_", "-"), params[option]]
    return found + ["--" + flag for flag in _FLAGS if params[flag]]


def foreseen(planned):
    """Return what a point would say of its disks, as far as `difference` tells of it.

    :param planned: the document of `qmpblock backup --dry-run`.
    """
    return [dict(one, file=posixpath.basename(one["target"])) for one in planned["disks"]]


def difference(directory, points, new):
    """Return what diff mode shows: the images of a directory, before and after.

    :param points: that it had, oldest first; `new`: the disks of the one that is made.
    """
    before = [_line(one) for point in points for one in point["disks"]]
    return {
        "before_header": directory,
        "after_header": directory,
        "before": _text(before),
        "after": _text(before + [_line(one) for one in new]),
    }


def _line(disk):
    how = "full: " + disk["reason"] if disk["parent"] is None else "on " + disk["parent"]
    return "{}: {}, {}".format(disk["file"], disk["disk"], how)


def _text(lines):
    return "".join(line + "\n" for line in lines)


def images(made):
    """Return what a report tells of the images of a backup.

    :param made: the document of `qmpblock backup`.
    """
    return [
        {
            "disk": one["disk"],
            "file": posixpath.join(made["directory"], one["file"]),
            "kind": kind(one),
            "reason": one["reason"],
            "length": one["length"],
        }
        for one in made["point"]["disks"]
    ]


def kind(disk):
    """Return what the backup of a disk is, by what its point says of it."""
    return "full" if disk["parent"] is None else "incremental"


def age(points, now):
    """Return how many seconds ago the newest backup was of; None where there is none.

    :param points: of a directory, oldest first; `now`: in seconds since 1970.
    """
    if not points:
        return None
    return now - datetime.fromisoformat(points[-1]["time"]).timestamp()
