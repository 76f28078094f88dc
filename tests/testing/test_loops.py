"""Fixtures and tests in any event loop, or in none: it works, or it is said at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

pytest_plugins = ["pytester"]
LIMIT = 120.0  # seconds; what waits at the end for a loop that does not run would take 130

HEAD = """
import asyncio
import pytest, pytest_asyncio
from qmpblock.testing import StressSpec, parse_scenario
from qmpblock.testing.loops import WrongLoopError
ONE = parse_scenario("about: One.\\nimages: [{size: 8M}]\\n", "one")

async def use(vm):
    assert (await vm.execute("query-status"))["status"] == "running"
    await vm.guest.write(0, 0, 4096, seq=1, seed=1)
    assert (await vm.guest.hello()).disks

"""


@pytest.fixture(params=["auto", "strict"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(
    pytester: pytest.Pytester,
    text: str,
    *,
    mode: str = "strict",
    fixtures: str = "function",
    options: Sequence[str] = (),
) -> pytest.RunResult:
    pytester.makeini(
        f"[pytest]\nasyncio_mode = {mode}\nfilterwarnings = error\n"
        f"asyncio_default_fixture_loop_scope = {fixtures}\n"
    )
    pytester.makepyfile(HEAD + text)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)
    assert result.duration < LIMIT
    return result


SCOPES = ("function", "class", "module", "package", "session")


@pytest.mark.parametrize("fixtures", ["function", "module", "session"])
def test_a_test_in_any_loop_starts_a_vm(
    pytester: pytest.Pytester, mode: str, fixtures: str
) -> None:
    tests = "\n".join(
        f"""
class Test{scope.title()}:
    @pytest.mark.asyncio(loop_scope="{scope}")
    async def test_it(self, start_qemu, invariant):
        vm = await start_qemu(ONE, guest=True)
        await use(vm)
"""
        for scope in SCOPES
    )
    run(pytester, tests, mode=mode, fixtures=fixtures).assert_outcomes(passed=len(SCOPES))


@pytest.mark.parametrize("fixtures", ["function", "session"])
def test_what_is_wrong_in_another_loop_is_found_there(
    pytester: pytest.Pytester, fixtures: str
) -> None:
    """The teardown runs in the test's loop: a leak is still a leak."""
    text = """
@pytest.mark.asyncio(loop_scope="module")
async def test_it(start_qemu, invariant):
    vm = await start_qemu(ONE)
    await vm.execute("object-add", qom_type="secret", id="left", data="x")
"""
    result = run(pytester, text, fixtures=fixtures)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*appeared: object: left*"])


def test_a_fixture_of_the_module_in_a_test_of_another_loop(pytester: pytest.Pytester) -> None:
    text = """
@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm(start_module_qemu):
    return await start_module_qemu(ONE, guest=True)

@pytest.mark.asyncio(loop_scope="module")
async def test_right(vm):
    await use(vm)

@pytest.mark.asyncio
async def test_wrong(vm):
    await use(vm)

@pytest.mark.asyncio
async def test_wrong_guest(vm):
    await vm.guest.hello()

@pytest.mark.asyncio(loop_scope="module")
async def test_right_again(vm):
    await use(vm)
"""
    result = run(pytester, text)
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        [
            "*WrongLoopError: this VM was started in another event loop*never answer here*",
            '*@pytest.mark.asyncio(loop_scope="module")*',
            "*WrongLoopError: this guest's line was started in another event loop*",
        ]
    )


def test_vms_of_a_module_and_of_the_run(pytester: pytest.Pytester) -> None:
    text = """
pids = set()

@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("number", range(3))
async def test_module(start_module_qemu, number):
    if not pids:
        pids.add((await start_module_qemu(ONE, guest=True)).pid)
    await use(start_module_qemu.vms[0])
    assert {vm.pid for vm in start_module_qemu.vms} == pids

@pytest.mark.asyncio(loop_scope="session")
async def test_session(start_session_qemu):
    vm = await start_session_qemu(ONE, guest=True)
    await use(vm)
    assert vm.pid not in pids
"""
    run(pytester, text).assert_outcomes(passed=4)


def test_a_vm_of_the_module_is_not_started_in_a_loop_that_ends_before(
    pytester: pytest.Pytester,
) -> None:
    text = """
@pytest.mark.asyncio
async def test_wrong(start_module_qemu):
    await start_module_qemu(ONE)

@pytest.mark.asyncio(loop_scope="module")
async def test_wrong_too(start_session_qemu):
    await start_session_qemu(ONE)
"""
    result = run(pytester, text)
    result.assert_outcomes(failed=2)  # and no error at a teardown
    result.stdout.fnmatch_lines(
        [
            "*WrongLoopError: start_module_qemu was called in an event loop that*",
            '*loop_scope="module"*',
            "*WrongLoopError: start_session_qemu was called in an event loop that*",
        ]
    )


