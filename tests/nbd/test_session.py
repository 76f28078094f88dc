"""Which requests may be sent on a session."""

from __future__ import annotations

import pytest

from qmpblock.errors import RangeError, UnsupportedError
from qmpblock.nbd.session import Session
from qmpblock.nbd.wire import BlockSizes, Command, CommandFlag, HeaderStyle, TransmissionFlag

NONE = CommandFlag.NONE
EVERYTHING = ~TransmissionFlag.READ_ONLY


def _session(**more: object) -> Session:
    settings: dict[str, object] = {
        "export": "", "size": 1 << 40, "flags": EVERYTHING, "style": HeaderStyle.STRUCTURED,
        "contexts": {0: "base:allocation"}, **more,
    }  # fmt: skip
    return Session(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, Command.CACHE, Command.TRIM])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(-512, 512), (0, 0), (0, -512), (512, 1 << 40), (1 << 40, 512), (256, 512), (512, 256)],
)
def test_a_range_is_refused(command: Command, offset: int, length: int):
    session = _session(block_sizes=BlockSizes(512, 4096, 1 << 25))
    with pytest.raises(RangeError):
        session.check(command, offset, length, NONE)


@pytest.mark.parametrize(
    ("style", "command", "limit"),
    [
        (HeaderStyle.STRUCTURED, Command.READ, 1 << 25),
        (HeaderStyle.EXTENDED, Command.WRITE, 1 << 25),
        (HeaderStyle.EXTENDED, Command.CACHE, 1 << 25),
        (HeaderStyle.STRUCTURED, Command.BLOCK_STATUS, (1 << 32) - (2 << 20)),
        (HeaderStyle.STRUCTURED, Command.WRITE_ZEROES, (1 << 32) - (2 << 20)),
        (HeaderStyle.EXTENDED, Command.BLOCK_STATUS, 1 << 40),
        (HeaderStyle.EXTENDED, Command.TRIM, 1 << 40),
    ],
)
def test_a_length_has_a_limit(style: HeaderStyle, command: Command, limit: int):
    session = _session(style=style, block_sizes=BlockSizes(512, 4096, 0xFFFFFFFF))
    session.check(command, 0, limit, NONE)
    with pytest.raises(RangeError):
        session.check(command, 0, limit + 512, NONE)


def test_an_odd_payload_limit_is_rounded_to_whole_blocks():
    assert _session(block_sizes=BlockSizes(512, 4096, 5000)).limits.payload == 4608


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
def test_a_read_only_export_takes_no_change(command: Command):
    session = _session(flags=EVERYTHING | TransmissionFlag.READ_ONLY)
    with pytest.raises(UnsupportedError, match="read-only"):
        session.check(command, 0, 512, NONE)
    session.check(Command.CACHE, 0, 512, NONE)  # not a change: it allocates what is there


@pytest.mark.parametrize(
    ("command", "flags", "missing"),
    [
        (Command.FLUSH, NONE, TransmissionFlag.SEND_FLUSH),
        (Command.TRIM, NONE, TransmissionFlag.SEND_TRIM),
        (Command.CACHE, NONE, TransmissionFlag.SEND_CACHE),
        (Command.WRITE_ZEROES, NONE, TransmissionFlag.SEND_WRITE_ZEROES),
        (Command.WRITE_ZEROES, CommandFlag.FAST_ZERO, TransmissionFlag.SEND_FAST_ZERO),
        (Command.WRITE, CommandFlag.FUA, TransmissionFlag.SEND_FUA),
        (Command.READ, CommandFlag.DF, TransmissionFlag.SEND_DF),
    ],
)
def test_what_was_not_offered_is_refused(
    command: Command, flags: CommandFlag, missing: TransmissionFlag
):
    _session().check(command, 0, 512, flags)
    with pytest.raises(UnsupportedError, match=command.name):
        _session(flags=EVERYTHING & ~missing).check(command, 0, 512, flags)


def test_no_context_no_block_status():
    with pytest.raises(UnsupportedError, match="context"):
        _session(contexts={}).check(Command.BLOCK_STATUS, 0, 512, NONE)
