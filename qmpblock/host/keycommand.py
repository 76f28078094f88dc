"""Commands of qemu-img on encrypted images, for people who have the keys, where we have not. Pure.

Such a command is whole: it does what is said once KEY_FILE is a file that holds the key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qmpblock.graph.jsonname import as_name

__all__ = ["keyed"]


def keyed(
    image: Mapping[str, Any],
    is_encrypted: Callable[[Mapping[str, Any]], bool],
    *,
    sharing: int | None = None,
) -> tuple[str, list[str]]:
    """Return the name by which qemu-img opens an image with keys, and what gives it these.

    :param image: as for blockdev-add, without `node-name`, with all that lies below it.
    :param is_encrypted: whether a layer is, by its options.
    :param sharing: how many layers, from the top, have the first key; None: all. Each of the others
        may have one of its own.
    """
    ids: list[str] = []

    def opened(options: Mapping[str, Any], depth: int) -> dict[str, Any]:
        made = dict(options)
        if is_encrypted(options):
            number = 0 if sharing is None or depth < sharing else depth - sharing + 1
            key = f"key{number or ''}"
            if key not in ids:
                ids.append(key)
            if made["driver"] == "luks":
                made["key-secret"] = key
            else:
                made["encrypt"] = {"format": "luks", "key-secret": key}
        if isinstance(below := made.get("backing"), Mapping):
            made["backing"] = opened(below, depth + 1)
        return made

    name = as_name(opened(image, 0))
    files = {key: f"KEY_FILE{key.removeprefix('key')}" for key in ids}
    return name, [
        word for key, file in files.items() for word in ("--object", f"secret,id={key},file={file}")
    ]
