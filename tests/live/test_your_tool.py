"""docs/test-your-tool.md, as a project of its own: all of its files, on the tested QEMU."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.live

PAGE = Path(__file__).parents[2] / "docs" / "test-your-tool.md"
FILES = re.findall(r"```\w+ title=(\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


async def test_every_example_works(tmp_path, qemu_binary):
    for name, text in FILES:
        (tmp_path / name).write_text(text)
    wanted = sum(text.count("async def test_") for _, text in FILES)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=tmp_path,
        env={**environment, "QMPBLOCK_QEMU": qemu_binary},
        capture_output=True,
        text=True,
        timeout=600,  # a test run of its own, however busy the machine is
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{wanted} passed" in done.stdout
    assert wanted == 8
