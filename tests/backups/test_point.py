"""What a point file says, read back; which backup somebody means; what files are called."""

import json
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from backuppoints import disk, point
from hypothesis import given
from hypothesis import strategies as st
from oldrecords import BACKUP_POINT

from qmpblock.backups.point import (
    LowerFile,
    Point,
    every_image,
    find_point,
    image_names,
    images_of,
    nearest_with,
    restored_names,
    when_of,
)
from qmpblock.errors import NotFoundError, RequestError
from qmpblock.versioned import UnreadableError

ONE = point("20261130T110500Z", [disk("vd0", "20261130T110500Z-vd0.qcow2")])
TWO = point(
    "20261130T120500Z",
    [disk("vd0", "20261130T120500Z-vd0.qcow2", parent="20261130T110500Z-vd0.qcow2")],
)


def through_a_file(one):
    """Return a point as a file holds it."""
    return json.loads(json.dumps(one.as_json()))


def test_what_was_written_is_read():
    document = through_a_file(TWO)
    assert document["format"] == 1
    assert Point.from_json(document, TWO.when) == TWO


def test_what_the_disk_lay_on_is_read():
    lower = LowerFile("/i/base", "raw", 512, 0, "seen", length=512, modified=-1, inode=1 << 63)
    one = replace(ONE, disks=(replace(ONE.disks[0], lower=(lower,)),))
    assert Point.from_json(through_a_file(one), one.when) == one


def test_what_an_older_version_wrote_says_nothing_of_that():
    assert Point.from_json(json.loads(BACKUP_POINT), ONE.when).disks[0].lower is None


def test_what_a_newer_version_adds_is_kept():
    lower = LowerFile("/i/base", "raw", 512, 0, "seen")
    one = replace(ONE, disks=(replace(ONE.disks[0], lower=(lower,)),))
    document = through_a_file(one) | {"later": 1}
    document["disks"][0]["later"] = {"deep": 2}
    document["disks"][0]["lower"][0]["later"] = 3
    read = Point.from_json(document, ONE.when)
    assert through_a_file(read) == document


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": 99}, "of format 99"),
        ({"backups": "../x"}, "ids"),
        ({"id": ""}, "ids"),
        ({"when": "20261130T110501Z"}, "is called"),
        ({"disks": []}, "no disk"),
        ({"time": "yesterday"}, "time"),
        ({"time": "2026-11-30T11:05:00"}, "time"),  # of which zone?
        ({"vm": None}, "BackedUpVM"),
    ],
)
def test_what_is_none(changed, said):
    with pytest.raises(UnreadableError, match=said):
        Point.from_json(through_a_file(ONE) | changed, ONE.when)


@pytest.mark.parametrize(
    "changed",
    [
        {"file": "../../etc/passwd"},
        {"file": ".hidden"},
        {"file": ""},
        {"file": "nbd:host:1"},
        {"parent": "/dev/sda"},
        {"parent": "20261130T110500Z-vd0.qcow2"},  # itself
        {"size": -1},
        {"digest": "0" * 63},
        {"digest": 1},
        {"persistent": 1},
    ],
)
def test_what_no_backup_says_of_a_disk(changed):
    document = through_a_file(ONE)
    document["disks"][0] |= changed
    with pytest.raises(UnreadableError):
        Point.from_json(document, ONE.when)


def test_the_chain_of_an_image():
    files = [one.file for one in images_of(every_image([ONE, TWO]), "20261130T120500Z-vd0.qcow2")]
    assert files == ["20261130T120500Z-vd0.qcow2", "20261130T110500Z-vd0.qcow2"]


def test_a_chain_of_thousands():
    """Hourly increments of half a year: nobody compares each image with all others."""
    names = [f"{number}.qcow2" for number in range(5000)]
    parents = [None, *names[:-1]]
    both = zip(names, parents, strict=True)
    points = [point(name, [disk("a", name, parent=parent)]) for name, parent in both]
    every, began = every_image(points), time.process_time()
    assert [one.file for one in images_of(every, names[-1])] == names[::-1]
    assert time.process_time() - began < 2


