"""What a copy can be asked for: one table, of which the library, the command and policies know.

A new option is a line in `CopyOptions` and in `CopyWords`, an option of the command
(`qmpblock.cli.copy_command`), and a line of what a policy may say (`qmpblock.policy.copyentry`);
what it means is told in the docstring of `VM.copy`. Tests see that none is forgotten.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from qmpblock.copying.shape import Allocation, Shape
from qmpblock.errors import UNTOUCHED, RequestError

if TYPE_CHECKING:
    import os

    from qmpblock.copying.plan import Layers, Point

__all__ = ["CopyOptions", "CopyWords", "names_copy_options", "parse_latency"]

_UNITS = {"us": 1e-6, "ms": 1e-3, "": 1e-3, "s": 1.0}

_F = TypeVar("_F", bound=Callable[..., Any])


class CopyWords(TypedDict, total=False):
    """The options as keywords; what is left out is as `CopyOptions` has it."""

    at: Point
    pivot: bool
    format: str | None
    layers: Layers
    allocation: Allocation
    cluster_size: int | None
    compress: bool
    direct: bool
    reflink: bool
    force: bool
    speed: int
    fleece: str | os.PathLike[str] | None
    fleece_limit: int | None
    verify: bool
    tls_creds: str | None
    latency: float
    resume: bool


@dataclass(frozen=True)
class CopyOptions:
    """The options and what each is by default; `VM.copy` says what they mean.

    :raise RequestError: a value that none can have.
    """

    at: Point = "start"
    pivot: bool = False
    format: str | None = None
    layers: Layers = "all"
    allocation: Allocation = "thin"
    cluster_size: int | None = None
    compress: bool = False
    direct: bool = False
    reflink: bool = False
    force: bool = False
    speed: int = 0
    fleece: str | os.PathLike[str] | None = None
    fleece_limit: int | None = None
    verify: bool = False
    tls_creds: str | None = None
    latency: float = 0.0
    resume: bool = False

    def __post_init__(self) -> None:
        if self.speed < 0:
            raise RequestError(f"a speed of {self.speed} bytes a second is none")
        if not 0 <= self.latency < math.inf:
            raise RequestError(f"a latency of {self.latency} seconds is none")
        for name, given in (("compress", self.compress), ("cluster_size", self.cluster_size)):
            if self.resume and given:
                raise RequestError(
                    f"a copy that goes on from what is there (resume) takes no {name}: the image "
                    "is as it was made, and QEMU writes into no cluster that is compressed",
                    standing=UNTOUCHED,
                    remedy="leave one of the two out",
                )

    @property
    def point(self) -> Point:
        """Of which moment the copy is."""
        return "pivot" if self.pivot else self.at

    @property
    def shape(self) -> Shape:
        """What the targets are to be like."""
        return Shape(self.allocation, self.cluster_size, self.compress, self.direct, self.reflink)


def parse_latency(text: str) -> float | None:
    """Read a latency as people write it, `20` or `20ms`, `0.5s`, `300us`; None if it is none.

    :return: seconds, more than none.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{0,9})?)(us|ms|s)?", text, re.ASCII)
    return (float(match[1]) * _UNITS[match[2] or ""] or None) if match else None


def names_copy_options(function: _F) -> _F:
    """Have the signature of a function that takes `**options: Unpack[CopyWords]` name each.

    So `help()` and whoever else looks at it finds what can be given, and its default.
    """
    signature = inspect.signature(function)
    others = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    named = [
        inspect.Parameter(
            one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type
        )
        for one in fields(CopyOptions)
    ]
    said = signature.replace(parameters=[*others, *named])
    function.__signature__ = said  # type: ignore[attr-defined]
    return function
