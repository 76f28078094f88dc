"""Incremental or full: each thing that has to be known for an increment, missing once."""

from dataclasses import replace

import pytest
from backuppoints import SIZE, bitmap_of, disk, point

from qmpblock.backups.decision import SeenDisk, check_vm, decide, fallen_back, parents_wanted
from qmpblock.backups.lower import SEEN
from qmpblock.backups.point import LowerFile
from qmpblock.errors import RequestError
from qmpblock.graph.model import Bitmap
from qmpblock.names import end_bitmap, open_bitmap

GRAIN = 64 << 10
FIRST = point("20261130T110500Z", [disk("vd0", "a.qcow2")], number=1)
LAST = point("20261130T120500Z", [disk("vd0", "b.qcow2", parent="a.qcow2")], number=2)
POINTS = [FIRST, LAST]
BITMAP = Bitmap(bitmap_of(LAST), GRAIN, recording=True, persistent=True, count=3 * GRAIN)
END = Bitmap(end_bitmap(bitmap_of(LAST)), GRAIN, recording=False, persistent=True, count=GRAIN)
OLDER = (
    replace(BITMAP, name=bitmap_of(FIRST)),
    replace(END, name=end_bitmap(bitmap_of(FIRST))),
)
PATH = "/machine/peripheral/vd0"


def seen(*bitmaps, size=SIZE, below=(), source="/i/d0.qcow2", sources=(), path=PATH):
    return SeenDisk("vd0", path, size, source, bitmaps, frozenset(below), frozenset(sources))


def test_an_increment_of_the_last():
    found = decide(POINTS, seen(BITMAP, END), {})
    assert (found.kind, found.parent, found.bitmap) == ("incremental", LAST.disks[0], BITMAP.name)
    assert (found.reason, found.fell_back) == ("", False)


def test_what_an_increment_holds_at_most():
    """What was written, and the granule that vouches for it, zeros included."""
    assert decide(POINTS, seen(BITMAP, END), {}).written == 4 * GRAIN
    assert decide(POINTS, seen(replace(BITMAP, count=SIZE), END), {}).written == SIZE
    assert decide(POINTS, seen(BITMAP, END), {}, "full").written is None


def test_bitmaps_that_will_be_gone_do_not_count():
    left = seen(*OLDER, BITMAP, END).without({BITMAP.name, END.name})
    assert left == seen(*OLDER)
    assert decide(POINTS, left, {}).parent == FIRST.disks[0]


def test_the_warnings_are_of_what_was_to_be_expected():
    first, full = decide([], seen(), {}), decide(POINTS, seen(), {})
    for verb in ("is", "would be"):
        said = (f"the backup of vd0 {verb} full: {full.reason}",)
        assert fallen_back([first, full], verb) == said


def test_an_increment_of_one_before():
    """What was made last was removed, or not brought back: the bitmap tells which it is of."""
    bitmap, end = OLDER
    assert decide(POINTS, seen(bitmap, end), {}).parent == FIRST.disks[0]
    assert decide([FIRST], seen(bitmap, end), {}).parent == FIRST.disks[0]
    both = decide(POINTS, seen(bitmap, end, BITMAP, END), {})
    assert both.parent == LAST.disks[0]


@pytest.mark.parametrize(
    ("disk_", "said"),
    [
        (seen(), "is not there: QEMU or its host died"),
        (seen(END), "is not there"),
        (seen(BITMAP, END, size=SIZE + GRAIN), "has 67174400 bytes, and had 67108864"),
        (seen(replace(BITMAP, inconsistent=True), END), "died since the last backup"),
        (seen(BITMAP, replace(END, inconsistent=True)), "died since the last backup"),
        (seen(replace(BITMAP, recording=False), END), "somebody stopped"),
        (seen(replace(BITMAP, busy=True), END), "somebody else uses"),
        (seen(BITMAP), "made smaller meanwhile, or another image lies below"),
        (seen(BITMAP, replace(END, count=0)), "made smaller meanwhile"),
        (seen(below=[BITMAP.name]), "a snapshot was taken"),
    ],
)
def test_what_is_not_known(disk_, said):
    found = decide(POINTS, disk_, {})
    assert found.kind == "full"
    assert said in found.reason
    assert found.fell_back
    with pytest.raises(RequestError, match="cannot be incremental") as caught:
        decide(POINTS, disk_, {}, "incremental")
    assert said in caught.value.message


BASE = LowerFile("/i/base", "raw", SIZE, 0, SEEN, SIZE, 1, 1)
OPENED = replace(END, name=open_bitmap(bitmap_of(LAST)), persistent=False)


