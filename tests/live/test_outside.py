"""A project of somebody else's, with the wheel and without the repository: tests/outside.

Under pytest-xdist, pytest-randomly and pytest-timeout, in the strict and the auto mode of
pytest-asyncio, with fixtures in loops of every kind, on two QEMUs in one run; and its types.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from wheels import Installed, install

pytestmark = [pytest.mark.live, pytest.mark.outside]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "test-your-tool.md"
CHAPTER = re.findall(r"```\w+ title=(\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
PLUGINS = Path(sys.prefix) / "outside"  # what this project's own tests must not be run with


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    if not PLUGINS.is_dir():
        pytest.skip("pytest-randomly is not here; `make setup` installs it")
    installed = install(tmp_path_factory.mktemp("outside"))
    for path in PLUGINS.glob("pytest_*"):
        (installed.packages / path.name).symlink_to(path)
    shutil.copytree(ROOT / "tests" / "outside", installed.elsewhere, dirs_exist_ok=True)
    chapter = installed.elsewhere / "chapter"
    chapter.mkdir()
    for name, text in CHAPTER:
        (chapter / name).write_text(text)
    return installed


@pytest.fixture
def outside(project: Installed, monkeypatch: pytest.MonkeyPatch, qemu_binary: str) -> Installed:
    system = shutil.which("qemu-system-x86_64")
    both = sorted({qemu_binary, str(Path(system).resolve()) if system else qemu_binary})
    monkeypatch.setenv("OUTSIDE_QEMUS", ":".join(both))
    return project


async def run(outside: Installed, *words: str) -> str:
    more = ("-q", "-p", "no:cacheprovider")
    return await asyncio.to_thread(outside.run, "python", "-m", "pytest", *more, *words)


def qemus() -> int:
    return len(os.environ["OUTSIDE_QEMUS"].split(":"))


@pytest.mark.parametrize("fixtures", ["function", "module", "session"])
@pytest.mark.parametrize("mode", ["strict", "auto"])
async def test_its_own_tests(outside: Installed, mode: str, fixtures: str) -> None:
    loop = f"asyncio_default_fixture_loop_scope={fixtures}"
    said = await run(outside, "-n", "2", "-o", f"asyncio_mode={mode}", "-o", loop, "test_scopes.py")
    runs = qemus()
    passed = int(re.search(r"(\d+) passed", said)[1])
    skipped = int((re.search(r"(\d+) skipped", said) or [0, 0])[1])
    assert passed + skipped == 10 * runs, said
    assert skipped <= 1, said


async def test_the_whole_chapter(outside: Installed) -> None:
    """With the project's conftest.py above its own: so on each of the QEMUs."""
    words = ("-n", "2", "--timeout", "120", "-c", "chapter/pytest.ini", "--rootdir", ".")
    said = await run(outside, *words, "--confcutdir", ".", "chapter")
    assert f"{8 * qemus()} passed" in said, said


@pytest.mark.parametrize("mode", ["strict", "auto"])
async def test_its_tool_with_strict_types(outside: Installed, mode: str) -> None:
    words = ("-n", "2", "-o", f"asyncio_mode={mode}", "test_tool.py")
    said = await run(outside, *words)
    assert f"{8 * qemus()} passed" in said, said


async def test_in_one_process_in_another_order(outside: Installed) -> None:
    said = await run(outside, "-v", "-p", "randomly", "-p", "no:xdist", "test_scopes.py")
    assert "random" in said.lower(), said


async def test_its_types(outside: Installed) -> None:
    words = ("-m", "mypy", "--no-incremental", "test_scopes.py", "test_tool.py", "conftest.py")
    assert "Success" in await asyncio.to_thread(outside.run, "python", *words)
