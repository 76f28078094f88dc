"""Which images have too little room for what is copied to them: by figures."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from qmpblock.host.space import HostSpace
from qmpblock.migration.machine import GuestDisk
from qmpblock.migration.room import without_room

HERE = GuestDisk("p", "d0", 1 << 40, file="top")


@pytest.fixture
def there(tmp_path: Path) -> GuestDisk:
    """Return an image on this host."""
    image = tmp_path / "image"
    image.touch()
    return replace(HERE, file="image", here=str(image), identity=(1, 8), taken=0)


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(path: str) -> HostSpace:
        os.stat(path)  # as the real one does: it may be gone
        return HostSpace(path, 1, 100)

    monkeypatch.setattr(HostSpace, "of", of)


def said(images: Sequence[GuestDisk], needed: int | None) -> list[str]:
    wanted = [(replace(HERE, name=f"d{n}"), one) for n, one in enumerate(images)]
    found = without_room(wanted, {here.name: needed for here, _ in wanted})
    return [one.what for one in found if one.refused]


def test_what_is_copied_to_all_of_them_together(there: GuestDisk) -> None:
    assert said([there], 100) == []
    [text] = said([there, there], 51)
    assert "has 100 bytes free, and what is copied takes up to 102 there" in text


def test_what_an_image_takes_already_it_has(there: GuestDisk) -> None:
    assert said([replace(there, taken=2)], 102) == []
    assert said([replace(there, taken=1)], 102) != []
    assert said([replace(there, taken=500), there], 101) != []  # it lends nothing to another


@pytest.mark.parametrize(
    "unlike",
    [
        {"here": ""},  # on another host, or not seen
        {"here": "/nowhere/at/all"},  # gone meanwhile
        {"identity": (7, None)},  # a block device, whose name lies on a small file system
        {"zeroes": "unmap"},  # what is zeros in the data takes none there
    ],
)
def test_where_it_cannot_be_told_nothing_is_refused(
    there: GuestDisk, unlike: dict[str, object]
) -> None:
    assert said([replace(there, **unlike)], 1 << 40) == []  # type: ignore[arg-type]
    assert said([there], None) == []
