"""The monitor against a peer that sends what QEMU never would.

What a real QEMU does is in live/test_monitor.py.
"""

import asyncio
import json
import os
import resource
import time
import tracemalloc
from collections import Counter

import pytest
from fake_qmp import GREETING, HELLO, fake_qmp, messages

from qmpblock.errors import (
    CommandError,
    ConnectError,
    DisconnectedError,
    GraphError,
    GreetingError,
    MonitorError,
    MonitorHeldError,
    RequestError,
    StalledError,
    UnsupportedError,
)
from qmpblock.qemu.monitor import Monitor


async def test_nobody_listens(tmp_path):
    with pytest.raises(ConnectError, match="No such file") as caught:
        await Monitor.connect(str(tmp_path / "q"))
    assert caught.value.exit_code == 3
    assert "-qmp" in caught.value.remedy


async def test_nobody_listens_any_more(tmp_path):
    async with fake_qmp(tmp_path / "q"):
        pass
    with pytest.raises(ConnectError):
        await Monitor.connect(str(tmp_path / "q"))


async def test_bad_address_is_the_requests_fault():
    with pytest.raises(RequestError):
        await Monitor.connect("tcp:nowhere")


async def test_silence_means_another_client(tmp_path):
    async with fake_qmp(tmp_path / "q", greeting=None):
        with pytest.raises(MonitorHeldError, match="this very process") as caught:
            await Monitor.connect(str(tmp_path / "q"), greeting_timeout=0.1)
    assert caught.value.holders == (os.getpid(),)
    assert "-qmp unix:" in caught.value.remedy
    assert "libvirt:DOMAIN" in caught.value.remedy


async def test_silence_of_a_client_that_cannot_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("qmpblock.qemu.qmpsocket.holders", lambda address: ())
    async with fake_qmp(tmp_path / "q", greeting=None):
        with pytest.raises(MonitorHeldError, match="Most likely another client") as caught:
            await Monitor.connect(str(tmp_path / "q"), greeting_timeout=0.1)
    assert caught.value.holders == ()


async def test_pretty_messages_are_whole_and_bounded(tmp_path, monkeypatch):
    pretty = json.dumps(json.loads(HELLO), indent=4).encode() + b"\r\n"
    nested = b'{\n    "return": {\n        "a": {\n        }\n    },\n    "id": "ID"\n}\n'
    async with (
        fake_qmp(tmp_path / "q", pretty) as fake,
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        asked = asyncio.create_task(monitor.execute("query-version"))
        while len(fake.seen) < 2:
            await asyncio.sleep(0.01)
        await asked
        fake.replies["query-name"] = b""
        asked = asyncio.create_task(monitor.execute("query-name"))
        while len(fake.seen) < 3:
            await asyncio.sleep(0.01)
        fake.writer.write(nested.replace(b"ID", fake.seen[-1]["id"].encode()))
        assert await asked == {"a": {}}
        monkeypatch.setattr("qmpblock.qemu.qmpsocket._READ_LIMIT", 1000)
        asked = asyncio.create_task(monitor.execute("query-name"))
        while len(fake.seen) < 4:
            await asyncio.sleep(0.01)
        fake.writer.write(b"{\n" + b'    "a": 1,\n' * 1000)
        with pytest.raises(DisconnectedError, match="lost during query-name"):
            await asked


@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not a QMP monitor.*SSH-2.0"),
        (b"NBDMAGICIHAVEOPT\0\3", "not a QMP monitor.*NBDMAGIC"),
        (b"QEMU 7.2.22 monitor - type 'help'\r\n(qemu) ", "not a QMP monitor"),
        (b"\x1b[2J", "not a QMP monitor"),
        (b"", "closed the connection"),
        (b"{not json}\r\n", "not a QMP monitor"),
        (b'{"hello": 1}\r\n', "not a QMP monitor"),
        (b'{"QMP": {}}\r\n', "version|not a QMP monitor"),
        (b'{"QMP": {"version": {"qemu": {"major": "x"}}, "capabilities": []}}\r\n', "version"),
        (b'{"QMP": {"version"', "did not complete"),
    ],
)
async def test_what_answers_is_not_qmp(tmp_path, greeting, words):
    async with fake_qmp(tmp_path / "q", greeting=greeting) as fake:
        patience = 0.3 if words == "did not complete" else 60
        connecting = asyncio.create_task(
            Monitor.connect(str(tmp_path / "q"), greeting_timeout=patience)
        )
        if not greeting:
            while fake.writer is None:
                await asyncio.sleep(0.01)
            fake.writer.close()
        with pytest.raises(GreetingError, match=words) as caught:
            await connecting
    assert "\x1b" not in str(caught.value)


