"""The package as a user has it: built as a wheel, installed where the repository is not seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PIP = ("-m", "pip", "-q", "--disable-pip-version-check")
_OF_THIS_RUN = ("PYTEST_", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it.

    :ivar bin: where its programs are.
    :ivar packages: its site-packages.
    :ivar elsewhere: an empty directory, to run it in.
    """

    wheel: Path
    bin: Path
    packages: Path
    elsewhere: Path

    def run(self, program: str, *arguments: str | os.PathLike[str]) -> str:
        """Run a program of the environment; return what it printed, if it ends with 0."""
        done = subprocess.run(
            [self.bin / program, *arguments],
            cwd=self.elsewhere,
            env={k: v for k, v in os.environ.items() if not k.startswith(_OF_THIS_RUN)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,  # a test run of its own, however busy the machine is
            check=False,
        )
        assert done.returncode == 0, f"{program}: {done.stdout}\n{done.stderr}"
        return done.stdout


def install(folder: Path) -> Installed:
    """Build the wheel of this clone and install it; no network, and the clone is not written to."""
    wheel = build(folder)
    environment, elsewhere = folder / "environment", folder / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    # What it depends on, as the tests have it; but not their own way to the package.
    packages = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(place).iterdir():
            if not path.name.startswith(("qmpblock", "__editable__")) and path.suffix != ".pth":
                (packages / path.name).symlink_to(path)
    command = [sys.executable, *_PIP, "--python", python, "install", "--no-deps", "--no-index"]
    subprocess.run([*command, wheel], check=True)
    return Installed(wheel, environment / "bin", packages, elsewhere)


def build(folder: Path) -> Path:
    """Build the wheel of this clone, which is not written to."""
    source, built = folder / "source", folder / "built"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "qmpblock", source / "qmpblock", ignore=ignored)
    command = [sys.executable, *_PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "-w", built, source], check=True)
    [wheel] = built.iterdir()
    return wheel
