"""A monitor in turns, against a peer that counts them. Real QEMUs: live/test_proxmox.py."""

import asyncio
import json
import logging
import os
from dataclasses import replace

import pytest
from fake_qmp import HELLO, fake_qmp

from qmpblock.errors import CommandError, ConnectError, DisconnectedError, MonitorHeldError
from qmpblock.host.processes import Peer
from qmpblock.qemu import turns
from qmpblock.qemu.monitor import Monitor
from qmpblock.qemu.qmpsocket import QMPSocket


class Peers:
    """Answers; a turn is told by its negotiation."""

    def __init__(self):
        self.fake = None
        self.turns = []

    def get(self, command, default=None):
        if command == "qmp_capabilities":
            self.turns.append([])
        else:
            self.turns[-1].append(command)
        if command == "stop":
            self.fake.event("STOP")
        if command == "bad":
            return {"error": {"class": "GenericError", "desc": "no way"}}
        return {"quit": None, "slow": b""}.get(command, default)


@pytest.fixture
async def peer(tmp_path):
    """Listen as QEMU does where Proxmox VE starts it."""
    path = tmp_path / "qemu-server" / "104.qmp"
    path.parent.mkdir()
    replies = Peers()
    async with fake_qmp(path, HELLO, replies) as fake:
        replies.fake, fake.path, fake.turns = fake, str(path), replies.turns
        yield fake


async def test_every_command_has_a_turn_and_what_is_asked_at_once_has_one(peer):
    async with await Monitor.connect(peer.path) as monitor:
        assert (monitor.by_turns, monitor.version, monitor.peer_pid) == (
            True,
            (9, 8, 7),
            os.getpid(),
        )
        await monitor.execute("cont")
        await monitor.read("a", "b", "c")
        with pytest.raises(CommandError, match="no way"):
            await monitor.execute("bad")
        await monitor.execute("cont")
    assert peer.turns == [[], ["cont"], ["a", "b", "c"], ["bad"], ["cont"]]


async def test_so_many_are_no_longer_one_turn(peer):
    asked = [f"a{number}" for number in range(turns._AT_ONCE + 1)]
    async with await Monitor.connect(peer.path) as monitor:
        await monitor.read(*asked)
    assert peer.turns == [[], asked[:-1], asked[-1:]]


async def test_nobody_is_told_before_the_turn_has_ended(peer, monkeypatch):
    """So what we do with an answer, however long that takes, keeps nobody from the monitor."""
    closed = []
    real = QMPSocket.close

    async def close(sock, stall):
        await real(sock, stall)
        closed.append(sock)

    monkeypatch.setattr(QMPSocket, "close", close)
    async with await Monitor.connect(peer.path) as monitor:
        await monitor.execute("cont")
        assert len(closed) == 2


async def test_between_two_turns_there_is_a_pause(peer, monkeypatch):
    slept = []
    real = asyncio.sleep

    async def sleep(seconds):
        slept.append(seconds)
        await real(seconds)

    async with await Monitor.connect(peer.path) as monitor:
        await monitor.execute("a")
        with monkeypatch.context() as patched:
            patched.setattr(turns.asyncio, "sleep", sleep)
            await monitor.execute("b")
    assert max(slept) > 0


async def test_what_must_not_wait_for_others_is_one_turn_but_not_for_long(peer, monkeypatch):
    ended = asyncio.Event()
    real = QMPSocket.close

    async def close(sock, stall):
        await real(sock, stall)
        ended.set()

    async with await Monitor.connect(peer.path) as monitor:
        with monitor.in_one_turn():
            await monitor.execute("a")
            await monitor.execute("b")
        await monitor.execute("c")
        monkeypatch.setattr(turns, "_LONGEST", 0.05)
        monkeypatch.setattr(QMPSocket, "close", close)
        with monitor.in_one_turn():
            await monitor.execute("d")
            await ended.wait()
            await monitor.execute("e")
    assert peer.turns == [[], ["a", "b"], ["c"], ["d"], ["e"]]