def test_a_chain_whose_end_nobody_tells_of():
    with pytest.raises(RequestError, match="no backup tells of 20261130T110500Z-vd0"):
        images_of(every_image([TWO]), "20261130T120500Z-vd0.qcow2")


def test_a_chain_without_an_end():
    loop = point(
        "x", [disk("a", "a.qcow2", parent="b.qcow2"), disk("b", "b.qcow2", parent="a.qcow2")]
    )
    with pytest.raises(RequestError, match="lie on itself"):
        images_of(every_image([loop]), "a.qcow2")


@pytest.mark.parametrize(
    ("at", "which"),
    [
        (None, TWO),
        (ONE.when, ONE),
        (ONE.id, ONE),
        ("20261130T120500Z", TWO),
        ("2026-11-30T11:59:59Z", ONE),
        ("2026-11-30T12:05:00.249Z", ONE),
        ("2026-11-30T12:05:00.250Z", TWO),  # not younger
        ("2026-11-30T12:06:00+00:00", TWO),
        ("2026-11-30T14:04:00+02:00", ONE),
        ("20261201T000000Z", TWO),  # a time, too
        ("2027-01-01", TWO),
    ],
)
def test_which_backup_is_meant(at, which):
    assert find_point([ONE, TWO], at) == which


@pytest.mark.parametrize("at", ["2026-11-30T11:00:00Z", "20261130T110500Z-7", "1990-01-01"])
def test_a_backup_that_there_is_not(at):
    with pytest.raises(NotFoundError) as caught:
        find_point([ONE, TWO], at)
    assert caught.value.candidates == (ONE.when, TWO.when)


@pytest.mark.parametrize("at", ["newest", "", "12", "2026-13-01"])
def test_what_is_no_time(at):
    with pytest.raises(RequestError, match="neither a backup's name nor a time"):
        find_point([ONE, TWO], at)


def test_a_backup_of_a_disk():
    assert ONE.disk("vd0") == ONE.disk("/machine/peripheral/vd0")
    with pytest.raises(NotFoundError) as caught:
        ONE.disk("vd1")
    assert caught.value.candidates == ("vd0",)


def test_which_backup_has_a_disk_that_another_has_not():
    """The newest before it, for that is not younger; else the first after it."""
    points = [
        point(f"20261130T1{number}0500Z", [disk(name, f"{number}.qcow2") for name in names])
        for number, names in enumerate([("vd0", "vd1"), ("vd1",), ("vd0",), ("vd2",), ("vd2",)])
    ]

    def nearest(at, name):
        found = nearest_with(points, points[at], name)
        return None if found is None else points.index(found)

    assert nearest(2, "vd1") == 1
    assert nearest(4, "vd0") == 2
    assert nearest(1, "/machine/peripheral/vd0") == 0
    assert nearest(0, "vd2") == 3
    assert nearest(4, "vd9") is None


def test_two_backups_of_one_second():
    moment = datetime(2026, 11, 30, 11, 5, 0, 999, tzinfo=UTC)
    taken = []
    for _ in range(3):
        taken.append(when_of(moment, taken))
    assert taken == ["20261130T110500Z", "20261130T110500Z-2", "20261130T110500Z-3"]


@given(st.lists(st.text(max_size=150), max_size=5))
def test_files_of_disks_called_anything(disks):
    when = "20261130T110500Z"
    names = image_names(when, disks)
    assert len(set(names)) == len(disks)
    for name in names:
        one = replace(ONE.disks[0], file=name)
        document = through_a_file(replace(ONE, disks=(one,)))
        assert Point.from_json(document, when).disks[0].file == name
        assert name.startswith(f"{when}-")
        assert len(name.encode()) < 240  # with .partial


def test_what_is_restored_keeps_its_format():
    disks = [
        replace(disk("vd0", "x.qcow2"), format="raw"),
        replace(disk("vd0", "y.qcow2"), format="raw"),
        replace(disk("/machine/unattached/device[16]", "z.qcow2"), format="qed"),
    ]
    assert restored_names(disks) == ["vd0.raw", "vd0-2.raw", "machine_unattached_device_16.qcow2"]
