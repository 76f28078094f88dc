"""The journal of a migration: on stable storage, read by any version, never taken for another."""

import json
import os
from pathlib import Path

import pytest

from qmpblock.changes.record import VMIdentity
from qmpblock.errors import Error, RecordError
from qmpblock.migration.journal import MigrationJournal, journals
from qmpblock.migration.record import MigrationRecord, read_record
from qmpblock.migration.states import Phase
from qmpblock.versioned import UnreadableError

RUN = "0123abcd"
UUID = "00000000-0000-0000-0000-000000000000"
HERE = VMIdentity("vm", UUID, 42, 777, "boot", "unix:/run/a")
THERE = VMIdentity("vm", UUID, 43, 778, "boot", "unix:/run/b")
RECORD = MigrationRecord(RUN, HERE, THERE, "pid:[1]")


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPBLOCK_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def only(state):
    [path] = state.glob("*.migration")
    return path


def test_what_was_entered_is_read_back(state):
    assert list(journals()) == []
    journal = MigrationJournal.create(RECORD)
    for phase in (Phase.MIRRORING, Phase.MEMORY, Phase.SENT):
        journal.enter(phase)
        [found] = journals()
        assert (found.record, found.phase) == (RECORD, phase)
    found.enter(Phase.HANDED)  # by whoever recovers it
    [found] = journals()
    assert found.phase is Phase.HANDED
    found.remove()
    found.remove()
    assert list(journals()) == []
    assert list(state.glob("*.migration")) == []


def test_that_somebody_else_stopped_the_guest_is_read_back_and_stays_said(state):
    journal = MigrationJournal.create(RECORD)
    journal.enter(Phase.MEMORY)
    [found] = journals()
    assert not found.stopped
    found.enter(Phase.SENT, stopped=True)
    [found] = journals()
    assert (found.phase, found.stopped) == (Phase.SENT, True)
    found.enter(Phase.HANDED)
    [found] = journals()
    assert (found.phase, found.stopped) == (Phase.HANDED, True)


def test_it_says_who_wrote_it(state):
    MigrationJournal.create(RECORD)
    first = json.loads(only(state).read_text().splitlines()[0])
    assert first["format"] == 1
    assert first["version"]
    assert only(state).stat().st_mode & 0o777 == 0o600


def test_every_line_is_synced_before_the_call_returns(state, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(fd) or real(fd))
    journal = MigrationJournal.create(RECORD)
    assert synced
    synced.clear()
    journal.enter(Phase.SENT)
    assert synced


def test_a_line_that_is_torn_was_not_acted_upon(state):
    journal = MigrationJournal.create(RECORD)
    journal.enter(Phase.MEMORY)
    path = only(state)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"phase": "sen')
    [found] = journals()
    assert found.phase is Phase.MEMORY
    found.enter(Phase.SENT)
    [found] = journals()
    assert found.phase is Phase.SENT
    path.write_bytes(whole[:30])  # its controller had done nothing yet
    assert list(journals()) == []


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"{",
        b'{"format": 2}',
        b'{"run": "x"}',
        json.dumps(RECORD.as_json() | {"run": "../x"}).encode(),
        json.dumps(RECORD.as_json()).encode() + b'\n{"phase": "elsewhere"}',
    ],
)
def test_what_is_ours_and_cannot_be_read_is_an_error(state, line):
    MigrationJournal.create(RECORD)
    only(state).write_bytes(line + b"\n")
    with pytest.raises(RecordError, match="ours by its name and cannot be read") as caught:
        list(journals())
    assert caught.value.path == only(state)


def test_what_a_newer_version_adds_is_kept():
    said = RECORD.as_json() | {"bandwidth": 7}
    record = read_record(said)
    assert record.as_json() == said
    with pytest.raises(UnreadableError, match="source is absent"):
        read_record({"run": RUN})


def test_what_cannot_be_written_is_said(state, monkeypatch):
    journal = MigrationJournal.create(RECORD)
    only(state).unlink()
    with pytest.raises(Error, match="cannot write to the journal"):
        journal.enter(Phase.SENT)
    assert journal.phase is Phase.CHECKED
    Path(state / "key").touch()
    monkeypatch.setenv("QMPBLOCK_STATE", str(state / "key"))
    with pytest.raises(Error, match="cannot write the journal"):
        MigrationJournal.create(RECORD)
