"""The options of block nodes, whole: blockdev-reopen gives what is left out its default. Pure."""

from __future__ import annotations

from typing import Any

from qmpblock.graph import Node

__all__ = ["cache_options", "overlay_options"]


def cache_options(node: Node) -> dict[str, bool]:
    """Return the `cache` member that opens another node as `node` is."""
    return {"direct": "direct" in node.cache, "no-flush": "no-flush" in node.cache}


def overlay_options(
    name: str,
    storage: str,
    like: Node,
    key_secret: str | None,
    backing: str | None,
    fmt: str = "qcow2",
) -> dict[str, Any]:
    """Return the whole description of an overlay's node.

    :param storage: the node of its file.
    :param like: the node of the image that it is for, whose options it takes over.
    :param key_secret: the id of the secret object that encrypts it.
    :param backing: the node that it lies on; None for none.
    """
    options: dict[str, Any] = {
        "driver": fmt,
        "node-name": name,
        "file": storage,
        "backing": backing,
        "discard": "unmap",
        "detect-zeroes": like.detect_zeroes,
        "cache": cache_options(like),
    }
    if key_secret is not None:
        options["encrypt"] = {"format": "luks", "key-secret": key_secret}
    return options
