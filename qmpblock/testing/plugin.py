"""The pytest plugin of qmpblock[testing]; docs/testing.md tells how to use it.

pytest loads it at every start, in every project of the environment. So it imports nothing
but pytest until a test asks for one of its fixtures.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any, Literal, Protocol, Unpack

import pytest

from qmpblock.testing.interrupt import interrupted
from qmpblock.testing.whichqemu import VARIABLE, default_qemu, described, version_of

try:
    from pytest_asyncio import fixture as _async_fixture
    from pytest_asyncio import is_async_test as _in_its_loop
except ImportError:  # installed without the extra: other projects' pytest must still start
    _async_fixture = pytest.fixture  # type: ignore[assignment]  # used the same way
    _in_its_loop = bool  # type: ignore[assignment]  # no fixture that asks can be set up

if TYPE_CHECKING:
    from qmpblock.testing.destination import StartDestination
    from qmpblock.testing.images import BuiltDisk, BuiltScenario
    from qmpblock.testing.invariant import Invariant
    from qmpblock.testing.qemu import QemuOptions, QemuProcess
    from qmpblock.testing.scenario import Scenario
    from qmpblock.testing.starter import Starter

pytest_plugins = ["qmpblock.testing.report", "qmpblock.testing.interrupt"]

_INVARIANT: pytest.StashKey[Invariant] = pytest.StashKey()
_STARTER: pytest.StashKey[Starter] = pytest.StashKey()
_FAILED: pytest.StashKey[bool] = pytest.StashKey()
_SKIPPED: pytest.StashKey[bool] = pytest.StashKey()


class StartQemu(Protocol):
    """What the fixture `start_qemu` is."""

    def __call__(
        self,
        what: Scenario | BuiltScenario | Sequence[BuiltDisk] = (),
        **options: Unpack[QemuOptions],
    ) -> Awaitable[QemuProcess]:
        """Start a QEMU; `options` are those of QemuProcess."""
        ...


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the ini option that says where scenarios are."""
    parser.addini(
        "qmpblock_scenarios",
        "directory of the scenarios (YAML) that the fixture `scenario` runs over",
        default="fixtures",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks."""
    for line in (
        'needs_qemu(versions, reason): skip unless the tested QEMU is such, as in ">= 8.0"',
        "scenarios(*patterns, directory=None): the scenarios that the fixture `scenario` runs over",
    ):
        config.addinivalue_line("markers", line)


def pytest_report_header() -> str:
    """Name the QEMU under test."""
    accel = os.environ.get("QMPBLOCK_ACCEL") or "tcg"
    try:
        qemu = described(default_qemu())
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return f"QEMU: none to test with ({error})"
    return f"QEMU: {qemu}, accel {accel}"


def pytest_report_collectionfinish(items: Sequence[pytest.Item]) -> list[str]:
    """Name the QEMUs that tests are run on by a parameter of `qemu_binary`."""
    named = {str(one) for item in items for one in _parameter(item)}
    lines = []
    for binary in sorted(named):
        try:
            lines.append(f"QEMU by parameter: {described(binary)}")
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            lines.append(f"QEMU by parameter: {binary} cannot be asked for its version ({error})")
    return lines


def _parameter(item: pytest.Item) -> list[object]:
    callspec = getattr(item, "callspec", None)
    value = callspec.params.get("qemu_binary") if callspec is not None else None
    return [value] if isinstance(value, str | Path) and which(value) else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `scenario` once for each."""
    if "scenario" not in metafunc.fixturenames:
        return
    if any("scenario" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")):
        return
    from qmpblock.testing.scenario import load_scenarios

    mark = metafunc.definition.get_closest_marker("scenarios")
    patterns = mark.args if mark and mark.args else ("*.yaml",)
    named = mark.kwargs.get("directory") if mark else None
    directory = metafunc.config.rootpath / (named or metafunc.config.getini("qmpblock_scenarios"))
    scenarios = [one for pattern in patterns for one in load_scenarios(directory, pattern)]
    params = []
    for scenario in scenarios:
        marks = []
        if scenario.requires is not None:
            needs = scenario.requires
            marks.append(pytest.mark.needs_qemu(needs.text, reason=needs.reason))
        params.append(pytest.param(scenario, id=scenario.name, marks=marks))
    metafunc.parametrize("scenario", params)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Have a test that is for some QEMUs only look at its own first, before all other fixtures."""
    names = getattr(item, "fixturenames", [])
    if "qemu_binary" in names and next(item.iter_markers("needs_qemu"), None):
        names.insert(0, _right_qemu.__name__)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what the tested QEMU is not for, where no fixture of the test says another QEMU."""
    if "qemu_binary" not in getattr(item, "fixturenames", []):
        _skip_unless_right(item, None)


@pytest.fixture
def _right_qemu(request: pytest.FixtureRequest, qemu_binary: str) -> None:
    """Skip a test that is not for its QEMU."""
    _skip_unless_right(request.node, str(qemu_binary))


def _skip_unless_right(item: pytest.Item, binary: str | None) -> None:
    for mark in item.iter_markers("needs_qemu"):
        from qmpblock.testing.scenario import Requirement

        needs = Requirement(mark.args[0], mark.kwargs.get("reason", ""))
        version = version_of(binary or default_qemu())
        if not needs.allows(version):
            item.stash[_SKIPPED] = True
            ours = ".".join(map(str, version))
            pytest.skip(f"needs QEMU {needs.text}, this is {ours}: {needs.reason}")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object],
) -> Generator[None, object, object]:
    """Have everything follow a `qemu_binary` that a project overrides.

    `build`, `Tools.of()`, and programs that a test starts, find the QEMU by the environment.
    """
    value = yield
    if fixturedef.argname == "qemu_binary":
        before = os.environ.get(VARIABLE)
        if which(before or "qemu-system-x86_64") != str(value):
            os.environ[VARIABLE] = str(value)
            fixturedef.addfinalizer(functools.partial(_set_back, before))
    return value