def test_what_the_disk_lies_on_is_not_what_it_was():
    """Nor is an older backup taken, of which it is; but what QEMU did while it had it open is."""
    points = [FIRST, replace(LAST, disks=(replace(LAST.disks[0], lower=(BASE,)),))]
    found = decide(points, replace(seen(BITMAP, END), lower=(replace(BASE, modified=2),)), {})
    assert (found.kind, found.fell_back) == ("full", True)
    assert found.reason == "the backing image /i/base was changed since the last backup"
    bare = replace(seen(BITMAP, END), lower=())
    assert decide(points, bare, {}).kind == "full"
    assert decide(points, replace(bare, bitmaps=(BITMAP, END, OPENED)), {}).kind == "incremental"
    stored = replace(OPENED, persistent=True)  # as by a migration with `transform`
    assert decide(points, replace(bare, bitmaps=(BITMAP, END, stored)), {}).kind == "full"
    living = tuple(replace(one, persistent=False) for one in (BITMAP, END))
    assert decide(points, replace(bare, bitmaps=living), {}).kind == "incremental"


def test_what_it_would_lie_on_is_not_what_it_was():
    found = decide(POINTS, seen(BITMAP, END), {"b.qcow2": "a.qcow2 is gone"})
    assert (found.kind, found.reason) == ("full", "a.qcow2 is gone")


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (disk("vd0", "b.qcow2", persistent=False), "started anew, and the image, qcow2, did not"),
        (disk("vd0", "b.qcow2", bitmap=""), "no dirty bitmap could be made"),
    ],
)
def test_a_bitmap_that_could_not_be_kept(last, said):
    found = decide([replace(LAST, disks=(last,))], seen(), {})
    assert said in found.reason


def test_the_first_of_a_disk():
    for points in ([], [replace(LAST, disks=(disk("vd1", "c.qcow2"),))]):
        found = decide(points, seen(BITMAP, END), {})
        assert (found.kind, found.fell_back) == ("full", False)
        assert "no backup of this disk yet" in found.reason


def test_a_disk_that_was_left_out_of_the_last():
    """Its bitmap is of the one before, in which it was."""
    bitmap, end = OLDER
    other = replace(LAST, disks=(disk("vd1", "c.qcow2"),))
    assert decide([FIRST, other], seen(bitmap, end), {}).parent == FIRST.disks[0]


def test_a_full_one_that_is_asked_for():
    found = decide(POINTS, seen(BITMAP, END), {}, "full")
    assert (found.kind, found.fell_back) == ("full", False)


def test_which_images_are_looked_at():
    assert parents_wanted(POINTS, seen(BITMAP, END)) == (LAST.disks[0],)
    assert parents_wanted(POINTS, seen()) == ()


UUID = "00000000-0000-0000-0000-00000000000"
NONE = f"{UUID}0"


@pytest.mark.parametrize(
    ("name", "uuid", "disk_", "same"),
    [
        ("web", f"{UUID}1", seen(), True),
        ("other", f"{UUID}1", seen(), True),  # it may be called something else by now
        ("web", f"{UUID}2", seen(BITMAP, END), False),  # a clone has the bitmaps, too
        ("web", NONE, seen(), True),
        ("other", NONE, seen(), False),
        ("other", NONE, seen(BITMAP, END), True),
        ("", "unknown", seen(), True),  # by its image
        ("", NONE, seen(source="/i/another"), False),
        ("", NONE, seen(source="/i/another", sources=["/i/d0.qcow2"]), True),  # a snapshot since
        ("other", NONE, seen(source="/i/another", below=[BITMAP.name]), True),
    ],
)
def test_whose_directory_it_is(name, uuid, disk_, same):
    points = [point("20261130T120500Z", LAST.disks, number=2, uuid=f"{UUID}1")]
    if same:
        check_vm(points, name, uuid, [disk_], "/b")
    else:
        with pytest.raises(RequestError, match="the backups in /b are of") as caught:
            check_vm(points, name, uuid, [disk_], "/b")
        assert caught.value.standing == "nothing was touched"


def test_an_empty_directory_is_anybodys():
    check_vm([], "web", NONE, [seen()], "/b")


def test_a_disk_of_no_bytes():
    """Nobody is told each time that there was something to be expected; or refused it."""
    empty = seen(size=0)
    for kind in (None, "incremental"):
        found = decide(POINTS, empty, {}, kind)
        assert (found.kind, found.reason, found.fell_back) == ("full", "it has no bytes", False)


def test_images_that_changed_places():
    """Each has a bitmap of the last backup, of the other disk."""
    last = point("20261130T120500Z", [disk("vd0", "b.qcow2"), disk("vd1", "c.qcow2")], number=2)
    name = bitmap_of(last, 1)
    other = (replace(BITMAP, name=name), replace(END, name=end_bitmap(name)))
    found = decide([last], seen(*other), {})
    assert (found.kind, found.fell_back) == ("full", True)
    assert f"{bitmap_of(last)}, is not there" in found.reason
    path = "/machine/peripheral/vd1"
    assert decide([last], seen(*other, path=path), {}).parent == last.disks[1]
