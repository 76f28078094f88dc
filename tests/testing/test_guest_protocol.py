"""The tiny guest's answers, recorded from a real one, and what is no answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.errors import RequestError
from qmpblock.testing.guest_protocol import (
    GuestDisk,
    Latency,
    StressProgress,
    parse_check,
    parse_checksum,
    parse_ejected,
    parse_hello,
    parse_latency,
    parse_progress,
)

HELLO = "version=3 disk=0,00:02.0,blk,131072,fdz disk=3,01:00.0/3:2,scsi,12884901888,rfdz"


def test_hello_lists_the_disks() -> None:
    hello = parse_hello(HELLO)
    assert hello.version == 3
    assert hello.disks == (
        GuestDisk(0, "00:02.0", "blk", 64 << 20, frozenset("fdz")),
        GuestDisk(3, "01:00.0/3:2", "scsi", 6 << 40, frozenset("rfdz")),
    )
    assert hello.at("01:00.0/3:2").number == 3
    with pytest.raises(RequestError, match=r"no disk at 'mmio\.1' \(it sees: 00:02\.0, 01"):
        hello.at("mmio.1")


def test_hello_without_disks_and_without_features() -> None:
    assert parse_hello("version=3").disks == ()
    (disk,) = parse_hello("version=3 disk=0,mmio.23,blk,8,").disks
    assert disk.features == frozenset()


def test_progress_of_a_good_run() -> None:
    text = "running=1 issued=1311 acked=1298 flushed=1195 reads=343 bad=0 errors=0 waiting_us=31890"
    assert parse_progress(text) == StressProgress(
        running=True,
        issued=1311,
        acked=1298,
        flushed=1195,
        reads=343,
        bad=0,
        errors=0,
        waiting_us=31890,
    )


def test_progress_of_a_bad_run() -> None:
    progress = parse_progress(
        "running=0 issued=9 acked=8 flushed=0 reads=1 bad=1 errors=1 waiting_us=0 "
        "status=517 bad_lba=800 bad_found=0 bad_expected=7"
    )
    assert progress.status == 517
    assert (progress.bad_lba, progress.bad_found, progress.bad_expected) == (800, 0, 7)


def test_the_other_answers() -> None:
    assert parse_latency("requests=25045 mean_us=407 longest_us=118502 waiting_us=9") == Latency(
        25045, 407, 118502, 9
    )
    assert Latency(1, 2, 3, 4).held_us == 4
    assert Latency(1, 2, 5, 4).held_us == 5
    assert parse_checksum("crc32=f65cdb08") == 0xF65CDB08
    assert parse_check("blocks=1106 bad=0") == (1106, 0)
    ejected, left = parse_ejected("ejected=1 version=3 disk=0,00:02.0,blk,131072,fdz")
    assert (ejected, len(left.disks)) == (1, 1)


PARSERS = [
    parse_hello,
    parse_progress,
    parse_latency,
    parse_checksum,
    parse_check,
    parse_ejected,
]


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "version=",
        "version=3 version=4",
        "version=x",
        "version=3 disk=0,00:02.0,floppy,8,f",
        "version=3 disk=0,\x1b[2J,blk,8,f",
        "issued=1",
        "blocks=-1 bad=0",
        "blocks=1" + "0" * 30 + " bad=0",
        "crc32=F65CDB08",
        "crc32=0",
    ],
)
def test_anything_else_is_a_value_error(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(ValueError, match=r"no|describes"):
        parse(text)


@given(st.text(alphabet="verison=disk0123456789,:. -\x1bé"), st.sampled_from(PARSERS))
def test_no_text_raises_anything_but_value_error(text: str, parse: Callable[[str], object]) -> None:
    with contextlib.suppress(ValueError):
        parse(text)
