"""A failure explains itself, in the terminal, in JUnit's XML and in files, and can be repeated."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from qmpblock.errors import ConnectError
from qmpblock.qemu.monitor import Monitor

pytest_plugins = ["pytester"]

SECRET = "correct-horse-battery"

FAILING = f"""
    from qmpblock.testing import parse_scenario, QemuProcess
    from qmpblock.qemu.monitor import Monitor

    SCENARIO = parse_scenario('''
    about: Encrypted, over a plain one.
    images:
      - {{size: 8M, content: [write 0 64K 0x11]}}
      - {{options: {{encrypt.format: luks, encrypt.iter-time: 10}}, secret: {SECRET}}}
    guest: [write 1M 64K 0x22, flush]
    ''', "encrypted")

    async def test_good(start_qemu):
        await start_qemu()

    async def test_it(start_qemu):
        vm = await start_qemu(SCENARIO, guest=True)
        await vm.guest_writes("d0")
        async with await Monitor.connect(vm.monitor_path) as tool:
            secret = {{"qom-type": "secret", "id": "s", "data": "{SECRET}"}}
            await tool.execute("object-add", secret)
            await tool.execute("stop")
        assert vm.returncode == "not this"
"""


@pytest.fixture(autouse=True)
def short(pytester: pytest.Pytester, vm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytester.makeini(
        "[pytest]\nasyncio_mode = auto\nfilterwarnings = error\njunit_family = xunit2\n"
        "asyncio_default_fixture_loop_scope = function\n"
    )
    (vm_dir / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(vm_dir / "tmp"))
    return vm_dir / "tmp"


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)


EXPECTED = (
    "exit code: still running",
    "command: .*qemu.* -nodefaults",
    "VM: paused; jobs: none",
    "queue 0 of /machine/peripheral/vd0/virtio-backend: offered",
    r"threads: \d+ qemu\S* waits in \w+, at ",
    r"  < OK \d+",
    r"\S+Z control > \{\"execute\":",
    r"\S+Z A > \{\"execute\": \"object-add\", .*\(hidden\)",
    r"\S+Z A < \{\"timestamp\": .*\"STOP\"",
)


def test_the_terminal_junit_and_artifacts_tell_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FAILING)
    result = run(pytester, "--junit-xml=junit.xml", "--qmpblock-artifacts=out")
    result.assert_outcomes(passed=1, failed=1)
    [case] = [
        case
        for case in ElementTree.parse(pytester.path / "junit.xml").iter("testcase")
        if case.get("name") == "test_it"
    ]
    failure = case.find("failure")
    assert failure is not None
    assert failure.text is not None
    for told in (result.stdout.str(), failure.text):
        assert "the guest's serial port:" in told
        assert told.count("QEMU 0") == 1
        for line in EXPECTED:
            assert re.search(line, told), line
    [named] = [one.get("value") for one in case.iter("property")]
    [place] = (pytester.path / "out").iterdir()
    assert named == str(place)
    files = {path.name: path.read_text() for path in (place / "qemu0-call").iterdir()}
    assert set(files) == {"qemu.txt", "state.txt", "qmp.log", "console.log", "again"}
    whole = "\n".join(files.values())
    for line in EXPECTED:
        assert re.search(line.removeprefix("  "), whole), line
    for text in (result.stdout.str(), whole, failure.text):
        assert SECRET not in text.replace(FAILING, "").partition("QEMU 0")[2]


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "with-workers"])
async def test_what_is_kept_starts_again(
    workers: list[str], pytester: pytest.Pytester, short: Path
) -> None:
    pytester.makepyfile(FAILING)
    result = run(pytester, "--qmpblock-keep", *workers)
    result.assert_outcomes(passed=1, failed=1)
    [kept] = short.glob("qt-*")  # that of the test which passed is gone
    script = kept / "vm0" / "again"
    assert re.search(rf"kept: {kept}/vm0; its script `again`", result.stdout.str())
    assert SECRET not in script.read_text()
    with subprocess.Popen([script, "-name", "by-hand"]) as process:
        try:
            async with await _connect(process, kept / "vm0" / "qmp") as monitor:
                assert await monitor.execute("query-name") == {"name": "by-hand"}
                path = "/machine/peripheral/vd0/virtio-backend"
                for read in ("read -P 0x22 1M 64k", "read -P 0x11 0 64k"):
                    line = {"command-line": f'qemu-io -d "{path}" "{read}"'}
                    assert await monitor.execute("human-monitor-command", line) == ""
                assert await _says_hello(kept / "vm0" / "serial")
                await monitor.execute("quit")
            assert process.wait(30) == 0
        finally:
            process.kill()
    run(pytester, "-k", "good").assert_outcomes(passed=1)
    assert script.exists(), "a kept directory stays"


async def _connect(process: subprocess.Popen[bytes], path: Path) -> Monitor:
    """Connect once it listens: its socket has a name a moment before it does."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return await Monitor.connect(str(path))
        except ConnectError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