def _set_back(before: str | None) -> None:
    if before is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note that a test has failed."""
    report = yield
    if report.skipped and item.stash.get(_SKIPPED, False):
        path, line, _ = item.reportinfo()  # where the mark is, not where it is looked at
        report.longrepr = (str(path), (line or 0) + 1, str(report.longrepr[2]))  # type: ignore[index]
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """End what a test started in a loop of its own, before that loop is closed."""
    failure: Exception | None = None
    try:
        if starter := item.stash.get(_STARTER, None):
            starter.end_elsewhere(watched=_watched(item))
    except Exception as error:
        failure = error
    result = yield  # whatever else was set up for the test is torn down all the same
    if failure is not None:
        raise failure
    return result


@pytest.fixture(scope="session")
def qemu_binary() -> str:
    """Return the QEMU under test: $QMPBLOCK_QEMU, else qemu-system-x86_64 of the path."""
    from qmpblock.testing.images import find_qemu

    return find_qemu()


@pytest.fixture(scope="session")
def qemu_version(qemu_binary: str) -> tuple[int, int, int]:
    """Return the version of the QEMU under test."""
    return version_of(str(qemu_binary))


@pytest.fixture
def vm_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a private directory for this test, short enough for sockets; it is removed after.

    What the test, and programs that it starts, put into the temporary directory or keep as
    qmpblock's state lands there too: runs beside it do not disturb it.
    """
    from qmpblock.testing.scratch import leave, private_directory

    directory = private_directory()
    for variable, name in (("TMPDIR", "t"), ("QMPBLOCK_STATE", "state")):
        (directory / name).mkdir(mode=0o700)
        monkeypatch.setenv(variable, str(directory / name))
    monkeypatch.setattr(tempfile, "tempdir", str(directory / "t"))
    yield directory
    leave(directory)


