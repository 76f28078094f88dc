"""qmpblock export: its words."""

import asyncio
import signal

import click
import pytest

from qmpblock.cli import app
from qmpblock.cli.app import run


def parsed(*words):
    group = app._group
    command = group.get_command(click.Context(group), "export")
    return command.make_context("export", list(words)).params


def test_what_stands_behind_the_dashes_is_not_ours():
    found = parsed("vm.qmp", "vd0", "vd1", "--stdin", "--", "cmd", "--stdin", "--", "--help")
    assert (found["names"], found["stdin"]) == (("vd0", "vd1"), True)
    assert found["words"] == ("cmd", "--stdin", "--", "--help")
    assert parsed("vm.qmp", "vd0", "--", "x")["stdin"] is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "ADDRESS"),
        (["vm.qmp", "--", "true"], "DISK"),
        (["vm.qmp", "vd0"], "say what is to be run"),
        (["vm.qmp", "vd0", "--"], "say what is to be run"),
        (["vm.qmp", "vd0", "--at", "end", "--", "true"], "'end' is not"),
        (["vm.qmp", "vd0", "--fleece-limit", "x", "--", "true"], "is not a size"),
    ],
)
def test_a_wrong_request_is_2(words, said, capsys):
    assert run(["export", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err


def test_the_usage_says_where_the_command_stands(capsys):
    assert run(["export", "--help"]) == 0
    assert "ADDRESS DISK... -- COMMAND..." in capsys.readouterr().out


def test_no_monitor_is_3(capsys):
    assert run(["export", "/nosuch/monitor", "vd0", "--", "true"]) == 3


def test_signals_go_to_whom_they_are_for():
    seen = []

    async def work():
        loop = asyncio.get_running_loop()
        got = asyncio.Event()
        with app.signals_go_to(lambda number: (seen.append(number), got.set())):
            loop.call_soon(signal.raise_signal, signal.SIGTERM)
            await got.wait()
        loop.call_soon(signal.raise_signal, signal.SIGTERM)
        await asyncio.Event().wait()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(app._interruptible(work()))
    assert seen == [signal.SIGTERM]
