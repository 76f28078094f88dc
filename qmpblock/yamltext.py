"""YAML read strictly: no implicit types, every key consumed or refused.

YAML's `off` would be False, `0x10` an int: here every value is the text that stands there, and
each key knows what it wants. Every error says file, line and column.

A text is bounded before it becomes nodes: libyaml makes them by recursion, and 100,000 `[` ended
Python itself. Aliases count as what they stand for, so that a few lines are not a billion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Never

import yaml

from qmpblock.errors import RequestError, printable
from qmpblock.sizes import parse_size

__all__ = ["Mapping", "read_mapping", "read_text"]

_MOST_BYTES = 1 << 20  # of a text
_MOST_LEVELS = 32  # a policy has seven
_MOST_NODES = 100_000  # each alias counts as all that it stands for


def read_text(path: Path | str, error: type[RequestError] = RequestError) -> str:
    """Read a file that `read_mapping` is to parse: no more of it than is taken, and one beyond.

    :raise RequestError: it cannot be read; of the class `error`.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            return file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as failure:
        raise error(f"cannot read {printable(path)}: {printable(failure)}") from None


def read_mapping(text: str, source: str, error: type[RequestError] = RequestError) -> Mapping:
    """Parse YAML text whose top is a mapping.

    :param source: the file, for errors.
    :param error: the class of all errors about this text.
    :raise RequestError: it is not YAML, or not a mapping; of the class `error`.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        if len(text) > _MOST_BYTES:
            raise error(f"{_place(source, None)}: has more than {_MOST_BYTES} characters")
        too_much = _beyond(yaml.parse(text, Loader=loader))
        if too_much is not None:
            what, mark = too_much
            raise error(f"{_place(source, mark)}: {what}")
        node = yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as wrong:
        mark = wrong.problem_mark or wrong.context_mark
        said = wrong.problem or wrong.context
        raise error(f"{_place(source, mark)}: is not YAML: {printable(said)}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as wrong:
        first = str(wrong).splitlines()[0]
        raise error(f"{_place(source, None)}: is not YAML: {printable(first)}") from None
    if node is None:
        raise error(f"{_place(source, None)}: is empty")
    return Mapping(source, "", node, error)


def _beyond(events: Iterator[Any]) -> tuple[str, Any] | None:
    """Say what of a text is too much, and where; None if nothing is."""
    sizes: dict[str, int] = {}  # of what has an anchor
    open_: list[tuple[str | None, int]] = []  # the anchor, and how many nodes came before
    count = 0
    for event in events:
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:  # within itself, or nowhere
                return "is not YAML: found undefined alias", event.start_mark
            count += sizes[anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((anchor, count))
            count += 1
            if len(open_) > _MOST_LEVELS:
                return f"is nested more than {_MOST_LEVELS} levels deep", event.start_mark
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = open_.pop()
            if name is not None:
                sizes[name] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if anchor is not None:
                sizes[anchor] = 1
        if count > _MOST_NODES:
            return f"has more than {_MOST_NODES} values", event.start_mark
    return None


def _place(source: str, mark: yaml.Mark | None) -> str:
    line, column = (0, 0) if mark is None else (mark.line, mark.column)
    return f"{source}:{line + 1}:{column + 1}"


class Mapping:
    """One YAML mapping whose keys are asked for one by one; `finish` refuses the rest.

    :raise RequestError: from every method, where the file does not say what is wanted; of the
        class that was given to `read_mapping`.
    """

    def __init__(self, source: str, where: str, node: yaml.Node, error: type[RequestError]) -> None:
        self._source = source
        self._error = error
        self._where = where
        self._node = node
        self._asked: set[str] = set()
        self._keys: dict[str, yaml.Node] = {}
        self._entries: dict[str, yaml.Node] = {}
        if not isinstance(node, yaml.MappingNode):
            raise self._at(node, where, "must be a mapping")
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._at(key, where, "has a key that is not text")
            if key.value in self._entries:
                raise self._at(key, printable(self._path(key.value)), "stands here twice")
            self._keys[key.value], self._entries[key.value] = key, value

    def __contains__(self, key: str) -> bool:
        self._asked.add(key)
        return key in self._entries

    @property
    def place(self) -> str:
        """File, line and column, for errors about it that are found later."""
        return _place(self._source, self._node.start_mark)

    def _path(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def _at(self, node: yaml.Node, where: str, what: str) -> RequestError:
        place = _place(self._source, node.start_mark)
        return self._error(f"{place}: {where}: {what}" if where else f"{place}: {what}")

    def error(self, key: str | None, what: str) -> RequestError:
        """Make an error about `key` (None: about the whole), with its place if it is there."""
        if key is None:
            return self._at(self._node, self._where, what)
        return self._at(self._entries.get(key, self._node), self._path(key), what)

    def refuse(self, key: str | None, what: str) -> Never:
        """Raise an error about `key`."""
        raise self.error(key, what)

    def _scalar(self, key: str, default: str | None) -> str:
        if key not in self:
            if default is None:
                self.refuse(key, "is missing")
            return default
        node = self._entries[key]
        if not isinstance(node, yaml.ScalarNode):
            self.refuse(key, "must be one value, not a list or mapping")
        return str(node.value)

    def text(self, key: str, default: str | None = None) -> str:
        """Return text; required without a default."""
        return self._scalar(key, default)

    def flag(self, key: str, default: bool) -> bool:
        """Return a yes or a no."""
        value = self._scalar(key, "yes" if default else "no").lower()
        if value not in ("yes", "no", "true", "false"):
            self.refuse(key, f"{printable(value)!r} is neither yes nor no")
        return value in ("yes", "true")

    def size(self, key: str, default: int | None = None) -> int:
        """Return a size in bytes; required without a default."""
        value = self._scalar(key, None if default is None else str(default))
        size = parse_size(value)
        if size is None:
            self.refuse(key, f"{printable(value)!r} is not a size such as 512, 64K or 1M+512")
        return size

    def choice(self, key: str, known: tuple[str, ...], default: str) -> str:
        """Return one of `known`."""
        value = self._scalar(key, default)
        if value not in known:
            self.refuse(key, f"{printable(value)!r} is not one of {', '.join(known)}")
        return value

    def mapping(self, key: str) -> Mapping:
        """Return the mapping below `key`."""
        if key not in self:
            self.refuse(key, "is missing")
        return Mapping(self._source, self._path(key), self._entries[key], self._error)

    def is_mapping(self, key: str) -> bool:
        """Whether a mapping stands under `key`, rather than one value or a list."""
        return key in self and isinstance(self._entries[key], yaml.MappingNode)

    def _sequence(self, key: str) -> list[yaml.Node]:
        node = self._entries[key]
        if not isinstance(node, yaml.SequenceNode):
            self.refuse(key, "must be a list")
        return list(node.value)

    def mappings(self, key: str) -> list[Mapping]:
        """Return a list of mappings that has at least one."""
        if key not in self or not (nodes := self._sequence(key)):
            self.refuse(key, "is missing or empty")
        return [
            Mapping(self._source, f"{self._path(key)}[{index}]", node, self._error)
            for index, node in enumerate(nodes)
        ]

    def keys(self) -> tuple[str, ...]:
        """Return all keys that are there, in their order."""
        return tuple(self._entries)

    def texts(self, key: str) -> dict[str, str]:
        """Return a mapping of text to text; empty if it is not there."""
        if key not in self:
            return {}
        below = self.mapping(key)
        return {name: below.text(name) for name in below.keys()}  # noqa: SIM118 - no dict

    def choices(self, key: str, known: tuple[str, ...]) -> list[str]:
        """Return a list of some of `known`, none twice; empty if it is not there."""
        values = []
        for value, refuse in self.lines(key):
            if value not in known or value in values:
                refuse(f"is not one of {', '.join(known)}, or stands here twice")
            values.append(value)
        return values

    def lines(self, key: str) -> Iterator[tuple[str, Callable[[str], Never]]]:
        """Yield each text of a list, and what refuses it; nothing if the list is not there."""
        if key not in self:
            return
        for index, node in enumerate(self._sequence(key)):
            where = f"{self._path(key)}[{index}]"
            if not isinstance(node, yaml.ScalarNode):
                raise self._at(node, where, "must be text")
            value = str(node.value)

            def refuse(what: str, node: yaml.Node = node, where: str = where) -> Never:
                raise self._at(node, where, f"{printable(node.value)!r} {what}")

            yield value, refuse

    def finish(self) -> None:
        """Refuse keys that nobody asked for."""
        for key, node in self._keys.items():
            if key not in self._asked:
                known = ", ".join(sorted(self._asked))
                path = printable(self._path(key))
                raise self._at(node, path, f"is not a key that is known here ({known})")
