"""YAML read strictly, for scenarios; see `qmpblock.yamltext`."""

from __future__ import annotations

from qmpblock import yamltext
from qmpblock.errors import RequestError
from qmpblock.sizes import parse_size
from qmpblock.yamltext import Mapping

__all__ = ["Mapping", "ScenarioError", "parse_size", "read_mapping"]


class ScenarioError(RequestError):
    """A scenario file is wrong; the message names the file, the line, the column and the key."""


def read_mapping(text: str, source: str) -> Mapping:
    """Parse YAML text whose top is a mapping.

    :param source: the file, for errors.
    :raise ScenarioError: it is not YAML, or not a mapping.
    """
    return yamltext.read_mapping(text, source, ScenarioError)
