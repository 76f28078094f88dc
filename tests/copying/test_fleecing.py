"""How much of what a disk held may be kept. With QEMUs: live/test_points.py."""

import os
from types import SimpleNamespace

import pytest

from qmpblock.copying import fleecing
from qmpblock.errors import NoRoomError, RequestError
from qmpblock.host.contents import Contents

MIB = 1 << 20
HEADER = Contents(256 << 10, ())
FILE = "/i/d0.qmpblock-deadbeef-fleece-0"


def limit(given=None, *, size=64 * MIB, free=1 << 40, disks=1):
    found = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "statvfs", lambda place: {"/i": found}[place])
        return fleecing._limit(FILE, size, HEADER, given, disks)


def test_it_is_half_of_what_is_free_shared_by_the_disks():
    assert limit(free=60 * MIB) == 30 * MIB
    assert limit(free=60 * MIB, disks=3) == 10 * MIB


@pytest.mark.parametrize("given", [None, 1 << 50])
def test_it_is_never_more_than_the_whole_disk_and_its_map(given):
    assert 64 * MIB < limit(given) < 70 * MIB
    assert limit(given) % (64 << 10) == 0


def test_what_is_given_counts_in_whole_clusters():
    assert limit(10 * MIB + 1, free=0) == 10 * MIB


def test_too_little_is_refused():
    with pytest.raises(RequestError, match=r"at least 4\.25M for each"):
        limit(4 * MIB)
    with pytest.raises(NoRoomError, match="half of what is free is 4M for each"):
        limit(free=8 * MIB)


def test_what_has_no_room_any_more_is_named(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.write_bytes(b"x" * MIB)
    free = SimpleNamespace(f_bavail=1 << 20, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda place: free)
    item = SimpleNamespace(kept=str(kept), limit=MIB)
    roomy = SimpleNamespace(kept=str(kept), limit=64 * MIB)
    gone = SimpleNamespace(kept=str(tmp_path / "gone"), limit=0)
    assert fleecing.Plan("", (roomy, gone)).without_room() is None
    assert fleecing.Plan("", (roomy, item)).without_room() == (
        f"what the guest overwrote had no room any more in {kept}"
    )
    free.f_bavail = 1
    assert str(kept) in fleecing.Plan("", (roomy,)).without_room()
