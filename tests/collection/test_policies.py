"""The policies that the modules write are what the command reads; the sums of what it plans."""

import pytest
from collections_of_ansible import part

from qmpblock.policy import copyentry
from qmpblock.policy.file import parse_policy

policies = part("module_utils.policies")
copy = part("modules.copy")

DISK = dict.fromkeys(["backing", "base", "allocation", "like", "like_format", "ranges"])
DISK |= dict.fromkeys(policies._OF_DISK)
COPY = {
    **dict.fromkeys(policies._OF_COPY),
    **dict.fromkeys(policies._FLAGS, False),
}


def read(policy):
    return parse_policy(policies.text(policy))


def of_disk(**options):
    (one,) = read(policies.of_disk({"address": "/vm", "disk": "vd0", **DISK, **options})).disks
    return one


def of_copies(**options):
    params = {"address": "/vm", "copies": {"vd0": "/copy"}, **COPY, **options}
    (one,) = read(policies.of_copies(params)).copies
    return one


def test_a_disk_that_is_to_stay_as_it_is():
    one = of_disk()
    assert (one.address, one.disk, one.backing, one.allocation) == ("/vm", "vd0", "keep", "as-is")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"backing": "independent", "allocation": "full"}, "backing independent, allocation full"),
        ({"base": "/srv/base.qcow2"}, "backing base /srv/base.qcow2, allocation as-is"),
        ({"like": "/srv/t", "like_format": "raw"}, "backing keep, allocation like /srv/t"),
        ({"backing": "keep", "ahead": "2G"}, "backing keep, allocation as-is, ahead 2147483648"),
    ],
)
def test_what_a_disk_is_to_be(options, wanted):
    assert of_disk(**options).wanted == wanted


def test_the_rest_of_a_disk():
    ranges = [{"offset": "1M", "length": None}, {"offset": None, "length": "50%"}]
    one = of_disk(allocation="full", ranges=ranges, speed="10M", keep_free="5%")
    assert one.speed == 10 << 20
    assert str(one.keep_free) == "5%"
    assert [(str(part.offset), part.length and str(part.length)) for part in one.parts] == [
        ("1048576", None),
        ("0", "50%"),
    ]


def test_every_name_is_read_as_it_stands():
    name = 'a "quoted": {name}, \u20ac\U0001f600 # \\ no'
    one = of_disk(disk=name)
    assert one.disk == name


def test_copies():
    one = of_copies(at="start", verify=True, latency="20ms", speed="1M", keep_free="1G")
    assert one.targets == (("vd0", "/copy"),)
    assert (one.options.at, one.options.verify, one.options.latency) == ("start", True, 0.02)
    assert one.speed == 1 << 20


def test_no_option_of_a_copy_is_forgotten():
    offered = {*policies._OF_COPY, *policies._FLAGS}
    assert offered == {*copyentry.OPTIONS, "speed", "keep_free"}
    assert set(copy._CHOICES) < offered


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ({"vd0": "/a"}, None),
        ({}, "copies names no disk"),
        ({"vd0": "/a", "vd1": "b"}, "copies: no absolute path: b"),
    ],
)
def test_files_are_absolute(targets, said):
    assert policies.not_absolute(targets, "copies") == said


def extent(start, length, **flags):
    return {
        "start": start,
        "length": length,
        **dict.fromkeys(("present", "zero", "data", "reserved"), False),
        **flags,
    }


PICTURE = {
    "map": [
        extent(0, 4, present=True, data=True),
        extent(4, 8, present=True, zero=True),
        extent(12, 16, zero=True),
    ],
    "layers": [
        {
            "file": "/top",
            "extents": [
                extent(0, 4, present=True, data=True),
                extent(4, 8, present=True, zero=True, reserved=True),
                extent(12, 16, zero=True),
            ],
        }
    ],
}
AHEAD = {"wanted": 100, "room": 30, "reserve": 70, "full": False}


@pytest.mark.parametrize(
    ("ahead", "wanted", "room"),
    [
        (None, False, {}),
        (AHEAD, False, {"ahead": 30}),
        (AHEAD, True, {"ahead": 100}),
        ({**AHEAD, "room": None}, True, {"ahead": None}),
    ],
)
def test_the_sums(ahead, wanted, room):
    planned = {"today": PICTURE, "wanted": PICTURE, "ahead": ahead}
    assert policies.totals(planned, wanted) == {
        "layers": [{"file": "/top", "data": 4, "zero": 8, "reserved": 8}],
        "absent": 16,
        **room,
    }


def test_there_are_no_sums_of_what_cannot_be_looked_at():
    assert policies.totals({"today": None, "wanted": None, "ahead": None}) is None


@pytest.mark.parametrize(
    ("steps", "ahead", "work"),
    [
        ([], None, False),
        ([{"verb": "drop"}], None, True),
        ([], AHEAD, True),
        ([], {**AHEAD, "reserve": 0}, False),
    ],
)
def test_whether_there_is_work(steps, ahead, work):
    assert policies.has_work({"steps": steps, "ahead": ahead}) is work
