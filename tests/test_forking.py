"""Commands that are forked: what they are told and what they say is as of ones that are started."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forking import forked


def started(*words: str, environment: dict[str, str]) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "qmpblock", *words]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    return done.returncode, done.stdout, done.stderr


WORDS = {
    "done": ["--version"],
    "help": ["copy", "--help"],
    "wrong": ["copy", "nothing"],
    "no monitor": ["disks", "./none.qmp"],
    "an image": ["map", "image.raw", "--json"],
}


@pytest.mark.parametrize("which", WORDS)
async def test_it_is_as_if_it_were_started(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is where this process is, though its own may be elsewhere."""
    await forked("--version", environment=os.environ)
    (tmp_path / "image.raw").write_bytes(bytes(65536))
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "60"}
    wanted = started(*WORDS[which], environment=environment)
    assert await forked(*WORDS[which], environment=environment) == wanted


async def test_the_environment_is_the_one_that_is_given() -> None:
    widths = []
    for columns in ("40", "78"):
        environment = {**os.environ, "COLUMNS": columns}
        _, out, _ = await forked("copy", "--help", environment=environment)
        widths.append(max(map(len, out.splitlines())))
    assert widths[0] < 60 < widths[1]


async def test_many_at_once() -> None:
    words = ["disks", "map", "copy", "stream", "commit", "recover"]
    said = await asyncio.gather(*(forked(one, "--help", environment=os.environ) for one in words))
    assert [code for code, _, _ in said] == [0] * len(words)
    assert all(f"qmpblock {one}" in out for one, (_, out, _) in zip(words, said, strict=True))


async def test_nothing_is_left_open(tmp_path: Path) -> None:
    """Neither of whoever asked, nor of the others: who waits for an end would wait for them."""
    before = len(os.listdir("/proc/self/fd"))
    await asyncio.gather(*(forked("--version", environment=os.environ) for _ in range(5)))
    assert len(os.listdir("/proc/self/fd")) == before
