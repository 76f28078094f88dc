"""What is written for the next controller, which may be an older or a newer qmpblock.

The data of a lock, and the first line of a journal, say `format` and `version`::

    format     raised when a reader that does not know the new one would do wrong;
               absent: 1, from before there was one
    version    the qmpblock that wrote it: for people

Within a format fields may be added. One that is absent has its default, where it has one; one
that this version does not know is kept in `more`, and written back with the rest. Whatever does
not fit is `UnreadableError`: what is ours and cannot be read is never skipped and never removed
(design.md, safety rule 14), because what it guards may be at work, or hold the newest data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from qmpblock._version import __version__
from qmpblock.errors import printable

__all__ = ["FORMAT", "UnreadableError", "plain", "read", "stamped", "unstamped", "writer"]

FORMAT = 1

#: The field of a dataclass that keeps what this version does not know.
MORE = "more"

T = TypeVar("T")


class UnreadableError(Exception):
    """What was read is not what any version writes that this one knows; says why."""


def stamped(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return these data with the format and the version that writes them."""
    return {"format": FORMAT, "version": __version__, **data}


def unstamped(data: Any, known: int = FORMAT) -> dict[str, Any]:
    """Return what `stamped` was given.

    :param known: the newest format that the caller reads.
    :raise UnreadableError: it is of a newer format, or no JSON object.
    """
    if not isinstance(data, Mapping):
        raise UnreadableError("it is no JSON object")
    rest = dict(data)
    number = rest.pop("format", 1)
    rest.pop("version", None)
    if type(number) is not int or number < 1:
        raise UnreadableError("its format is no number")
    if number > known:
        raise UnreadableError(
            f"it is of format {number}, written by {writer(data)}; this is qmpblock "
            f"{__version__}, which reads formats up to {known}"
        )
    return rest


def writer(data: Any) -> str:
    """Say who wrote data that may be anything."""
    version = data.get("version") if isinstance(data, Mapping) else None
    if isinstance(version, str):
        return f"qmpblock {printable(version, 40)}"
    return "a qmpblock that does not say its version"


def plain(value: Any) -> dict[str, Any]:
    """Return a dataclass as JSON values, with what this version does not know in its place."""
    kept: dict[str, Any] = {}
    for one in fields(value):
        item = getattr(value, one.name)
        if one.name == MORE:
            kept = {**item, **kept}
        else:
            kept[one.name] = plain(item) if hasattr(item, "__dataclass_fields__") else item
    return kept


def read(kind: type[T], data: Any) -> T:
    """Read a dataclass of strings, numbers, truth values, tuples and other such dataclasses.

    :raise UnreadableError: a field that has no default is absent, or one is of another type.
    """
    if not isinstance(data, Mapping):
        raise UnreadableError(f"a {kind.__name__} is no JSON object")
    hints = _hints(kind)  # type: ignore[arg-type]
    known = {one.name: one for one in fields(kind) if one.name != MORE}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in data:
            values[name] = _read(hints[name], data[name], name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UnreadableError(f"its field {name} is absent")
    if MORE in hints:
        values[MORE] = {name: data[name] for name in data if name not in known}
    return kind(**values)


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields: half a millisecond that is spent once."""
    return get_type_hints(kind)


def _read(kind: Any, data: Any, name: str) -> Any:
    if kind in (str, int, bool, NoneType):
        if type(data) is kind:
            return data
    elif get_origin(kind) is tuple:
        kinds = get_args(kind)
        if isinstance(data, list | tuple):
            if len(kinds) == 2 and kinds[1] is Ellipsis:
                kinds = (kinds[0],) * len(data)
            if len(kinds) == len(data):
                return tuple(_read(k, item, name) for k, item in zip(kinds, data, strict=True))
    elif get_origin(kind) is Mapping:
        if isinstance(data, Mapping):
            return data
    elif hasattr(kind, "__dataclass_fields__"):
        return read(kind, data)
    else:  # one type or another
        for one in get_args(kind):
            try:
                return _read(one, data, name)
            except UnreadableError:
                continue
    raise UnreadableError(f"its field {name} is of another type")