async def test_events_of_a_turn_are_heard(peer):
    async with await Monitor.connect(peer.path) as monitor:
        with monitor.subscribe("STOP") as stopped:
            await monitor.execute("stop")
            assert [event["event"] for event in stopped.pending()] == ["STOP"]


async def test_cancelled_before_its_turn_it_is_never_sent(peer):
    async with await Monitor.connect(peer.path) as monitor:
        first = asyncio.create_task(monitor.execute("first"))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await monitor.execute("second")
    assert peer.turns == [[], ["second"]]


async def test_descriptors_go_with_their_command_or_are_closed(peer):
    before = len(os.listdir("/proc/self/fd"))
    async with await Monitor.connect(peer.path) as monitor:
        await monitor.pass_fd("x", 0)
        monitor._transport.send_fd(0)
        monitor._transport.send_fd(0)
        first = asyncio.create_task(monitor.execute("first"))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        monitor._transport.send_fd(0)
    assert peer.turns == [[], ["query-version"], ["getfd"]]
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the peer's end of its last connection


async def test_nothing_is_run_out_of_band(peer):
    async with await Monitor.connect(peer.path) as monitor:
        with pytest.raises(CommandError, match="out of band"):
            await monitor.execute_at_once("yank")


async def test_its_end_is_an_end(peer):
    async with await Monitor.connect(peer.path) as monitor:
        with monitor.subscribe("STOP") as stopped:
            with pytest.raises(DisconnectedError, match="lost during quit"):
                await monitor.execute("quit")
            with pytest.raises(DisconnectedError):
                await stopped.get()
        with pytest.raises(DisconnectedError, match="is closed"):
            await monitor.execute("cont")


async def test_nobody_listens_any_more(peer):
    async with await Monitor.connect(peer.path) as monitor:
        os.unlink(peer.path)
        with pytest.raises(
            DisconnectedError, match=r"lost during cont .*the VM 104 has no monitor"
        ):
            await monitor.execute("cont")


async def test_who_holds_it_is_said_and_waited_for_and_not_for_ever(peer, monkeypatch, caplog):
    monkeypatch.setattr(turns, "_SAY", 0.01)
    async with await Monitor.connect(peer.path, stall=0.5) as monitor:
        peer.greeting = None
        with (
            caplog.at_level(logging.WARNING),
            pytest.raises(
                DisconnectedError, match=f"no greeting.*this very process, {os.getpid()}"
            ),
        ):
            await monitor.execute("cont")
    assert "waiting for the monitor of unix:" in caplog.text
    assert f"this very process, {os.getpid()}" in caplog.text
    with pytest.raises(MonitorHeldError) as caught:
        await Monitor.connect(peer.path, greeting_timeout=0.1)
    assert "wait for it" in caught.value.remedy


async def test_another_qemu_by_then_is_another_vm(peer, monkeypatch):
    async with await Monitor.connect(peer.path) as monitor:
        of = Peer.of
        monkeypatch.setattr(Peer, "of", lambda sock: replace(of(sock), start=1))
        with pytest.raises(DisconnectedError, match="another QEMU answers"):
            await monitor.execute("cont")
    assert peer.turns == [[], []]


async def test_of_whom_the_process_cannot_be_seen_nothing_is_asked(peer, monkeypatch):
    monkeypatch.setattr(Peer, "of", lambda _: None)
    with pytest.raises(ConnectError, match="which process") as caught:
        await Monitor.connect(peer.path)
    assert caught.value.exit_code == 3
    assert peer.turns == [[]]


async def test_leaving_waits_for_the_answer_to_what_was_sent(peer):
    """Else whoever is next would get it."""
    async with await Monitor.connect(peer.path) as monitor:
        slow = asyncio.create_task(monitor.execute("slow"))
        while peer.turns[-1:] != [["slow"]]:
            await asyncio.sleep(0)
        slow.cancel()
        await asyncio.wait([slow])
        leaving = asyncio.create_task(monitor.close())
        for _ in range(100):
            await asyncio.sleep(0)
        assert not leaving.done()
        answer = {"return": {}, "id": peer.seen[-1]["id"]}
        peer.writer.write(json.dumps(answer).encode() + b"\n")
        await leaving
    assert not monitor._transport._worker.cancelled()