async def _says_hello(path: Path) -> bool:
    """Ask until it answers: what comes before the guest has set up its line is lost."""
    reader, writer = await asyncio.open_unix_connection(path)
    for number in range(1, 60):
        writer.write(f"{number} hello\n".encode())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                while line := await reader.readline():
                    if line.startswith(b"OK "):
                        writer.close()
                        return True
    return False


def test_without_the_option_nothing_is_kept(pytester: pytest.Pytester, short: Path) -> None:
    pytester.makepyfile(FAILING)
    result = run(pytester)
    result.assert_outcomes(passed=1, failed=1)
    assert list(short.iterdir()) == []
    assert "kept:" not in result.stdout.str()


def test_a_failure_at_a_tests_end_keeps_too(pytester: pytest.Pytester, short: Path) -> None:
    pytester.makepyfile(
        """
        import os, signal
        from qmpblock.testing import QemuProcess

        async def test_died(start_qemu):
            vm = await start_qemu()
            os.kill(vm.pid, signal.SIGSEGV)
            await vm.wait(120)

        async def test_without_fixture():
            async with QemuProcess() as vm:
                assert vm.pid == 0
        """
    )
    result = run(pytester, "--qmpblock-keep")
    result.assert_outcomes(passed=1, failed=1, errors=1)
    died, own = sorted(short.glob("qt-*"), key=lambda path: (path / "again").exists())
    assert (died / "vm0" / "again").exists()
    assert (own / "again").exists()
    result.stdout.fnmatch_lines(["*QemuFailure: QEMU had ended by itself", "state: it has ended"])


def test_a_qemu_that_hangs_is_told_of_by_its_threads(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import os, signal, pytest

        PIDS = []

        @pytest.fixture
        def stop():
            return lambda pid: (PIDS.append(pid), os.kill(pid, signal.SIGSTOP))

        @pytest.hookimpl(wrapper=True, tryfirst=True)
        def pytest_runtest_makereport():
            report = yield  # once all is told
            for pid in PIDS:
                os.kill(pid, signal.SIGCONT)
            PIDS.clear()
            return report
        """
    )
    pytester.makepyfile(
        """
        async def test_it(start_qemu, stop):
            stop((await start_qemu()).pid)
            raise AssertionError
        """
    )
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines(
        [r"QEMU's monitor does not answer: ", r"threads: \d+ qemu\S* is stopped in "]
    )


def test_the_ini_option_is_relative_to_the_root(pytester: pytest.Pytester) -> None:
    with (pytester.path / "tox.ini").open("a") as file:
        file.write("\nqmpblock_artifacts = out\n")
    sub = pytester.mkdir("sub")
    (sub / "test_x.py").write_text(
        "async def test_x(start_qemu):\n    assert await start_qemu() == 1"
    )
    pytester.runpytest_subprocess("--rootdir=.", "sub/test_x.py").assert_outcomes(failed=1)
    [place] = (pytester.path / "out").iterdir()
    assert re.fullmatch(r"sub-test_x\.py-test_x-[0-9a-f]{8}", place.name)


def test_a_test_without_a_qemu_is_told_of_as_ever(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(vm_dir): raise AssertionError")
    result = run(pytester, "--qmpblock-artifacts=out")
    result.assert_outcomes(failed=1)
    result.stdout.no_fnmatch_line("*QEMU 0*")
    assert not (pytester.path / "out").exists()
