"""A migration's timeline: which rows it has, and what is drawn large."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmpblock.cli.migration import said_of_guest
from qmpblock.cli.migrationtimeline import timeline_of
from qmpblock.migration.job import (
    MemoryPass,
    MigratedDisk,
    MigrationResult,
    MirrorCourse,
    PhaseTime,
)

MIB = 1 << 20
COURSE = MirrorCourse(1.0, 4.0, 2.0 * MIB, ((1.0, 0), (5.0, 8 * MIB), (7.0, 9 * MIB)))
RESULT = MigrationResult(
    disks=(MigratedDisk("vd0", "a", "b", 64 * MIB, 9 * MIB, COURSE),),
    seconds=7.5,
    downtime=0.03,
    qemu_downtime=0.02,
    longest_stall=0.031,
    stopped=6.99,
    resumed=7.021,
    transferred=4 * MIB,
    bitmaps=(),
    phases=(
        PhaseTime("checked", 1.0),
        PhaseTime("mirroring", 5.0, 8 * MIB, 1.6 * MIB),
        PhaseTime("memory", 1.0, 4 * MIB, 4.0 * MIB),
        PhaseTime("held", 0.01),
        PhaseTime("sent", 0.01),
        PhaseTime("handed", 0.48),
    ),
    passes=(MemoryPass(1, 6.0, 0.9, 5 * MIB, 3 * MIB, 3.0 * MIB),),
    source="postmigrate",
    warnings=(),
)


def test_what_the_guest_stands_in_is_drawn_large() -> None:
    line = timeline_of(RESULT)
    assert [row.label for row in line.rows] == [
        *("checked", "mirroring", "vd0", "memory", "passes")
    ]
    assert line.moment == (6.99, 7.021)
    assert [(row.label, row.said) for row in line.within] == [
        ("memory", "10 ms: QEMU flushes the disks"),
        ("held", "10 ms: the mirrors end"),
        ("sent", "10 ms: the rest is sent"),
        ("handed", "1 ms: the guest goes on"),
    ]
    assert line.title == "migration: 7.5 s, the guest stood for 31 ms"
    disk = line.rows[2]
    assert (disk.said, disk.heights) == ("9M, 2M/s", COURSE.moments)
    assert [(bar.start, bar.stop) for bar in disk.bars] == [(1.0, 5.0), (5.0, 7.0)]


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ("running", "the guest runs at the destination; it stood for 31 ms"),
        ("paused", "as somebody else had it at the source (cont has it go on)"),
        ("io-error", "io-error there, for a request of its disk failed (cont has it try that"),
        ("suspended", "suspended there, as it was (system_wakeup wakes it)"),
        ("watchdog", "watchdog there, as it had stopped at the source (see why)"),
    ],
)
def test_what_is_said_of_the_guest(shown: str, words: str) -> None:
    assert words in said_of_guest(replace(RESULT, downtime=0.031, destination=shown))


@pytest.mark.parametrize("shown", ["paused", "io-error"])
def test_one_that_stays_stopped_has_no_end_of_it(shown: str) -> None:
    line = timeline_of(replace(RESULT, resumed=None, longest_stall=0.0, destination=shown))
    assert line.moment is None
    assert line.title == f"migration: 7.5 s, the guest stays {shown}, as it had stopped"
    assert [row.label for row in line.rows][-2:] == ["sent", "handed"]


def test_what_it_was_paused_in_is_drawn_large_too() -> None:
    line = timeline_of(replace(RESULT, stopped=5.5, longest_stall=1.521, paused=1.5))
    assert [(row.label, row.said) for row in line.within][:3] == [
        ("mirroring", "500 ms: disks are copied"),
        ("memory", "1 s: it is paused, and the memory is sent"),
        ("held", "10 ms: the mirrors end"),
    ]


def test_where_nobody_said_that_it_stood_all_phases_are_rows() -> None:
    line = timeline_of(replace(RESULT, stopped=None, passes=(), disks=()))
    assert [row.label for row in line.rows] == [one.phase for one in RESULT.phases]
    assert (line.moment, line.within) == (None, ())
