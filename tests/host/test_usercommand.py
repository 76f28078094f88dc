"""A command of the user's: its exit code, its signals, its end, and ours."""

import asyncio
import os
import pty
import signal
import subprocess
import sys

import pytest

from qmpblock.host import usercommand
from qmpblock.host.processes import family_of, start_time
from qmpblock.host.usercommand import (
    CannotRunError,
    NoSuchCommandError,
    UserCommand,
    check_command,
)

DEADLINE = 60


async def sh(script, **options):
    return await UserCommand.start(["sh", "-c", script], os.environ, **options)


async def appears(path):
    async with asyncio.timeout(DEADLINE):
        while not path.exists() or not path.read_text():
            await asyncio.sleep(0.01)
    return path.read_text().split()


async def gone(*pids):
    async with asyncio.timeout(DEADLINE):
        while [pid for pid in pids if start_time(int(pid)) is not None]:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -9 $$", -9), ("true", 0)])
async def test_its_exit_code(script, code):
    assert await (await sh(script)).wait() == code


def test_what_cannot_be_run_is_known_before(tmp_path, monkeypatch):
    (tmp_path / "plain").write_text("words")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    check_command(["sh"])
    for word, kind, code in (
        ("no-such-program", NoSuchCommandError, 127),
        ("/no/such/program", NoSuchCommandError, 127),
        ("plain", CannotRunError, 126),
        (str(tmp_path / "plain"), CannotRunError, 126),
        (str(tmp_path), CannotRunError, 126),
    ):
        with pytest.raises(kind) as caught:
            check_command([word])
        assert caught.value.exit_code == code
        assert caught.value.standing == "nothing was touched"


async def test_what_cannot_be_run_after_all(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    for words in ([str(broken)], ["echo", "a\0b"]):
        with pytest.raises(CannotRunError):
            await UserCommand.start(words, os.environ)


async def test_signals_are_passed_on(tmp_path):
    script = f"trap 'exit 5' TERM; echo up > {tmp_path}/up; while :; do sleep 0.01; done"
    command = await sh(script)
    await appears(tmp_path / "up")
    command.pass_on(signal.SIGTERM)
    assert await command.wait() == 5
    command.pass_on(signal.SIGTERM)  # to nobody


async def test_what_it_leaves_behind_is_not_waited_for(tmp_path):
    end, other = os.pipe()
    command = await sh(f"cat & echo $! > {tmp_path}/pid", stdin=end)
    os.close(end)
    [left] = await appears(tmp_path / "pid")
    assert await command.wait() == 0
    os.close(other)
    await gone(left)


@pytest.mark.parametrize("trap", ["", "trap '' TERM; "], ids=["asked", "killed"])
async def test_it_is_ended_with_all_that_it_has_started(trap, tmp_path, monkeypatch):
    monkeypatch.setattr(usercommand, "_PATIENCE", 0.2 if trap else DEADLINE)
    script = f"{trap}(sleep 1000 | sleep 1000) & sleep 1000 & echo up > {tmp_path}/up; wait"
    command = await sh(script)
    await appears(tmp_path / "up")
    async with asyncio.timeout(DEADLINE):
        while len(family := family_of(command._process.pid)) < 4:
            await asyncio.sleep(0.01)
    await command.end()
    assert await command.wait() == (-signal.SIGKILL if trap else -signal.SIGTERM)
    assert [pid for pid, start in family if start_time(pid) == start] == []
    await command.end()


PROGRAM = """
import asyncio, os, signal, sys
from qmpblock.host.usercommand import UserCommand

async def main():
    started = asyncio.get_running_loop().create_future()
    async def passes_on(number):
        (await started).pass_on(number)
    tasks = []
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(
            number, lambda number=number: tasks.append(asyncio.ensure_future(passes_on(number)))
        )
    started.set_result(await UserCommand.start(sys.argv[1:], os.environ))
    sys.exit(await started.result().wait())

asyncio.run(main())
"""


async def test_it_does_not_outlive_us(tmp_path):
    script = f"echo $$ > {tmp_path}/pid; exec sleep 1000"
    us = subprocess.Popen([sys.executable, "-c", PROGRAM, "sh", "-c", script])
    try:
        [pid] = await appears(tmp_path / "pid")
    finally:
        us.kill()
        us.wait()
    await gone(pid)


async def test_a_terminals_ctrl_c_reaches_it_once(tmp_path):
    """By the terminal; from anybody else by us."""
    said = tmp_path / "said"
    counting = f"""
import signal
def count(number, frame):
    with open({str(said)!r}, "a") as file:
        print(number, file=file, flush=True)
    if number == signal.SIGTERM:
        raise SystemExit(6)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, count)
with open({str(said)!r}, "a") as file:
    print("up", file=file, flush=True)
while True:
    signal.pause()
"""
    command = [sys.executable, "-c", PROGRAM, sys.executable, "-c", counting]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, command)
    try:
        await appears(said)
        os.write(terminal, b"\x03")
        async with asyncio.timeout(DEADLINE):
            while said.read_text().split() == ["up"]:
                await asyncio.sleep(0.01)
        os.kill(pid, signal.SIGTERM)
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 6
    assert said.read_text().split() == ["up", "2", "15"]


async def test_without_a_terminal_ctrl_c_is_passed_on(tmp_path):
    script = f"trap 'exit 4' INT; echo up > {tmp_path}/up; while :; do sleep 0.01; done"
    words = [sys.executable, "-c", PROGRAM, "sh", "-c", script]
    us = subprocess.Popen(words, start_new_session=True)
    try:
        await appears(tmp_path / "up")
        us.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(us.wait, DEADLINE) == 4
    finally:
        us.kill()
        us.wait()
