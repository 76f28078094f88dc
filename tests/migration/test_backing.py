"""What a destination's images lie on has to be what the disks lie on, or it is refused."""

from dataclasses import replace

import pytest

from qmpblock.errors import RequestError
from qmpblock.migration.backing import backing_differs, own_images
from qmpblock.migration.diskterms import DiskTerms
from qmpblock.migration.machine import GuestDisk, LowerLayer, Machine

BASE = LowerLayer("base", "raw", 64, ((1, 2),))
MIDDLE = LowerLayer("middle", "qcow2", 64, ((1, 3), (1, 4)))
HERE = GuestDisk("p", "d0", 64, format="qcow2", file="top", identity=(1, 9), below=(MIDDLE, BASE))
THERE = replace(HERE, file="over", identity=(1, 8), names_backing=True)


def below(*layers: LowerLayer) -> GuestDisk:
    return replace(THERE, below=layers)


def found(there: GuestDisk, *, trusted: bool = False) -> dict[str, str]:
    return dict(backing_differs(HERE, there, trusted=trusted))


@pytest.mark.parametrize("trusted", [False, True])
def test_the_very_same_files_speak_against_nothing(trusted: bool) -> None:
    assert found(THERE, trusted=trusted) == {}


def test_of_one_layer_all_is_copied() -> None:
    alone = replace(HERE, below=())
    assert list(backing_differs(alone, replace(THERE, below=()), trusted=False)) == []


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ((BASE,), "on 2 images, there on 1"),
        ((MIDDLE, replace(BASE, files=((7, 2),))), "base and base are not the same file"),
        ((replace(MIDDLE, files=((1, 3),)), BASE), "middle and middle are not the same file"),
        ((MIDDLE, replace(BASE, part=(512, None))), "are not the same file"),
        ((MIDDLE, replace(BASE, files=None)), "which files base and base are"),
        ((MIDDLE, replace(BASE, format="qcow2")), "one file, opened in two ways"),
        ((MIDDLE, replace(BASE, size=32)), "one file, opened in two ways"),
    ],
)
def test_what_is_not_seen_takes_the_users_word(layers: tuple[LowerLayer, ...], why: str) -> None:
    there = below(*layers)
    said = found(there)
    assert list(said) == ["backing-unproven"]
    assert why in said["backing-unproven"]
    assert found(there, trusted=True) == {}


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    ("there", "name", "word"),
    [
        (below(), "backing-missing", "lies on none"),
        (replace(THERE, format="qed"), "backing-missing", "is qed"),
        (below(replace(MIDDLE, size=32), BASE), "backing-size", "has 64 bytes, and 32"),
        (replace(THERE, names_backing=False), "backing-unnamed", "header of over"),
    ],
)
def test_what_no_word_mends(trusted: bool, there: GuestDisk, name: str, word: str) -> None:
    said = found(there, trusted=trusted)
    assert list(said) == [name]
    assert word in said[name]


def test_all_files_of_a_vm_are_its_own() -> None:
    assert own_images(Machine((7, 2, 0), "pc", disks=(HERE,))) == {
        (1, 9): "top",
        (1, 3): "middle",
        (1, 4): "middle",
        (1, 2): "base",
    }


@pytest.mark.parametrize("terms", [DiskTerms(False, "top"), DiskTerms(same_backing=True)])
def test_what_does_not_go_together(terms: DiskTerms) -> None:
    with pytest.raises(RequestError):
        terms.check()
    DiskTerms(layers="top", same_backing=True).check()