def test_a_loop_that_is_not_pytest_asyncios_is_refused_at_once(pytester: pytest.Pytester) -> None:
    """As anyio's plugin, for one, runs a test: a coroutine, in a runner of its own."""
    pytester.makeconftest(
        """
        import asyncio, pytest

        @pytest.hookimpl(tryfirst=True)
        def pytest_pyfunc_call(pyfuncitem):
            if pyfuncitem.get_closest_marker("mine"):
                names = pyfuncitem._fixtureinfo.argnames
                values = {name: pyfuncitem.funcargs[name] for name in names}
                asyncio.run(pyfuncitem.obj(**values))
                return True
        """
    )
    text = """
@pytest.mark.mine
async def test_it(start_qemu):
    await start_qemu(ONE)
"""
    result = run(pytester, text, options=["-W", "ignore::pytest.PytestUnknownMarkWarning"])
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*WrongLoopError: start_qemu was called in an event loop that*"])


def test_ctrl_c_waits_until_a_blocking_call_has_ended() -> None:
    program = """
import asyncio, os, signal, threading
from qmpblock.testing.blocking import run

async def work():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.2)
        print("put away")

try:
    run(work())
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=LIMIT
    )
    assert done.stdout.split("\n") == ["put away", "interrupted", ""]


def test_asyncio_run_in_a_test_is_refused_at_once(pytester: pytest.Pytester, mode: str) -> None:
    text = """
def test_it(start_qemu):
    async def work():
        await start_qemu(ONE)
    asyncio.run(work())
"""
    result = run(pytester, text, mode=mode)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*WrongLoopError: start_qemu was called in an event loop that*"])
    result.stdout.fnmatch_lines(["*takes the fixture start_blocking_qemu*"])


def test_without_a_loop_of_asyncio_it_is_said_at_once(pytester: pytest.Pytester) -> None:
    text = """
def test_it(start_qemu):
    with pytest.raises(WrongLoopError, match="trio has another"):
        start_qemu(ONE).send(None)
"""
    run(pytester, text).assert_outcomes(passed=1)


def test_a_vm_whose_loop_was_closed_is_killed_and_told_of(pytester: pytest.Pytester) -> None:
    text = """
import threading

@pytest.mark.asyncio
async def test_it(start_qemu, vm_dir):
    made = []
    def elsewhere():
        async def work():
            made.append(await start_qemu(ONE))
        asyncio.run(work())
    await asyncio.to_thread(elsewhere)
    with pytest.raises(WrongLoopError, match="that has been closed"):
        await made[0].execute("query-status")
"""
    result = run(pytester, text)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*WrongLoopError: a VM was killed: the event loop*was closed*"])


BLOCKING = """
def test_it(start_blocking_qemu, invariant):
    vm = start_blocking_qemu(ONE, guest=True)
    assert vm.execute("query-status")["status"] == "running"
    vm.guest_writes("d0")
    spec = StressSpec(blocks=1024, total=500)
    vm.guest.stress(spec)
    vm.guest.finish_stress()
    with vm.guest.bounds(0) as bounds:
        assert vm.guest.check() > 0
    assert (bounds[0].acked, bounds[0].issued) == (500, 500)
    assert "node-name" in vm.control.execute("query-named-block-nodes")[0]
    assert vm.pid and vm.version > (7,)
    with pytest.raises(ValueError, match="mine"):
        with vm.guest.bounds(0):
            raise ValueError("mine")
"""


def test_a_test_without_asyncio(pytester: pytest.Pytester, mode: str) -> None:
    run(pytester, BLOCKING, mode=mode).assert_outcomes(passed=1)


def test_a_test_without_asyncio_has_the_invariant_too(pytester: pytest.Pytester) -> None:
    text = """
def test_it(start_blocking_qemu, invariant):
    vm = start_blocking_qemu(ONE)
    vm.execute("object-add", qom_type="secret", id="left", data="x")
"""
    result = run(pytester, text)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*appeared: object: left*", "*- QEMU 0 -*"])


def test_what_fails_in_a_blocking_call_is_raised_by_it(pytester: pytest.Pytester) -> None:
    text = """
from qmpblock.errors import CommandError

def test_it(start_blocking_qemu):
    vm = start_blocking_qemu(ONE)
    with pytest.raises(CommandError, match="nonsense"):
        vm.execute("nonsense")
    with pytest.raises(TypeError, match="did you mean 'guest'"):
        start_blocking_qemu(ONE, gest=True)
"""
    run(pytester, text).assert_outcomes(passed=1)
