"""The lines that say what a copy would be."""

from dataclasses import replace

from qmpblock.cli.plannedcopy import said, said_amount
from qmpblock.copying.planned import PlannedCopy, PlannedDisk, Room

M = 1 << 20
DISK = PlannedDisk(
    "vd0", "/i/d0", "/s/copy", "raw", 16 * M, 2 * M, 3 * M, Room("/s", 4 * M, 9 * M), None
)
COPY = PlannedCopy("end", "mirrors", "it is so", ("it waits",), (DISK,), 2 * M, 1.5)


def test_a_copy_of_the_end():
    assert list(said(COPY)) == [
        "vd0: would be copied to /s/copy, raw, 16M, as it is when the copy ends",
        "  2M to read, 3M to write; room: 4M in /s, where 9M are free",
        "by mirrors: it is so",
        "the guest: it waits",
        "2 s at 2M/s",
    ]


def test_what_is_kept_of_a_copy_of_the_start():
    kept = replace(DISK, kept=Room("/k", 5 * M, 6 * M))
    lines = list(said(replace(COPY, point="start", way="views", disks=(kept,), verify=True)))
    assert lines[0].endswith("as it is when the copy begins; then compared with it")
    assert "is kept in /k, up to 5M; 6M are free" in lines[2]
    lines = list(said(replace(COPY, point="start", way="frozen layers", disks=(kept,))))
    assert "goes to an overlay in /k, where 5M must be free; 6M are free" in lines[2]


def test_zeros_that_count_for_the_speed_are_told_of():
    assert list(said(replace(COPY, seconds=8.0)))[-1] == "8 s at 2M/s, which counts zeros, too"


def test_what_cannot_be_said():
    far = replace(DISK, read=None, write=None, room=None, relayed=True, target="nbd://h:1/\x1bx")
    lines = list(said(replace(COPY, disks=(far,), speed=0, seconds=None)))
    assert lines[1] == "  how much there is to read cannot be told beforehand"
    assert "is not tried beforehand" in lines[2]
    assert "\x1b" not in lines[0]
    assert not any("s at" in line for line in lines)
    assert said_amount(0, 0) == "0 to read, 0 to write"
