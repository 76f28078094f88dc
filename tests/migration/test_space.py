"""Which images can have their host space as it is asked for."""

from dataclasses import replace

import pytest

from qmpblock.errors import RequestError
from qmpblock.migration.diskterms import DiskTerms
from qmpblock.migration.machine import GuestDisk
from qmpblock.migration.space import space_differs

HERE = GuestDisk("p", "d0", 64, format="qcow2", file="top", identity=(1, 9))
THERE = replace(HERE, file="there", format="raw", identity=(1, 8), taken=0, holes=True)
OLD, NEW = (7, 2, 22), (11, 1, 2)


def why(allocation, there=THERE, *, here=HERE, version=OLD):
    return dict(space_differs(here, there, version, allocation)).get("space", "")


@pytest.mark.parametrize("allocation", ["thin", "full", "same"])
def test_a_raw_file_can_have_any(allocation):
    assert why(allocation) == ""


def test_a_qcow2_image_has_all_of_it_from_the_start_or_never():
    there = replace(THERE, format="qcow2", taken=63)
    assert "has 63 bytes of 64" in why("full", there)
    assert why("full", replace(there, taken=64)) == ""
    assert why("same", there) == why("thin", there) == ""
    assert "has 0 bytes" in why("full", replace(there, taken=None))


def test_a_block_device_has_what_it_has():
    there = replace(THERE, identity=(8, None), zeroes="unmap")
    assert why("full", there) == ""
    assert "block device" in why("same", there)
    assert "block device" in why("same", here=replace(HERE, identity=(8, None)))


@pytest.mark.parametrize(("zeroes", "full"), [("on", ""), ("unmap", "are given back")])
def test_zeros_that_are_noticed(zeroes, full):
    there = replace(THERE, zeroes=zeroes)
    assert full in why("full", there)
    assert bool(why("full", there)) is bool(full)
    assert f"detect-zeroes={zeroes}" in why("same", there)


def test_where_zeros_take_space_of_themselves():
    there = replace(THERE, holes=False)
    assert "discard=ignore" in why("same", there)
    assert "discard=ignore" in why("same", replace(there, holes=None))
    assert why("same", there, version=NEW) == why("full", there) == ""


def test_of_an_encrypted_disk_it_is_not_seen():
    assert "encrypted" in why("same", here=replace(HERE, encrypted=True))


@pytest.mark.parametrize(
    "terms", [DiskTerms(False, allocation="full"), DiskTerms(layers="top", allocation="full")]
)
def test_what_does_not_go_together(terms):
    with pytest.raises(RequestError):
        terms.check()
    DiskTerms(layers="top", allocation="same").check()
