"""A program of ours that is left in the middle of its words."""

import asyncio
import sys

import pytest

from qmpblock.host.processes import end_child

TALKS = "import sys\nwhile True: {}.write('x' * 65536)"


async def program(code):
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=pipe, stderr=pipe
    )


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_what_it_said_and_nobody_read_is_not_waited_for(stream):
    process = await program(TALKS.format(f"sys.{stream}"))
    async with asyncio.timeout(120):
        while not getattr(process, stream)._paused:  # asyncio looks at that pipe no more
            await asyncio.sleep(0.01)
        await end_child(process)
    assert process.returncode == -9


async def test_one_that_has_ended_is_left_so():
    process = await program("raise SystemExit(3)")
    async with asyncio.timeout(120):
        assert await process.wait() == 3
        await end_child(process)
    assert process.returncode == 3
