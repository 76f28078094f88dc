"""What can be told of the NBD server without asking QEMU. The rest: live/test_export.py."""

import socket

import pytest
from fake_qmp import HELLO, fake_qmp

from qmpblock.errors import CommandError, StalledError
from qmpblock.export.server import delete_exports, is_listening
from qmpblock.qemu.monitor import Monitor


def test_a_listening_socket_is_found_also_when_unlinked(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert not is_listening(str(path))
        listener.listen()
        assert is_listening(str(path))
        path.unlink()
        assert is_listening(str(path))
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(tmp_path / "other"))
            assert not is_listening(str(tmp_path / "other"))
    assert not is_listening(str(path))


class Exports(dict):
    """What a peer says to the deletion of each export: an error's words, or nothing."""

    def __init__(self, said, gone):
        super().__init__({"qmp_capabilities": {"return": {}}})
        self.said = said
        self.gone = gone  # those of which it says that they are gone
        self.peer = None
        self.left = []

    def get(self, command, default=None):
        if command == "query-block-exports":
            return {"return": [{"id": name, "node-name": "d0"} for name in self.left]}
        if command != "block-export-del":
            return super().get(command, default)
        name = self.peer.seen[-1]["arguments"]["id"]
        if name in self.gone:
            self.peer.event("BLOCK_EXPORT_DELETED", id=name)
        if self.said.get(name):
            return {"error": {"class": "GenericError", "desc": self.said[name]}}
        return default


async def deleting(tmp_path, said, gone):
    replies = Exports(said, gone)
    async with (
        fake_qmp(tmp_path / "q", HELLO, replies) as peer,
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        replies.peer = peer
        await delete_exports(monitor, ["e0", "e1", "e2"], 0.3)


async def test_exports_are_deleted_at_once_and_their_end_is_waited_for(tmp_path):
    missing, ending = "Export 'e1' is not found", "Export 'e2' is already shutting down"
    await deleting(tmp_path, {}, {"e0", "e1", "e2"})
    await deleting(tmp_path, {"e1": missing, "e2": ending}, {"e0", "e2"})
    with pytest.raises(StalledError, match="BLOCK_EXPORT_DELETED"):
        await deleting(tmp_path, {"e1": missing, "e2": ending}, {"e0"})


async def test_where_events_are_missed_it_is_looked_whether_they_are_gone(tmp_path):
    """By a monitor that is had by turns: each query is a turn of its own."""
    (tmp_path / "qemu-server").mkdir()
    replies = Exports({}, set())
    replies.left = ["e0", "other"]
    path = tmp_path / "qemu-server" / "104.qmp"
    async with fake_qmp(path, HELLO, replies) as peer, await Monitor.connect(str(path)) as monitor:
        replies.peer = peer
        with pytest.raises(StalledError):
            await delete_exports(monitor, ["e0", "e1", "e2"], 0.3)
        replies.left = ["other"]
        await delete_exports(monitor, ["e0", "e1", "e2"], 30)


async def test_one_that_cannot_be_deleted_keeps_the_others_from_nothing(tmp_path):
    with pytest.raises(CommandError, match="no way"):
        await deleting(tmp_path, {"e1": "no way"}, {"e0", "e2"})
