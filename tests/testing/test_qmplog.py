"""The log that QEMU writes of its monitors: both ways, with times, and no secret in it."""

from __future__ import annotations

import os
import re

import pytest

from qmpblock.qemu.monitor import Monitor
from qmpblock.testing import QemuProcess
from qmpblock.testing.qmplog import QmpLog, hide, hide_in_command, without_stamps

SECRET = 'open"sesame-é'
WORD = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"


def written(*lines: str) -> QmpLog:
    log = QmpLog()
    text = "".join(f"1@1795926564.3157{number:02}:{line}\n" for number, line in enumerate(lines))
    os.write(log.descriptor, text.encode())
    log.begin()
    return log


def said(way: str, text: str, monitor: str = "0x1") -> str:
    name, word = {
        ">": ("handle_qmp_command", "req"),
        "<": ("monitor_qmp_respond", "resp"),
    }[way]
    return f"{name} mon {monitor} {word}: {text}"


@pytest.mark.live
async def test_every_monitor_is_heard_in_both_directions_and_without_secrets(
    qemu_binary: str,
) -> None:
    async with QemuProcess(qemu=qemu_binary) as vm:
        await vm.execute("query-status")
        async with await Monitor.connect(vm.second_monitor_path) as tool:
            secret = {"qom-type": "secret", "id": "key0", "data": SECRET}
            await tool.execute("object-add", secret)
            where = {"path": "/objects/key0", "property": "data"}
            assert await tool.execute("qom-get", where) == SECRET
            line = {"command-line": f"object_add secret,id=key1,data={SECRET.replace(',', '')}"}
            await tool.execute("human-monitor-command", line)
            await vm.execute("stop")
        async with await Monitor.connect(vm.monitor_path) as tool:
            await tool.execute("query-version")
        await vm.quit()
        lines = vm.qmp_log()
    wrong = [line for line in lines if not re.match(rf"{WORD} (control|[AB]) [<>] {{", line)]
    assert wrong == []
    stamps = [line.split()[0] for line in lines]
    assert stamps == sorted(stamps)
    log = "\n".join(lines)
    for part in (
        r'control > \{"execute": "query-status"',
        r'A > \{"execute": "object-add", .*"key0", "data": "\(hidden\)"',
        r'A > \{"execute": "qom-get"',
        r'A < \{"return": "\(hidden\)"',
        r'A < \{"timestamp": .*"event": "STOP"',
        r'B > \{"execute": "query-version"',
        r'control > \{"execute": "quit"',
    ):
        assert re.search(part, log), part
    assert "sesame" not in log


@pytest.mark.live
async def test_what_qemu_prints_has_no_times_in_it(qemu_binary: str) -> None:
    vm = QemuProcess(qemu=qemu_binary, extra=["-device", "nonsense"])
    with pytest.raises(Exception, match="not a valid device model name"):
        await vm.start()
    assert not re.search(WORD, vm.stderr)
    assert vm.stderr.startswith("qemu-system")


@pytest.mark.live
async def test_a_log_of_the_callers_own_is_left_to_him(qemu_binary: str) -> None:
    async with QemuProcess(qemu=qemu_binary, extra=["-d", "guest_errors"]) as vm:
        await vm.execute("query-status")
        assert vm.qmp_log() == ["the log of QEMU is the caller's: -d, -D or -trace was given"]


def test_an_answer_belongs_to_its_question() -> None:
    get = '{{"execute": "qom-get", "arguments": {{"path": "a", "property": "{}"}}{}}}'
    log = written(
        said("<", '{"QMP": {}}'),
        said(">", get.format("data", ', "id": 1')),
        said(">", get.format("size", ', "id": 2')),
        said(">", get.format("data", ""), "0x2"),
        said("<", '{"return": "second", "id": 2}'),
        said("<", '{"event": "STOP"}', "0x2"),
        said("<", '{"event": "STOP", "data": "to 0x3"}', "0x3"),
        said("<", '{"return": "first-key", "id": 1}'),
        said("<", '{"return": "third-key"}', "0x2"),
        said("<", '{"error": {"desc": "wrong: third-key"}}'),
        said("<", '{"return": "cut off, with first-'),
    )
    text = "\n".join(log.lines())
    assert '"return": "second"' in text
    assert text.count('"return": "(hidden)"') == 2
    assert '"desc": "wrong: (hidden)"' in text
    assert "first-" not in text
    assert 'A < {"event": "STOP"}' in text
    assert "0x3" not in text, "nobody was ever there"


def test_what_is_known_to_be_secret_is_nowhere() -> None:
    log = written(said("<", '{"return": "a key-of-disk0 b"}'))
    assert "key-of-disk0" not in "\n".join(log.lines(["key-of-disk0"]))


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (
            "-object secret,id=a,data=xyzzy,format=raw",
            "-object secret,id=a,data=(hidden),format=raw",
        ),
        ("https://eve:pw@host/disk", "https://eve:(hidden)@host/disk"),
        ("password-secret=key0", "password-secret=key0"),
        ('{"event": "STOP", "data": {}}', '{"event": "STOP", "data": {}}'),
    ],
)
def test_secrets_by_their_looks(text: str, hidden: str) -> None:
    assert hide(text) == hidden


def test_secrets_in_a_command_line() -> None:
    command = ["qemu", "-object", '{"qom-type": "secret", "id": "a", "data": "xyzzy"}', "{-x"]
    assert hide_in_command(command) == [
        *("qemu", "-object", '{"qom-type": "secret", "id": "a", "data": "(hidden)"}', "{-x")
    ]


def test_a_long_log_gives_its_memory_back() -> None:
    log = written(said("<", '{"QMP": {}}'))
    long = said("<", '{"return": "' + "x" * 5000 + '"}')
    line = f"1@1795926565.000000:{long}\n".encode()
    for _ in range(4000):
        os.write(log.descriptor, line)
    log.trim()
    assert os.fstat(log.descriptor).st_blocks * 512 < 2 << 20
    assert log.lines()[-1].startswith("2026-11-29T04:29:25.000000Z control < ")
    assert len(log.lines()) > 100
    log.close()
    assert len(log.lines()) > 100


def test_times_are_taken_off_lines() -> None:
    stamp = "2026-11-29T04:29:25.091488Z"
    assert without_stamps(f"{stamp} qemu: a\nb {stamp}\n") == f"qemu: a\nb {stamp}\n"
