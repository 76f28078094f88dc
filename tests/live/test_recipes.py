"""The recipes of docs/testing-in-ci.md, as far as they can be run here: in a container, nearly.

A user without a name, a read-only root, no /dev/kvm, no network, and the package as a wheel. The
lines that install packages are the only ones that are not run.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wheels import install

pytestmark = pytest.mark.live

DOCS = Path(__file__).parents[2] / "docs"
RECIPES = dict(
    re.findall(
        r"```\w+ title=(\w+)\n(.*?)```",
        (DOCS / "testing-in-ci.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
)
PROJECT = re.findall(
    r"```\w+ title=(\S+)\n(.*?)```",
    (DOCS / "test-your-tool.md").read_text(encoding="utf-8"),
    re.DOTALL,
)
NOBODY = "61666"
UNSHARE = ("unshare", "--mount", "--net", "--propagation", "private")
INSTALLS = ("apt-get ", "sudo apt-get ", "python3 -m venv ", "pip install ", ".venv/bin/pip ")
CONTAINER = """
set -e
mount -t tmpfs tmpfs /mnt
mkdir /mnt/python
mount --bind "$4" /mnt/python
cp -a "$1" /mnt/ci
chown -R "$2:$2" /mnt/ci
mount -t tmpfs -o mode=1777 tmpfs /tmp
[ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm
mount -o remount,bind,ro /
cd /mnt/ci
exec setpriv --reuid "$2" --regid "$2" --clear-groups --no-new-privs \
  env -i "PATH=$PWD/.venv/bin:$PATH" HOME=/nonexistent LD_LIBRARY_PATH=/mnt/python/lib sh -ec "$3"
"""


def lines(recipe: str) -> list[str]:
    """Return what a recipe runs, apart from installing."""
    text = RECIPES[recipe]
    if recipe == "github":
        steps = yaml.safe_load(text)["jobs"]["test"]["steps"]
        every = [step["run"] for step in steps if "run" in step]
    elif recipe == "gitlab":
        every = yaml.safe_load(text)["test"]["script"]
    else:
        every = text.strip().splitlines()
    return [line for line in every if not line.startswith(INSTALLS)]


def needed(*wanted: str) -> set[str]:
    """Return what distributions depend on, themselves included, by name."""
    found: set[str] = set()
    left = list(wanted)
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        found.add(name)
        left += [
            re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in requires if "extra ==" not in one
        ]
    return found


def self_contained(packages: Path) -> None:
    """Have copies in place of links into the directories of whoever runs this."""
    keep = {
        str(path).split("/")[0]
        for name in needed("qmpblock", "pytest", "pytest-asyncio", "pytest-xdist")
        for path in importlib.metadata.files(name) or []
    }
    for link in packages.iterdir():
        if link.is_symlink():
            target = link.resolve()
            link.unlink()
            if link.name in keep and target.is_dir():
                shutil.copytree(target, link, ignore=shutil.ignore_patterns("tests", "*.pyi"))
            elif link.name in keep:
                shutil.copy(target, link)


def move_python(environment: Path) -> None:
    """Have an environment's Python be that of /mnt/python: it may lie where only root may go."""
    python = environment / "bin" / "python"
    program = python.resolve().relative_to(sys.base_prefix)
    python.unlink()
    python.symlink_to("/mnt/python" / program)
    config = environment / "pyvenv.cfg"
    text = config.read_text(encoding="utf-8")
    config.write_text(re.sub(r"(?m)^home = .*$", "home = /mnt/python/bin", text), encoding="utf-8")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a container's namespaces")
async def test_every_recipe_runs_in_something_like_a_container(tmp_path):
    installed = await asyncio.to_thread(install, tmp_path)
    await asyncio.to_thread(self_contained, installed.packages)
    project = tmp_path / "ci"
    project.mkdir()
    for name, text in PROJECT:
        (project / name).write_text(text)
    installed.bin.parent.rename(project / ".venv")
    move_python(project / ".venv")
    for recipe in RECIPES:
        script = "\n".join(lines(recipe))
        assert "-m pytest" in script, recipe
        done = await asyncio.to_thread(
            subprocess.run,
            [*UNSHARE, "sh", "-c", CONTAINER, "sh", project, NOBODY, script, sys.base_prefix],
            capture_output=True,
            text=True,
            timeout=600,  # a test run of its own, however busy the machine is
            check=False,
        )
        assert done.returncode == 0, f"{recipe}: {done.stdout}\n{done.stderr}"
        assert " passed" in done.stdout, done.stdout
