"""What an image is called that is not under QEMU's name for it any more."""

import os
from types import SimpleNamespace

import pytest
from imagelocks import lock

from qmpblock.graph.places import FileId, Missing, Place
from qmpblock.host.openfiles import OpenFiles
from qmpblock.host.renamed import name_now

LOST = Missing("is gone", certain=True)


def layer(name):
    return SimpleNamespace(file=f"/old/{name}", storage=SimpleNamespace(name=name))


@pytest.fixture
def image(tmp_path):
    """Have an image open and locked, as QEMU would."""
    path = tmp_path / "image"
    path.touch()
    with path.open("r+b") as file:
        lock(file, 100)
        yield path


def name(place, **others):
    return name_now(layer("a"), OpenFiles(os.getpid()), {"a": place, **others})


def test_the_one_image_that_no_name_leads_to_is_the_one_that_is_lost(image):
    assert name(LOST) == str(image)
    moved = image.rename(image.with_name("again"))
    assert name(LOST) == str(moved)


def test_where_its_name_is_right_or_nothing_can_be_told_it_is_as_qemu_says(image):
    here = Place(FileId.of(image.stat()), *[str(image)] * 3)
    assert name(here) == "/old/a"
    assert name(Missing("cannot be seen")) == "/old/a"
    assert name_now(layer("a"), OpenFiles(os.getpid()), {}) == "/old/a"


def test_of_two_nobody_knows_which(image, tmp_path):
    assert name(LOST, b=LOST) is None
    with (tmp_path / "second").open("w+b") as file:
        lock(file, 100)
        assert name(LOST) is None


def test_a_file_without_a_name_has_none(image):
    image.unlink()
    assert name(LOST) is None


def test_an_image_that_is_another_nodes_is_not_taken_for_it(image):
    there = Place(FileId.of(image.stat()), *[str(image)] * 3)
    assert name(LOST, b=there) is None
