"""The parts of exports that need no QEMU."""

import asyncio
import socket

import pytest

from qmpblock.export import _is_listening, _undisturbed


async def test_work_is_finished_although_cancelled():
    done = []

    async def work():
        await asyncio.sleep(0.05)
        done.append(True)

    task = asyncio.create_task(_undisturbed(work()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0.01)
    task.cancel()  # and however often
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == [True]


async def test_results_and_failures_come_through():
    async def value():
        return 5

    async def fail():
        await asyncio.sleep(0)
        raise KeyError("x")

    assert await _undisturbed(value()) == 5
    with pytest.raises(KeyError):
        await _undisturbed(fail())


def test_a_listening_socket_is_found_also_when_unlinked(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert not _is_listening(str(path))
        listener.listen()
        assert _is_listening(str(path))
        path.unlink()
        assert _is_listening(str(path))
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(tmp_path / "other"))
            assert not _is_listening(str(tmp_path / "other"))
    assert not _is_listening(str(path))
