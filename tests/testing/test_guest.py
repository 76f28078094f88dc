"""The Python side against a scripted guest on a real socket: commands, answers, silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from qmpblock.errors import RangeError, RequestError, StalledError
from qmpblock.testing.guest import (
    FIRMWARE,
    GuestConsole,
    GuestError,
    StressSpec,
    TinyGuest,
    guest_arguments,
)

READY = "*READY version=3 disk=0,00:02.0,blk,131072,fdz"
PROGRESS = "issued=9 acked=9 flushed=0 reads=0 bad=0 errors=0 waiting_us=0"


class Script:
    """A guest of a few words: what it was told, and what it answers to each command."""

    def __init__(self, answers: Mapping[str, str], ready: str = READY) -> None:
        self.answers = dict(answers)
        self.ready = ready
        self.told: list[str] = []
        self.writer: asyncio.StreamWriter | None = None

    async def run(self, path: Path) -> None:
        reader, self.writer = await asyncio.open_unix_connection(str(path))
        self.say(self.ready)
        while line := (await reader.readline()).decode().strip():
            number, _, command = line.partition(" ")
            self.told.append(command)
            answer = self.answers.get(command.partition(" ")[0], "OK")
            if answer == "close":
                break
            if answer:
                self.say(*(part.replace("#", number) for part in answer.split("|")))
        self.writer.close()

    def say(self, *lines: str) -> None:
        assert self.writer is not None
        for line in lines:
            shown = f"{line} #" if line in ("OK", "ER") else line
            self.writer.write(f"{shown}\n".encode())


@asynccontextmanager
async def scripted(directory: Path, **answers: str) -> AsyncIterator[tuple[TinyGuest, Script]]:
    script = Script({name: answer for name, answer in answers.items() if name != "ready"})
    script.ready = answers.get("ready", READY)
    async with GuestConsole.listen(directory / "serial") as console:
        task = asyncio.create_task(script.run(directory / "serial"))
        try:
            yield await TinyGuest.ready(console, stall=2), script
        finally:
            if script.writer is not None:
                script.writer.close()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_commands_carry_sectors_and_numbers(tmp_path: Path) -> None:
    ok = "OK #"
    names = ("write", "fill", "flush", "discard", "zero", "stress", "dirty", "off")
    async with scripted(tmp_path, **dict.fromkeys(names, ok), read="OK # crc32=0000000a") as (
        guest,
        script,
    ):
        await guest.write(1, 1 << 40, 1024, seq=5, seed=7)
        await guest.fill(0, 512, 512, 170)
        assert await guest.read(0, 0, 4096) == 10
        await guest.flush(2)
        await guest.discard(0, 0, 65536)
        await guest.write_zeroes(0, 0, 65536)
        await guest.stress(
            StressSpec(
                disk=3,
                offset=1 << 20,
                blocks=1024,
                block_size=8192,
                queue_depth=8,
                total=99,
                seed=4,
                flush_every=10,
                rate=200,
                read_percent=30,
                group=(0, 3),
            )
        )
        await guest.dirty(5)
        await guest.power_off()
        assert script.told == [
            "write 1 2147483648 2 5 7",
            "fill 0 1 1 170",
            "read 0 0 8",
            "flush 2",
            "discard 0 0 128",
            "zero 0 0 128",
            "stress 3 2048 1024 16 8 99 4 10 200 30 9",
            "dirty 5",
            "off",
        ]


async def test_a_refusal_carries_the_reason_the_status_and_the_lines(tmp_path: Path) -> None:
    async with scripted(
        tmp_path, flush="ER # the disk failed the request status=1 lba=0", eject="ER # no"
    ) as (guest, _):
        with pytest.raises(GuestError, match="refused 'flush 0': the disk failed") as caught:
            await guest.flush(0)
        assert caught.value.status == 1
        assert "> 1 flush 0" in caught.value.transcript
        assert "< ER 1 the disk failed the request status=1 lba=0" in str(caught.value)
        with pytest.raises(GuestError) as caught:
            await guest.eject()
        assert caught.value.status is None


async def test_silence_is_a_stall_and_a_late_answer_is_not_the_next_one(tmp_path: Path) -> None:
    async with scripted(tmp_path, flush="", hello="OK 1|OK # version=3") as (guest, _):
        with pytest.raises(StalledError, match=r"silent for 0\.1 s .* 'flush 0'"):
            await guest.flush(0, stall=0.1)
        assert (await guest.hello()).disks == ()  # after a late OK to number 1


async def test_signs_of_life_are_no_silence(tmp_path: Path) -> None:
    async with scripted(tmp_path, flush="") as (guest, script):
        waiting = asyncio.create_task(guest.flush(0, stall=0.5))
        for _ in range(8):
            await asyncio.sleep(0.1)
            script.say("*WORKING")
        script.say("OK 1")
        await waiting


async def test_a_closed_line_is_said_so(tmp_path: Path) -> None:
    async with scripted(tmp_path, flush="close") as (guest, _):
        with pytest.raises(GuestError, match="closed while waiting for the answer to 'flush 0'"):
            await guest.flush(0)
        with pytest.raises(GuestError, match="cannot send '2 flush 0'"):
            await guest.flush(0)


async def test_nobody_connects(tmp_path: Path) -> None:
    async with GuestConsole.listen(tmp_path / "serial") as console:
        with pytest.raises(StalledError, match="its start"):
            await TinyGuest.ready(console, stall=0.1)
    assert not (tmp_path / "serial").exists()


async def test_a_qemu_that_dies_before_its_guest_starts(tmp_path: Path) -> None:
    async with GuestConsole.listen(tmp_path / "serial") as console:
        waiting = asyncio.create_task(TinyGuest.ready(console, stall=5))
        await asyncio.sleep(0)
        _, writer = await asyncio.open_unix_connection(console.path)
        writer.close()
        with pytest.raises(GuestError, match="closed while waiting for its start"):
            await waiting


@pytest.mark.parametrize("cut", ["*", "*READY version=", "OK 1"])
async def test_a_reset_in_the_middle_of_a_line_hides_no_greeting(tmp_path: Path, cut: str) -> None:
    async with scripted(tmp_path, ready=f"{cut}{READY}", hello="OK #") as (guest, _):
        assert guest.console.connected


async def test_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="speaks version 9"):
        async with scripted(tmp_path, ready="*READY version=9"):
            pass


@pytest.mark.parametrize(
    ("name", "answer", "call"),
    [
        ("read", "OK #", lambda guest: guest.read(0, 0, 512)),
        ("check", "OK # blocks=1", lambda guest: guest.check()),
        ("hello", "OK # disk=\x1b[2J", lambda guest: guest.hello()),
        ("progress", "OK # running=1", lambda guest: guest.progress()),
    ],
)
async def test_an_answer_that_makes_no_sense_is_an_error_fit_to_print(
    tmp_path: Path, name: str, answer: str, call: Callable[[TinyGuest], object]
) -> None:
    async with scripted(tmp_path, **{name: answer}) as (guest, _):
        with pytest.raises(GuestError, match="makes no sense") as caught:
            await call(guest)  # type: ignore[misc]
        assert "\x1b" not in str(caught.value)


async def test_check_with_wrong_blocks_raises(tmp_path: Path) -> None:
    async with scripted(
        tmp_path, check="OK # blocks=9 bad=2", progress=f"OK # running=0 {PROGRESS}"
    ) as (guest, _):
        with pytest.raises(GuestError, match="2 of 9 blocks"):
            await guest.check()


async def test_a_run_that_completes_nothing_is_a_stall(tmp_path: Path) -> None:
    async with scripted(tmp_path, progress=f"OK # running=1 {PROGRESS}") as (guest, script):
        with pytest.raises(StalledError, match="completed nothing for 1 s"):
            await guest.finish_stress(stall=1)
        script.answers["progress"] = f"OK # running=0 {PROGRESS}"
        assert (await guest.finish_stress(stall=1)).acked == 9


async def test_a_new_qemu_takes_the_line_of_a_dead_one(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (guest, script):
        assert script.writer is not None
        script.writer.close()
        second = Script({"flush": "OK #"})
        task = asyncio.create_task(second.run(tmp_path / "serial"))
        again = await TinyGuest.ready(guest.console, stall=2)
        await again.flush(0)
        assert second.told == ["flush 0"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert second.writer is not None
        second.writer.close()


async def test_wrong_ranges_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (guest, script):
        for offset, length in ((1, 512), (0, 100), (-512, 512), (0, 0)):
            with pytest.raises(RangeError, match="multiples of 512"):
                await guest.fill(0, offset, length, 1)
        with pytest.raises(RangeError, match="seed 4294967296"):
            await guest.write(0, 0, 512, seq=1, seed=1 << 32)
        assert script.told == []


async def test_a_path_that_no_socket_can_have(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot listen"):
        async with GuestConsole.listen(tmp_path / ("x" * 120)):
            pass


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QMPBLOCK_ACCEL", raising=False)
    arguments = guest_arguments("/tmp/a,b", 32, "q35")
    pairs = dict(pairwise(arguments))
    assert pairs["-m"] == "32"
    assert pairs["-machine"] == "q35"
    assert pairs["-accel"] == "tcg"
    assert pairs["-bios"] == str(FIRMWARE)
    assert pairs["-chardev"] == "socket,id=guest-serial,path=/tmp/a,,b"
    monkeypatch.setenv("QMPBLOCK_ACCEL", "kvm")
    assert "kvm" in guest_arguments("/tmp/a")
    assert "tcg" in guest_arguments("/tmp/a", accel="tcg")
    with pytest.raises(RangeError, match="16 MiB"):
        guest_arguments("/tmp/a", 8)


def test_the_firmware_is_64_kib_and_ends_in_a_jump() -> None:
    rom = FIRMWARE.read_bytes()
    assert len(rom) == 65536
    assert rom[-16] == 0xE9
