"""What can be done to the chain of a scenario, computed from it, and what must be refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from qmpblock.errors import Error, InUseError, RequestError, UnsupportedError
from qmpblock.testing.scenario import Image, Scenario, load_scenarios

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One operation on a chain; `base` None is what is meant where it is left out.

    There and back is a snapshot that is committed again.
    """

    operation: str
    top: int = 0
    base: int | None = None

    def __str__(self) -> str:
        if self.operation in ("snapshot", "there-and-back"):
            return self.operation
        to = "the-bottom" if self.base is None else str(self.base)
        return f"{self.operation}-{self.top}-to-{to}"

    @property
    def layers(self) -> dict[str, str]:
        """Return the arguments of Disk.stream or Disk.commit."""
        top = {"top": f"@{self.top}"} if self.top else {}
        return top if self.base is None else {**top, "base": f"@{self.base}"}

    def after(self, layers: list[T]) -> list[T]:
        """Return what is left of a chain, the active layer first."""
        if self.operation == "stream":
            return layers[: self.top + 1] + ([] if self.base is None else layers[self.base :])
        last = len(layers) - 1 if self.base is None else self.base
        return layers[: self.top] + layers[last:]

    def refusal(
        self, scenario: Scenario, disk: str, version: tuple[int, ...]
    ) -> type[Error] | None:
        """Return the exception with which it must be refused; None if it must succeed."""
        if self.operation in ("snapshot", "there-and-back"):
            return None
        chain = images_of(scenario, disk)
        last = len(chain) - 1 if self.base is None else self.base
        if self.operation == "stream":
            target = chain[self.top]
            leaving = chain[self.top + 1 : None if self.base is None else self.base]
            above, below = target, None if self.base is None else chain[self.base]
            changed = [target] if self.top else []
        else:
            target, leaving = chain[last], chain[self.top : last]
            above, below = chain[self.top - 1] if self.top else None, target
            changed = [*leaving, target]
        if any(is_encrypted(image) for image in leaving) and not is_encrypted(target):
            return UnsupportedError
        others = [one.name for one in scenario.disks if one.name != disk]
        if any(image in images_of(scenario, other) for other in others for image in changed):
            return InUseError
        if self.operation == "commit" and above is None and target.size > chain[0].size:
            return RequestError
        if above is not None and above.format not in ("qcow2", "qed"):
            return UnsupportedError  # QEMU cannot record another backing image in its header
        subclusters = dict(target.options).get("extended_l2") == "on"
        if self.operation == "stream" and subclusters and version < (10, 0, 0):
            return UnsupportedError  # QEMU would abort
        # The active layer is made to hold what a short one hides; another one cannot be.
        if above is not None and above is not chain[0] and below is not None:
            end = min(above.size, below.size)
            if any(image.size < end for image in leaving):
                return UnsupportedError
        return None


def is_encrypted(image: Image) -> bool:
    return image.secret is not None


def images_of(scenario: Scenario, disk: str) -> list[Image]:
    """Return the images of a disk's chain, the active one first."""
    images = {image.file: image for image in scenario.images()}
    [found] = [one for one in scenario.disks if one.name == disk]
    chain = [found.active]
    while chain[-1].backing is not None:
        chain.append(images[chain[-1].backing])
    return chain


def cases(depth: int) -> Iterator[Case]:
    """Yield the operations that a chain of so many layers must stand: one of every kind."""
    last = depth - 1
    yield from (Case("snapshot"), Case("there-and-back"))
    if depth >= 2:
        yield Case("stream")
        yield Case("commit", base=1)
    if depth >= 3:
        yield Case("stream", base=last)
        yield Case("stream", top=1)
        yield Case("commit")
        yield Case("commit", top=1, base=2)


def every_case(depth: int) -> Iterator[Case]:
    """Yield every operation that a chain of so many layers can be asked for."""
    yield from (Case("snapshot"), Case("there-and-back"))
    for top in range(depth - 1):
        for base in range(top + 1, depth):
            yield Case("commit", top, base)
            if base > top + 1:
                yield Case("stream", top, base)
        yield Case("stream", top)


def scenarios_with_cases(make: Any = cases) -> list[Any]:
    """Return pytest's parameters (scenario, disk, case).

    :param make: yields the cases of a disk, by the depth of its chain.
    """
    params = []
    for scenario in load_scenarios(FIXTURES):
        marks = []
        if scenario.requires is not None:
            needs = scenario.requires
            marks.append(pytest.mark.needs_qemu(needs.text, reason=needs.reason))
        for disk in scenario.disks:
            for case in make(len(images_of(scenario, disk.name))):
                name = f"{scenario.name}-{disk.name}-{case}"
                params.append(pytest.param(scenario, disk.name, case, id=name, marks=marks))
    return params
