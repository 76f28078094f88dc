"""Policies that modules have the command plan and apply, and what comes of them.

docs/policy.md is the reference of the format. What is written is JSON, which is YAML, too; every
value is a text, for a policy reads nothing else.
"""

from __future__ import annotations

import json

#: What a disk may ask for, but for `disk` and those of which two options make one key.
_OF_DISK = ("speed", "keep_free", "ahead")
#: The options of a copy, as a policy calls them.
_OF_COPY = (
    "at",
    "format",
    "layers",
    "allocation",
    "cluster_size",
    "latency",
    "speed",
    "keep_free",
    "fleece",
    "fleece_limit",
)
_FLAGS = ("compress", "direct", "reflink", "force", "verify")


def not_absolute(targets, option):
    """Say what is wrong with the files of a dict of disks; None where they all are absolute.

    Others would count from a directory that nobody has chosen.
    """
    if not targets:
        return f"{option} names no disk"
    wrong = [file for file in targets.values() if not str(file).startswith("/")]
    return "{}: no absolute path: {}".format(option, ", ".join(map(str, wrong))) if wrong else None


def of_disk(params):
    """Return the policy of one disk, by the options of the module `disk`."""
    wanted = {"disk": params["disk"]}
    if params["base"] is not None:
        wanted["backing"] = {"base": params["base"]}
    elif params["backing"] is not None:
        wanted["backing"] = params["backing"]
    if params["like"] is not None:
        wanted["allocation"] = {"like": params["like"]}
        if params["like_format"] is not None:
            wanted["allocation"]["format"] = params["like_format"]
    elif params["allocation"] is not None:
        wanted["allocation"] = params["allocation"]
    if params["ranges"]:
        wanted["ranges"] = [_given(part, ("offset", "length")) for part in params["ranges"]]
    wanted.update(_given(params, _OF_DISK))
    return {"vms": [{"address": params["address"], "disks": [wanted]}]}


def of_copies(params):
    """Return the policy of copies of one instant, by the options of the module `copy`."""
    wanted = {"disks": params["copies"]}
    wanted.update(_given(params, _OF_COPY))
    wanted.update({flag: "yes" for flag in _FLAGS if params[flag]})
    return {"vms": [{"address": params["address"], "copies": [wanted]}]}


def text(policy):
    """Return a policy as the text of its file."""
    return json.dumps(policy, indent=1, ensure_ascii=False) + "\n"


def _given(params, names):
    return {name: str(params[name]) for name in names if params[name] is not None}


def has_work(planned):
    """Tell, by what `plan` says of a disk, whether `apply` would change anything."""
    return bool(planned["steps"]) or bool(planned["ahead"] and planned["ahead"]["reserve"])


def totals(planned, wanted=False):
    """Sum up what a disk is, or with `wanted` would be, by what `plan` says of it.

    Of each layer the bytes that it holds itself: data, zeros, and of these what is known to have
    host space; and what no layer holds. None where it cannot be said.
    """
    picture = planned["wanted" if wanted else "today"]
    if picture is None:
        return None
    found = {
        "layers": [dict(file=one["file"], **_sums(one["extents"])) for one in picture["layers"]],
        "absent": sum(one["length"] for one in picture["map"] if not one["present"]),
    }
    if planned["ahead"] is not None:
        room, more = planned["ahead"]["room"], planned["ahead"]["reserve"]
        found["ahead"] = room + more if wanted and room is not None else room
    return found


def _sums(extents):
    held = [one for one in extents if one["present"]]
    return {
        "data": sum(one["length"] for one in held if one["data"]),
        "zero": sum(one["length"] for one in held if one["zero"]),
        "reserved": sum(one["length"] for one in held if one["reserved"]),
    }


def difference(name, before, after):
    """Return what diff mode shows of a disk."""
    return {
        "before_header": name,
        "after_header": name,
        "before": json.dumps(before, indent=1, ensure_ascii=False) + "\n",
        "after": json.dumps(after, indent=1, ensure_ascii=False) + "\n",
    }
