"""The plugin as another project meets it: installed, in a directory of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

DOCS = Path(__file__).parents[2] / "docs" / "testing.md"


@pytest.fixture(autouse=True)
def _asyncio(pytester: pytest.Pytester) -> None:
    pytester.makeini(
        "[pytest]\nasyncio_mode = auto\nfilterwarnings = error\n"
        "asyncio_default_fixture_loop_scope = function\n"
    )


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-rs", *arguments)


def test_the_documented_example_works(pytester: pytest.Pytester) -> None:
    blocks = re.findall(r"```\w+ title=(\S+)\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == [
        *("pytest.ini", "fixtures/two-layers.yaml", "test_disk.py")
    ]
    for name, text in blocks:
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (pytester.path / "tox.ini").unlink()
    result = run(pytester, "-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["QEMU: *.*.* (*), accel *", "*test_every_scenario?two-layers? P*"])


def test_a_failure_shows_the_command_line_and_stderr(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        async def test_it(start_qemu):
            vm = await start_qemu()
            assert vm.returncode == "not this"
        """
    )
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*- QEMU 0 -*", "exit code: still running", "command: *-nodefaults*", "stderr: empty"]
    )


def test_a_qemu_that_died_fails_its_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os, signal

        async def test_it(start_qemu):
            vm = await start_qemu()
            os.kill(vm.pid, signal.SIGSEGV)
            await vm.wait(10)
        """
    )
    result = run(pytester)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*QemuFailure: QEMU had ended by itself", "*-11 (SIGSEGV)"])


def test_a_leak_fails_its_test_and_only_with_the_invariant(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        async def test_checked(start_qemu, invariant):
            await (await start_qemu()).execute("object-add", qom_type="secret", id="a", data="b")

        async def test_unchecked(start_qemu):
            await (await start_qemu()).execute("object-add", qom_type="secret", id="a", data="b")
        """
    )
    result = run(pytester)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*the VM is not as it was:", "*appeared: object: a secret"])


def test_marks(pytester: pytest.Pytester) -> None:
    pytester.mkdir("here")
    for name, needs in (("one", ""), ("two", "requires: {qemu: '< 1', reason: it is too new}")):
        text = f"about: It is {name}.\nimages: [{{size: 1M}}]\n{needs}\n"
        (pytester.path / "here" / f"{name}.yaml").write_text(text)
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.scenarios("*.yaml", directory="here")
        def test_both(scenario):
            assert scenario.about == "It is one."

        @pytest.mark.needs_qemu(">= 1000", reason="of the future")
        def test_future():
            raise AssertionError

        @pytest.mark.parametrize("scenario", [1])
        def test_its_own(scenario):
            assert scenario == 1
        """
    )
    result = run(pytester, "--strict-markers")
    result.assert_outcomes(passed=2, skipped=2)
    result.stdout.fnmatch_lines_random(
        ["*needs QEMU < 1, this is *: it is too new", "*needs QEMU >= 1000, this is *: of the f*"]
    )


def test_a_wrong_scenario_is_a_collection_error(pytester: pytest.Pytester) -> None:
    pytester.mkdir("fixtures")
    (pytester.path / "fixtures" / "bad.yaml").write_text("about: Bad.\nimages: 7\n")
    pytester.makepyfile("def test_it(scenario): pass")
    result = run(pytester)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixtures/bad.yaml:2:9: images: must be a list*"])


def test_temporary_files_of_a_test_lie_in_its_own_directory(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os, tempfile

        def test_it(vm_dir):
            assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(vm_dir / "t")
            assert os.environ["QMPBLOCK_STATE"] == str(vm_dir / "state")
            assert vm_dir.stat().st_mode & 0o777 == 0o700
            print("dir", vm_dir)
        """
    )
    result = run(pytester, "-s")
    result.assert_outcomes(passed=1)
    (line,) = [line for line in result.outlines if "dir /" in line]
    assert not Path(line.split("dir ")[1].split()[0].rstrip(".")).exists()


def test_a_project_without_qemu_runs(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QMPBLOCK_QEMU", "/nowhere/qemu")
    pytester.makepyfile("def test_it(): pass\ndef test_qemu(qemu_binary): pass")
    result = run(pytester)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["QEMU: none to test with (no program /nowhere/qemu*"])


def test_the_plugin_imports_nothing_heavy() -> None:
    program = (
        "import sys, pytest, qmpblock.testing.plugin;"
        "print([name for name in ('numpy', 'yaml', 'qemu.qmp', 'click', 'rich')"
        " if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"
