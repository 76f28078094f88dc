"""What QEMU's answers must be like for us to read them.

One table says what the code reads of each answer, and of what type it must be; the monitor holds
every answer against it, so that nothing behind it meets a word where a number belongs. What an
answer has more is nobody's concern. `qmpblock.graph`, which reads the large ones, checks those
itself.

A shape is a type; a list of one shape, for a list of such; or a mapping, for an object that has
these keys, those that end in `?` not always.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmpblock.errors import GraphError

__all__ = ["checked"]

_SHAPES: Mapping[str, Any] = {
    "device-list-properties": [{"name": str, "type": str}],
    "human-monitor-command": str,
    "qom-list": [{"name": str, "type": str}],
    "qom-list-get": [{"properties": [{"name": str}]}],
    "query-block": [{"qdev?": str, "device?": str, "inserted?": {}}],
    "query-block-exports": [{"id": str, "node-name": str}],
    "query-block-jobs": [{"device": str}],
    "query-blockstats": [{}],
    "query-chardev": [{"label": str, "filename": str}],
    "query-commands": [{"name": str}],
    "query-hotpluggable-cpus": [{"type": str, "props": {}, "qom-path?": str}],
    "query-dirty-rate": {"status": str, "dirty-rate?": int},
    "query-iothreads": [{"id": str, "thread-id": int, "poll-max-ns": int}],
    "query-jobs": [{"id": str, "type": str, "status": str, "error?": str}],
    "query-kvm": {"enabled": bool},
    "query-machines": [{"name": str, "alias?": str}],
    "query-memory-size-summary": {"base-memory": int, "plugged-memory?": int},
    "query-migrate": {"status?": str, "blocked-reasons?": [str], "error-desc?": str, "ram?": {}},
    "query-migrate-capabilities": [{"capability": str, "state": bool}],
    "query-migrate-parameters": {"downtime-limit?": int, "max-bandwidth?": int},
    "query-name": {"name?": str},
    "query-named-block-nodes": [{"node-name": str}],
    "query-status": {"status": str, "running": bool},
    "query-uuid": {"UUID": str},
    "x-debug-query-block-graph": {"nodes": [], "edges": []},
}
_WORDS = {str: "text", int: "a number", bool: "yes or no", dict: "an object", list: "a list"}


def checked(command: str, answer: Any) -> Any:
    """Return the answer to a command.

    :raise GraphError: it is not what such an answer is like.
    """
    shape = _SHAPES.get(command)
    if shape is not None:
        _check(shape, answer, command)
    return answer


def _check(shape: Any, answer: Any, where: str) -> None:
    kind = shape if isinstance(shape, type) else type(shape)
    if not _is(kind, answer):
        raise GraphError(
            f"QEMU's answer makes no sense: {_words(answer)} where {_WORDS[kind]} belongs, "
            f"in {where}"
        )
    if isinstance(shape, list):
        for inner in shape:
            for one in answer:
                _check(inner, one, where)
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name in answer:
                _check(inner, answer[name], f"{where}, {name}")
            elif name == key:
                raise GraphError(f"QEMU's answer makes no sense: no {name} in {where}")


def _is(kind: type, answer: object) -> bool:
    return type(answer) is kind  # not isinstance: to Python a bool is an int


def _words(answer: Any) -> str:
    return "nothing" if answer is None else _WORDS.get(type(answer), "a number")
