"""What the pytest plugin says of a failure: in the report, in files, and by what it keeps.

Hooks of the plugin `qmpblock.testing.plugin`, which loads this. Like it, it imports nothing but
pytest until a test has failed that had to do with a QEMU.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qmpblock.testing.postmortem import PostMortem
    from qmpblock.testing.qemu import QemuProcess

__all__ = ["artifact_directory"]

_NAME = 80  # characters of a test's name in a file's


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare what is kept of a failure."""
    group = parser.getgroup("qmpblock", "real QEMUs (qmpblock.testing)")
    group.addoption(
        "--qmpblock-keep",
        action="store_true",
        help="keep the directory of each test that fails: images, and a script `again` that "
        "starts its QEMU on them",
    )
    group.addoption(
        "--qmpblock-artifacts",
        metavar="DIR",
        help="of each test that fails, write there: QMP log, guest's console, run state, threads",
    )
    parser.addini("qmpblock_artifacts", "as --qmpblock-artifacts; relative to the root directory")


def pytest_configure(config: pytest.Config) -> None:
    """Have directories wait for the verdict, where some of them are to be kept."""
    if config.getoption("--qmpblock-keep"):
        from qmpblock.testing import scratch

        scratch.wait_for_verdict()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Keep what an interrupted test had: that it hung is what one wants to look at."""
    if config.getoption("--qmpblock-keep") and "qmpblock.testing.scratch" in sys.modules:
        from qmpblock.testing import scratch

        scratch.failed()
        _settle("an interrupted test")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Forget the QEMUs of tests before; when all is said, keep or remove its directories."""
    if "qmpblock.testing.qemu" in sys.modules:
        from qmpblock.testing.qemu import forget_ended

        forget_ended()
    outcome = yield
    if item.config.getoption("--qmpblock-keep"):
        _settle(item.nodeid)
    return outcome


def _settle(test: str) -> None:
    from qmpblock.testing import scratch

    kept = scratch.settle()
    if not kept or "qmpblock.testing.qemu" not in sys.modules:
        return
    from qmpblock.testing.again import write_again
    from qmpblock.testing.qemu import MONITORS, known

    for vm in known():
        if vm.closed and vm.directory.exists():
            write_again(vm.command, vm.directory, MONITORS, test)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what is known of every QEMU to a failure."""
    report = yield
    if not report.failed or "qmpblock.testing.qemu" not in sys.modules:
        return report
    from qmpblock.testing import scratch
    from qmpblock.testing.postmortem import examine
    from qmpblock.testing.qemu import known

    scratch.failed()
    directory = artifact_directory(item.config, item.nodeid)
    for number, vm in enumerate(known()):
        found = examine(vm)
        lines = [found.summary()]
        if item.config.getoption("--qmpblock-keep"):
            lines.append(f"kept: {vm.directory}; its script `again` starts this QEMU again")
        if directory is not None:
            place = directory / f"qemu{number}-{report.when}"
            _write(place, found, vm, item.nodeid)
            lines.append(f"artifacts: {place}")
        _add_section(report, f"QEMU {number}", "\n".join(lines))
    if directory is not None and directory.exists():
        named = ("qmpblock_artifacts", str(directory))
        if named not in item.user_properties:
            item.user_properties.append(named)
            report.user_properties.append(named)
    return report


def _add_section(report: pytest.TestReport, name: str, text: str) -> None:
    """Add it where JUnit's XML has it, too: of a report's own sections it shows only the captured.

    What pytest makes of an exception has sections of its own; a bare text has not.
    """
    add = getattr(report.longrepr, "addsection", None)
    if add is None:
        report.sections.append((name, text))
    else:
        add(name, text, "-")


def artifact_directory(config: pytest.Config, nodeid: str) -> Path | None:
    """Return where the files of a test's failure go; None: nowhere."""
    named = config.getoption("--qmpblock-artifacts") or config.getini("qmpblock_artifacts")
    if not named:
        return None
    readable = re.sub(r"[^\w.=-]+", "-", nodeid).strip("-")
    if len(readable) > _NAME or readable != nodeid:
        digest = hashlib.sha256(nodeid.encode(errors="surrogateescape")).hexdigest()[:8]
        readable = f"{readable[-_NAME:]}-{digest}"
    base = config.rootpath
    if config.getoption("--qmpblock-artifacts"):
        base = config.invocation_params.dir
    return base / str(named) / readable


def _write(place: Path, found: PostMortem, vm: QemuProcess, test: str) -> None:
    from qmpblock.testing.again import again
    from qmpblock.testing.qemu import MONITORS
    from qmpblock.testing.qmplog import hide

    script, _ = again(vm.command, vm.directory, MONITORS, test)
    place.mkdir(parents=True, exist_ok=True)
    for name, text in {**found.files(), "again": hide(script, vm.secrets())}.items():
        (place / name).write_text(text, errors="surrogateescape")