@pytest.fixture
def invariant(request: pytest.FixtureRequest) -> Invariant:
    """Check that every VM of `start_qemu` ends as it began; `expect` declares the rest."""
    from qmpblock.testing.invariant import Invariant

    request.node.stash[_INVARIANT] = Invariant()
    return request.node.stash[_INVARIANT]  # type: ignore[no-any-return]  # node is an Item


@_async_fixture
async def start_qemu(
    request: pytest.FixtureRequest, qemu_binary: str, vm_dir: Path
) -> AsyncIterator[StartQemu]:
    """Give a function that starts QEMUs, which quit at the test's end.

    `vm = await start_qemu(scenario)`. It takes a Scenario (whose images it makes), a
    BuiltScenario or a list of BuiltDisk. The test may run in another event loop than fixtures.
    """
    from qmpblock.testing.loops import running_loop
    from qmpblock.testing.starter import Starter

    stash = request.node.stash
    # Another test runs in a loop of its own, if in any (asyncio.run, anyio), and closes it.
    starter = Starter(
        qemu_binary,
        vm_dir,
        watcher=lambda: stash.get(_INVARIANT, None),
        home=running_loop("start_qemu"),
        only_home=not _in_its_loop(request.node),
    )
    stash[_STARTER] = starter
    yield starter
    await starter.end(watched=_watched(request.node))


@pytest.fixture
def start_destination(
    start_qemu: StartQemu, vm_dir: Path, qemu_binary: str, invariant: Invariant
) -> StartDestination:
    """Give a function that starts the destination of a migration: `await start(source)`.

    A QEMU with the source's machine and devices and empty images of the same sizes, which waits
    (`-S -incoming defer`); with `shared=True`, with the source's own images. What a migration
    changes in the two the invariant does not look at.
    """
    from qmpblock.testing.destination import starting

    start = starting(start_qemu, vm_dir, qemu_binary)

    async def started(source: QemuProcess, **options: Any) -> QemuProcess:
        vm = await start(source, **options)
        invariant.forget(source)
        invariant.forget(vm)
        return vm

    return started


def _watched(item: pytest.Item) -> bool:
    """Whether it matters how a VM is left: not where its test failed, or was broken off."""
    return not (item.stash.get(_FAILED, False) or interrupted(item.config))


@pytest.fixture
def start_blocking_qemu(
    request: pytest.FixtureRequest, qemu_binary: str, vm_dir: Path
) -> Iterator[Callable[..., Any]]:
    """Give a function that starts QEMUs for a test without asyncio: all calls block.

    `vm = start_blocking_qemu(scenario, guest=True)`; `vm` has all of a QemuProcess.
    """
    from qmpblock.testing.blocking import Blocking, run
    from qmpblock.testing.starter import Starter

    stash = request.node.stash
    starter = Starter(qemu_binary, vm_dir, watcher=lambda: stash.get(_INVARIANT, None))

    def start(what: Any = (), **options: Any) -> Any:
        return Blocking(run(starter(what, **options)))

    yield start
    run(starter.end(watched=_watched(request.node)))


def _for_scope(scope: Literal["module", "session"]) -> Any:
    """Make the fixture that starts QEMUs for a module, or for the whole run."""

    async def start(qemu_binary: str) -> AsyncIterator[StartQemu]:
        from qmpblock.testing.loops import running_loop
        from qmpblock.testing.scratch import leave, private_directory
        from qmpblock.testing.starter import Starter

        name = f"start_{scope}_qemu"
        home = running_loop(name)
        directory = private_directory()
        starter = Starter(qemu_binary, directory, name=name, home=home, only_home=True)
        try:
            yield starter
            await starter.end()
        finally:
            leave(directory)

    start.__doc__ = f"Give a function that starts QEMUs, which quit when the {scope} has ended."
    if _async_fixture is pytest.fixture:
        return pytest.fixture(scope=scope)(start)
    return _async_fixture(scope=scope, loop_scope=scope)(start)


start_module_qemu = _for_scope("module")
start_session_qemu = _for_scope("session")
