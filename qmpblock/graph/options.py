"""The options of block nodes, whole: blockdev-reopen gives what is left out its default. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from qmpblock.errors import UNTOUCHED, UnsupportedError
from qmpblock.graph.jsonname import said_by
from qmpblock.graph.model import Layer, Node

__all__ = [
    "aio_of",
    "cache_options",
    "discard_of",
    "key_secret",
    "options_of",
    "overlay_options",
]

_AIO = ("threads", "native", "io_uring")
_OPTION = re.compile(r"((?:[^,]|,,)*)(?:,(?!,)|$)")


def options_of(command: Sequence[str], node: Node) -> Mapping[str, Any]:
    """Return the options by which QEMU was told to open a node; empty where it does not say.

    Most of them no QMP command tells. A node that was added later is not on the command line.

    :param command: QEMU's own command line.
    :param node: for a legacy -drive, that of its format or of its file, the answer has all the
        drive's options.
    """
    return _found(command, node)[0]


def discard_of(command: Sequence[str], node: Node) -> str | None:
    """Return the `discard` of a node: `unmap` or `ignore`; None where nothing tells.

    No QMP command does. A node that is described inside another one, or that QEMU opened by
    itself because another image names it, has `unmap` by default; any other `ignore`.
    """
    options, inside = _found(command, node)
    if not options:
        return "unmap" if node.name.startswith("#block") else None
    value = str(options.get("discard", "unmap" if inside else "ignore"))
    value = {"on": "unmap", "off": "ignore"}.get(value, value)
    return value if value in ("ignore", "unmap") else None


def _found(command: Sequence[str], node: Node) -> tuple[Mapping[str, Any], bool]:
    """Return the options of a node, and whether they stand inside those of another one."""
    for option, value in pairwise(command):
        if option.lstrip("-") == "blockdev":
            for number, described in enumerate(_described(value)):
                name = described.get("node-name")
                if name == node.name or (name is None and _names(described, node)):
                    return described, number > 0
        elif option.lstrip("-") == "drive":
            drive = _keyed(value)
            if node.filename in (drive.get("file"), drive.get("file.filename")):
                return {key.removeprefix("file."): drive[key] for key in drive} | drive, False
    return {}, False


def aio_of(command: Sequence[str], storage: Node) -> str | None:
    """Return the `aio` with which QEMU was told to open a file; None where it does not say.

    :param command: QEMU's own command line.
    """
    value = options_of(command, storage).get("aio")
    return value if value in _AIO else None


def _names(node: dict[str, Any], storage: Node) -> bool:
    return node.get("driver") == storage.driver and node.get("filename") == storage.filename


def _described(value: str) -> Iterator[dict[str, Any]]:
    """Yield the nodes that the value of a -blockdev describes, those inside others too."""
    if value.startswith("{"):
        try:
            options = json.loads(value)
        except ValueError:
            return  # QEMU's JSON may have comments; ours is to know, not to judge
    else:
        options = {}
        for key, text in _keyed(value).items():
            *outer, last = key.split(".")
            inner = options
            for part in outer:
                inner = inner.setdefault(part, {})
                if not isinstance(inner, dict):
                    return
            inner[last] = text
    todo = [options]
    while todo:
        node = todo.pop()
        yield node
        todo += [child for child in node.values() if isinstance(child, dict)]


def _keyed(value: str) -> dict[str, str]:
    """Read KEY=VALUE,... as QEMU does: a comma in a value is doubled; what has no = is a flag."""
    pairs = (part.replace(",,", ",").partition("=") for part in _OPTION.findall(value) if part)
    return {key: text for key, _, text in pairs}


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
    discard: str = "unmap",
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
        "discard": discard,
        "detect-zeroes": like.detect_zeroes,
        "cache": cache_options(like),
    }
    if key_secret is not None:
        options["encrypt"] = {"format": "luks", "key-secret": key_secret}
    return options


def key_secret(layer: Layer) -> str:
    """Return the id of the secret object that opens an encrypted layer.

    QEMU tells it only in the `json:` file name that it makes of such a node.

    :raise UnsupportedError: it does not.
    """
    options = said_by(layer.node.filename)
    nested = options.get("encrypt")
    for secret in (
        options.get("key-secret"),
        options.get("encrypt.key-secret"),
        nested.get("key-secret") if isinstance(nested, dict) else None,
    ):
        if isinstance(secret, str) and secret:
            return secret
    raise UnsupportedError(
        f"{layer.describe()} is encrypted, and QEMU does not tell with which secret object; what "
        "we make over it would hold its plaintext",
        standing=UNTOUCHED,
    )
