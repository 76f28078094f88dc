"""What a backup would be, from what is decided and how its disks would be copied."""

from backuppoints import bitmap_of, disk, point

from qmpblock.backups.decision import SeenDisk, decide
from qmpblock.backups.planned import planned_backup
from qmpblock.copying.planned import PlannedCopy, PlannedDisk, Room
from qmpblock.graph.model import Bitmap
from qmpblock.names import end_bitmap

M = 1 << 20
SIZE = 64 * M
LAST = point("20261130T110500Z", [disk("vd0", "a.qcow2"), disk("vd1", "b.qcow2")])
NAME = bitmap_of(LAST)
BITMAPS = (
    Bitmap(NAME, 65536, recording=True, persistent=True, count=M),
    Bitmap(end_bitmap(NAME), 65536, recording=False, persistent=True, count=65536),
)


def copied(name, write):
    room = Room("/s", M, 2 * M)
    return PlannedDisk(
        name, f"/i/{name}", f"/s/W-{name}.qcow2", "qcow2", SIZE, 1, write, room, None
    )


def seen(name, *bitmaps):
    return SeenDisk(name, f"/machine/peripheral/{name}", SIZE, f"/i/{name}", bitmaps)


def test_each_disk_has_what_was_decided_and_what_it_takes():
    decisions = [decide([LAST], seen("vd0", *BITMAPS), {}), decide([LAST], seen("vd1"), {})]
    copies = (copied("vd0", 3), copied("vd1", None))
    copy = PlannedCopy("start", "views", "so", ("it waits",), copies, 5, 2.0, True, ("w",))
    found = planned_backup("/s/b", "W", decisions, copy, new=True)
    one, other = found.disks
    assert (one.kind, one.reason, one.parent) == ("incremental", "", "a.qcow2")
    assert (other.kind, other.reason, other.parent) == ("full", decisions[1].reason, None)
    # Its directory is not there yet: the copy is of what that will lie in.
    assert [one.target for one in found.disks] == ["/s/b/W-vd0.qcow2", "/s/b/W-vd1.qcow2"]
    assert (one.room, one.write, other.write) == (copies[0].room, 3, None)
    assert found.write is None
    assert (found.way, found.why, found.guest) == ("views", "so", ("it waits",))
    assert (found.speed, found.seconds, found.verify) == (5, 2.0, True)
    said = f"the backup of vd1 would be full: {other.reason}"
    assert found.warnings == (said, "w")
    assert found.new


def test_the_bytes_of_all():
    both = [decide([], seen(name), {}) for name in ("vd0", "vd1")]
    copy = PlannedCopy("start", "views", "", (), (copied("vd0", 3), copied("vd1", 4)))
    assert planned_backup("/s", "W", both, copy, new=False).write == 7
