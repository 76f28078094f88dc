"""What `qmpblock backup` tells, as a playbook and its report use it."""

from __future__ import annotations

import posixpath
from datetime import datetime

from ansible_collections.qmpblock.qmpblock.plugins.module_utils.chains import called

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


def planned(disks, points, params):
    """Return what the backup of each disk would be, as far as that is known before it is made.

    :param disks: the document of `qmpblock disks`; `points`: of the directory, oldest first.
    """
    there = {disk["path"] for point in points for disk in point["disks"]}
    names = params["disks"] or [one["device"] for one in disks if not one["read_only"]]
    return [dict(disk=name, **_foreseen(disks, name, there, params["kind"])) for name in names]


def _foreseen(disks, name, there, wanted):
    if wanted == "full":
        return {"kind": "full", "reason": "it was asked for"}
    paths = {one["qom_path"] for one in called(disks, name)}
    if paths and not paths & there:
        return {"kind": "full", "reason": "there is no backup of this disk yet"}
    return {"kind": None, "reason": ""}


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
