"""The invariant's words; that it finds each kind of leak is shown in tests/live."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from qmpblock.testing.invariant import (
    VMState,
    _descriptor_lines,
    difference,
    listening_sockets,
)


def test_a_difference_reads_as_sentences_and_counts() -> None:
    before = VMState({"node: a": 1, "socket: x": 2, "job: j": 1})
    after = VMState({"node: a": 1, "socket: x": 3, "export: e": 1})
    assert difference(before, after) == [
        "disappeared: job: j",
        "appeared: export: e",
        "appeared: socket: x",
    ]
    assert difference(before, before) == []


def test_listening_sockets_are_found_by_inode(tmp_path: Path) -> None:
    before = listening_sockets(os.getpid())
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as tcp:
        unix.bind(str(tmp_path / "a b"))
        assert listening_sockets(os.getpid()) == before
        unix.listen()
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        new = set(listening_sockets(os.getpid())) - set(before)
        assert new == {f"unix:{tmp_path / 'a b'}", f"tcp:{tcp.getsockname()[1]}"}
    assert listening_sockets(os.getpid()) == before


def test_what_the_c_library_looks_at_for_a_moment_is_nothing_of_the_vm(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with file.open(), Path("/sys/devices/system/cpu/online").open():
        lines = _descriptor_lines(os.getpid())
    assert f"open file: {file} for reading" in lines
    assert not [line for line in lines if "/sys/" in line]