async def test_version_comes_from_the_greeting(tmp_path):
    async with fake_qmp(tmp_path / "q"), await Monitor.connect(str(tmp_path / "q")) as monitor:
        assert monitor.version == (9, 8, 7)
        assert monitor.package == "fake"


async def test_refusal_carries_command_arguments_and_words(tmp_path):
    refusal = {"error": {"class": "GenericError", "desc": "Node 'x' is \x07 busy"}}
    async with (
        fake_qmp(tmp_path / "q", replies={"blockdev-del": refusal}),
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        with pytest.raises(CommandError) as caught:
            await monitor.execute("blockdev-del", {"node-name": "x"})
    error = caught.value
    assert (error.command, error.arguments) == ("blockdev-del", {"node-name": "x"})
    assert (error.error_class, error.description) == ("GenericError", "Node 'x' is \x07 busy")
    assert "\x07" not in str(error)


async def test_what_is_only_read_is_asked_for_at_once(tmp_path):
    """Whoever answers sees all of it first, and each answer finds its question."""
    path, asked = tmp_path / "q", []

    async def serve(reader, writer):
        writer.write(HELLO)
        async for message in messages(reader):
            if message["execute"] == "qmp_capabilities":
                writer.write(json.dumps({"return": {}}).encode() + b"\n")
                continue
            asked.append(message)
            if len(asked) == 3:
                for one in reversed(asked):
                    said = {"return": {"was": one["execute"]}, "id": one["id"]}
                    writer.write(json.dumps(said).encode() + b"\n")
        writer.close()

    async with (
        asyncio.timeout(120),
        await asyncio.start_unix_server(serve, str(path)),
        await Monitor.connect(str(path)) as monitor,
    ):
        found = await monitor.read("query-a", ("query-b", {"flat": True}), "query-c")
    assert [one["was"] for one in found] == ["query-a", "query-b", "query-c"]
    assert [one.get("arguments") for one in asked] == [None, {"flat": True}, None]


async def test_of_what_is_read_the_first_refusal_is_told_and_nothing_is_left(tmp_path):
    refused = {"error": {"class": "GenericError", "desc": "no"}}
    replies = {"qmp_capabilities": {"return": {}}, "query-b": refused, "query-c": refused}
    async with (
        fake_qmp(tmp_path / "q", replies=replies) as fake,
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        with pytest.raises(CommandError) as caught:
            await monitor.read("query-a", "query-b", "query-c")
        assert caught.value.command == "query-b"
        assert await monitor.execute("query-a") == {}
    assert [one["execute"] for one in fake.seen][1:] == ["query-a", "query-b", "query-c", "query-a"]


async def test_what_does_not_rest_on_each_other_is_run_to_its_end_and_each_refusal_is_an_answer(
    tmp_path,
):
    refused = {"error": {"class": "GenericError", "desc": "no"}}
    replies = {"qmp_capabilities": {"return": {}}, "stop": refused}
    async with (
        fake_qmp(tmp_path / "q", replies=replies) as fake,
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        first, second, third = await monitor.each(("a", {"x": 1}), ("stop", {}), ("b", {}))
    assert (first, third) == ({}, {})
    assert isinstance(second, CommandError)
    assert second.command == "stop"
    assert [one["execute"] for one in fake.seen][1:] == ["a", "stop", "b"]


@pytest.mark.parametrize("commands", [(), (("a", {}), ("lost", {}), ("b", {}))])
async def test_nothing_is_no_command_and_a_lost_connection_is_no_answer(tmp_path, commands):
    replies = {"qmp_capabilities": {"return": {}}, "lost": None}
    async with (
        fake_qmp(tmp_path / "q", replies=replies),
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        if commands:
            with pytest.raises(DisconnectedError):
                await monitor.each(*commands)
        else:
            assert await monitor.each() == []


async def test_reading_ends_with_the_connection(tmp_path):
    replies = {"qmp_capabilities": {"return": {}}, "query-b": None}
    async with (
        fake_qmp(tmp_path / "q", replies=replies),
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        with pytest.raises(DisconnectedError):
            await monitor.read("query-a", "query-b", "query-c")


@pytest.mark.parametrize(
    "reply", [None, b"garbage\n", b'{"neither": 1}\n', b"[1]\n", b'{"error": {}}\n']
)
async def test_a_lost_connection_says_the_outcome_is_unknown(tmp_path, reply):
    async with (
        fake_qmp(tmp_path / "q", replies={"stop": reply}),
        await Monitor.connect(str(tmp_path / "q"), stall=2) as monitor,
    ):
        with pytest.raises((MonitorError, StalledError)) as caught:
            await monitor.execute("stop")
        assert "unknown" in caught.value.standing
        if isinstance(caught.value, DisconnectedError):
            assert caught.value.command == "stop"
            with pytest.raises(DisconnectedError, match="is closed"):
                await monitor.execute("cont")


async def said(tmp_path, reply):
    """Return what becomes of a command that is answered so, and what CPU time it took."""
    async with (
        fake_qmp(tmp_path / "q", replies={"query-name": reply}),
        await Monitor.connect(str(tmp_path / "q"), stall=300) as monitor,
    ):
        begun = time.process_time()
        with pytest.raises(DisconnectedError) as caught:
            await monitor.execute("query-name")
        return str(caught.value), time.process_time() - begun


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (rb'"\ud800"', "surrogate"),
        (b"1e999", "too large"),
        (b"NaN", "number NaN"),
        (b"9" * 10_000, "64 bits"),
        (b"[" * 100_000 + b"]" * 100_000, "levels"),
    ],
)
@pytest.mark.parametrize("shape", [b'{"return": %s, "id": "x"}\n', b'{"id": %s}\n', b"%s\n"])
async def test_what_no_qemu_sends_ends_the_connection_and_is_named(tmp_path, shape, value, words):
    message, _ = await said(tmp_path, shape % value)
    assert "lost during query-name (it sent what no QEMU sends" in message
    assert words in message


@pytest.mark.parametrize(
    "reply",
    [
        b'{"return": [' + b"[]," * (20 << 20) + b"1]}\n",
        b'{"return": "' + b"x" * (60 << 20) + b'"}\n',
        b'{"return": "' + b"x" * (60 << 20),  # no end
        b"[" + b"[]," * (400 << 10) + b"1]\n",  # whose error would be written out
        b"x" * (15 << 20) + b"\n",
        b"{\n" + b"1\n" * (10 << 20),  # of a monitor with pretty=on
    ],
    ids=["values", "text", "endless", "list", "garbage", "lines"],
)
async def test_large_messages_cost_little(tmp_path, reply):
    """60 MiB took 2 GiB and half a minute."""
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message, seconds = await said(tmp_path, reply)
    assert "it sent what no QEMU sends" in message
    assert seconds < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun < 400 << 10  # KiB


@pytest.mark.parametrize("data", [b"", b'"data": 5,', b'"data": [],', b'"data": {"id": {}},'])
@pytest.mark.parametrize("id_", [b"5", b"[]", b"{}", b"null", b'"other"'])
async def test_answers_to_nothing_and_odd_events_are_passed_over(tmp_path, data, id_):
    async with (
        fake_qmp(tmp_path / "q") as fake,
        await Monitor.connect(str(tmp_path / "q"), stall=5) as monitor,
    ):
        with monitor.subscribe(match=lambda event: event["data"].get("id") != 7) as every:
            fake.writer.write(b'{"return": {}, "id": %s}\n' % id_)
            fake.writer.write(b'{"event": 5, %s "timestamp": 0}\n' % data)
            fake.writer.write(b'{"event": "E", %s "timestamp": 0}\n' % data)
            assert await monitor.execute("stop") == {}
            assert len(every.pending()) == (data in (b"", b'"data": {"id": {}},'))


async def test_unread_events_have_a_size(tmp_path):
    async with (
        fake_qmp(tmp_path / "q") as fake,
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        with monitor.subscribe() as every:
            for n in range(20):
                fake.event("LONG", n=n, filler="x" * (1 << 20))
            await monitor.execute("stop")
            assert [event["data"]["n"] for event in every.pending()] == [17, 18, 19]
            assert every.lost == 17
            fake.event("LONG", n=20)
            await monitor.execute("stop")
            assert len(every.pending()) == 1


async def test_a_flood_of_events_lets_the_rest_run(tmp_path):
    """What has come is read without a pause; a signal had to wait for its end."""
    async with (
        fake_qmp(tmp_path / "q") as fake,
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        turns, seen = 0, []  # those of the rest, as each event came

        async def rest():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        resting = asyncio.create_task(rest())
        with monitor.subscribe(match=lambda _: seen.append(turns)):
            fake.writer.write(b'{"event":"X"}\n' * 100_000)
            await monitor.execute("stop")
        resting.cancel()
        assert len(seen) == 100_000
        assert max(Counter(seen).values()) < 1000  # between two of its turns


async def test_an_answer_that_makes_no_sense_is_an_error_and_the_connection_lives(tmp_path):
    async with (
        fake_qmp(tmp_path / "q", replies={"query-jobs": {"return": [{"id": 5}]}}),
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        with pytest.raises(GraphError, match="query-jobs, id"):
            await monitor.execute("query-jobs")
        assert await monitor.execute("stop") == {}


async def test_no_answer_is_a_stall(tmp_path, monkeypatch):
    async with (
        fake_qmp(tmp_path / "q", replies={"stop": b""}),
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(monitor, "stall", 0.1)
            with pytest.raises(StalledError, match="stop"):
                await monitor.execute("stop")
        # The connection lives: a late reply is not mistaken for another command's.
        assert await monitor.execute("cont") == {}


async def test_who_was_silent_is_waited_for_less_long(tmp_path, monkeypatch):
    refused = {"error": {"class": "GenericError", "desc": "no"}}
    async with (
        fake_qmp(tmp_path / "q", replies={"stop": b"", "cont": refused}),
        await Monitor.connect(str(tmp_path / "q"), stall=60) as monitor,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(monitor, "stall", 0.1)
            with monitor.once_silent(0.01), pytest.raises(StalledError, match=r"for 0\.1 s"):
                await monitor.execute("stop")
            with pytest.raises(StalledError, match=r"for 0\.1 s"):
                await monitor.execute("stop")
            with monitor.once_silent(0.2), pytest.raises(StalledError, match=r"for 0\.1 s"):
                await monitor.execute("stop")
            with monitor.once_silent(0.01), pytest.raises(StalledError, match=r"for 0\.01 s"):
                await monitor.execute("stop")
            with pytest.raises(CommandError):  # that is an answer, too
                await monitor.execute("cont")
            with monitor.once_silent(0.01), pytest.raises(StalledError, match=r"for 0\.1 s"):
                await monitor.execute("stop")


async def test_events_are_heard_from_the_moment_of_subscription(tmp_path):
    async with (
        fake_qmp(tmp_path / "q") as fake,
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        fake.event("JOB", n=0)
        await monitor.execute("query-cpus-fast")
        with (
            monitor.subscribe("JOB", match=lambda e: e["data"]["n"] != 2) as jobs,
            monitor.subscribe() as every,
        ):
            for n in (1, 2, 3):
                fake.event("JOB", n=n)
            fake.event("OTHER", n=9)
            await monitor.execute("query-cpus-fast")
            assert [e["data"]["n"] for e in (await jobs.get(1), await jobs.get(1))] == [1, 3]
            with pytest.raises(StalledError, match="no JOB"):
                await jobs.get(0.05)
            assert [e["data"]["n"] for e in every.pending()] == [1, 2, 3, 9]
            fake.event("JOB", n=4)
            async for event in jobs:
                assert event["data"]["n"] == 4
                break


async def test_waiting_for_an_event_ends_with_the_connection(tmp_path):
    async with (
        fake_qmp(tmp_path / "q") as fake,
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        with monitor.subscribe("JOB") as jobs:
            fake.event("JOB", n=1)
            await monitor.execute("query-cpus-fast")
            fake.writer.close()
            assert (await jobs.get(5))["data"]["n"] == 1  # what came before the end is kept
            with pytest.raises(DisconnectedError):
                await jobs.get(5)


async def test_nothing_accumulates_however_many_events_come(tmp_path):
    async with (
        fake_qmp(tmp_path / "q") as fake,
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        with monitor.subscribe("NEVER"), monitor.subscribe("READ") as unread:

            async def burst(count):
                for n in range(count):
                    fake.event("READ", n=n, filler="x" * 100)
                    if n % 500 == 0:
                        await fake.writer.drain()
                await monitor.execute("query-cpus-fast")

            await burst(6000)
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            await burst(6000)
            grown = tracemalloc.get_traced_memory()[0] - before
            tracemalloc.stop()
            assert len(unread.pending()) == 4096
            assert unread.lost == 12000 - 4096
            # The queue was full before: it is replaced by as much again, and no more.
            assert grown < 4096 * 3000


async def test_passing_a_descriptor_needs_a_unix_socket():
    async def serve(reader, writer):
        writer.write(HELLO)
        async for message in messages(reader):
            reply = {"return": {}, "id": message.get("id")}
            writer.write(json.dumps(reply).encode() + b"\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, await Monitor.connect(f"127.0.0.1:{port}") as monitor:
        assert not monitor.can_pass_fds
        assert monitor.peer_pid is None
        with pytest.raises(UnsupportedError):
            await monitor.pass_fd("name", 0)


async def test_close_is_idempotent(tmp_path):
    async with fake_qmp(tmp_path / "q") as fake:
        monitor = await Monitor.connect(str(tmp_path / "q"))
        fake.writer.close()
        await asyncio.sleep(0.05)
        await monitor.close()
        await monitor.close()
        with pytest.raises(DisconnectedError):
            await monitor.execute("stop")


async def test_closing_does_not_wait_for_a_peer_that_does_not_read(tmp_path):
    async def serve(reader, writer):
        writer.write(HELLO)
        await reader.read(100)
        writer.write(b'{"return": {}}\n')
        writer.transport.pause_reading()
        await over.wait()
        writer.close()

    over = asyncio.Event()
    server = await asyncio.start_unix_server(serve, tmp_path / "q")
    async with server:
        monitor = await Monitor.connect(str(tmp_path / "q"), stall=0.3)
        with pytest.raises(StalledError):
            await monitor.execute("object-add", {"data": "x" * (4 << 20)})
        async with asyncio.timeout(120):
            await monitor.close()
        over.set()


@pytest.mark.parametrize(
    "first",
    [
        {"event": "JOB_STATUS_CHANGE", "data": {"id": "x", "status": "running"}, "timestamp": {}},
        {"return": {}, "id": "of-a-client-that-was-killed"},
        {"error": {"class": "GenericError", "desc": "late"}, "id": "of-another"},
    ],
    ids=lambda one: next(iter(one)),
)
async def test_what_comes_before_the_answer_to_the_negotiation(tmp_path, first):
    answer = "".join(json.dumps(one) + "\r\n" for one in (first, first, {"return": {}}))
    async with (
        fake_qmp(tmp_path / "q", replies={"qmp_capabilities": answer.encode()}) as peer,
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        assert await monitor.execute("query-name") == {}
    assert [one["execute"] for one in peer.seen] == ["qmp_capabilities", "query-name"]


@pytest.mark.parametrize(
    "first",
    [
        {"event": "STOP", "data": {}, "timestamp": {"seconds": 1, "microseconds": 2}},
        {"return": {}, "id": "of-a-client-that-was-killed"},
        {"error": {"class": "GenericError", "desc": "late"}, "id": "of-another"},
    ],
    ids=lambda one: next(iter(one)),
)
async def test_what_comes_before_the_greeting(tmp_path, first):
    said = "".join(json.dumps(one) + "\r\n" for one in (first, first, GREETING))
    async with (
        fake_qmp(tmp_path / "q", said.encode()) as peer,
        await Monitor.connect(str(tmp_path / "q")) as monitor,
    ):
        assert await monitor.execute("query-name") == {}
    assert [one["execute"] for one in peer.seen] == ["qmp_capabilities", "query-name"]


async def test_a_negotiation_that_is_refused_is_an_error(tmp_path):
    error = {"error": {"class": "GenericError", "desc": "no"}}
    async with fake_qmp(tmp_path / "q", replies={"qmp_capabilities": error}):
        with pytest.raises(GreetingError, match="not a QMP monitor"):
            await Monitor.connect(str(tmp_path / "q"))
