"""The plugin as another project meets it: installed, in a directory of its own."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qmpblock.testing import QemuProcess, Tools
from qmpblock.testing.images import find_qemu
from qmpblock.testing.qemu import QemuOptions

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
            await vm.wait(120)
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


@pytest.fixture
def another_qemu(pytester: pytest.Pytester) -> Path:
    """The tested QEMU under a path of its own, which says that it is of version 99."""
    qemu = find_qemu()
    path = pytester.path / "bin" / "qemu-99"
    path.parent.mkdir()
    path.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "QEMU emulator version 99.1.2" && exit\n'
        f'exec {qemu} "$@"\n'
    )
    path.chmod(0o755)
    (path.parent / "qemu-img").symlink_to(Tools.of(qemu).img)
    (path.parent / "qemu-io").symlink_to(Tools.of(qemu).io)
    return path


@pytest.mark.parametrize("scope", ["session", "function"])
def test_an_overridden_qemu_is_followed_by_everything(
    pytester: pytest.Pytester,
    another_qemu: Path,
    scope: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SESSION", "yes" if scope == "session" else "")
    pytester.makeconftest(
        f"""
        import pytest

        @pytest.fixture(scope={scope!r}, params=[{find_qemu()!r}, {str(another_qemu)!r}])
        def qemu_binary(request):
            return request.param
        """
    )
    pytester.makepyfile(
        """
        import os, shutil
        import pytest
        from qmpblock.testing import Tools, build, parse_scenario
        from qmpblock.testing.images import find_qemu

        ONE = parse_scenario("about: One\\nimages: [{size: 1M}]\\n", "one")
        SESSION = bool(os.environ["SESSION"])

        async def test_it(start_qemu, qemu_binary, vm_dir):
            vm = await start_qemu(ONE)
            assert vm.command[0] == qemu_binary == find_qemu()
            assert os.path.dirname(Tools.of().img) == os.path.dirname(qemu_binary)
            assert os.environ.get("QMPBLOCK_QEMU") == qemu_binary or "99" not in qemu_binary

        @pytest.fixture
        def costly(qemu_binary):
            assert "99" in qemu_binary, "it is skipped before"

        @pytest.mark.needs_qemu(">= 99", reason="what is to come")
        async def test_future(costly, start_qemu, qemu_binary):
            assert (await start_qemu(ONE)).command[0] == qemu_binary

        @pytest.mark.needs_qemu("< 99", reason="what is gone")
        def test_past(start_qemu):
            pass

        def test_afterwards():  # it is set for as long as the fixture lives
            is_set = "99" in os.environ.get("QMPBLOCK_QEMU", "")
            assert is_set == SESSION
        """
    )
    result = run(pytester, "-v")
    result.assert_outcomes(passed=5, skipped=2)
    result.stdout.fnmatch_lines(["QEMU by parameter: 99.1.2 (*/qemu-99)"])
    result.stdout.fnmatch_lines(
        [
            "SKIPPED * test_an_overridden*.py:19: needs QEMU >= 99, this is *: what is to come",
            "SKIPPED * test_an_overridden*.py:23: needs QEMU < 99, this is 99.1.2: what is gone",
        ]
    )


def test_the_version_follows_an_override(pytester: pytest.Pytester, another_qemu: Path) -> None:
    pytester.makeconftest(
        f"""
        import pytest

        @pytest.fixture(scope="session", params=[{find_qemu()!r}, {str(another_qemu)!r}])
        def qemu_binary(request):
            return request.param
        """
    )
    pytester.makepyfile(
        """
        def test_it(qemu_version, qemu_binary):
            assert (qemu_version == (99, 1, 2)) == ("99" in qemu_binary)
        """
    )
    run(pytester).assert_outcomes(passed=2)


def test_an_option_that_there_is_not_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        from qmpblock.testing import QemuProcess, parse_scenario

        ONE = parse_scenario("about: One\\nimages: [{size: 1M}]\\n", "one")

        async def test_it(start_qemu, vm_dir):
            with pytest.raises(TypeError, match="no option 'gest'; did you mean 'guest'"):
                await start_qemu(ONE, gest=True)
            with pytest.raises(TypeError, match="no option 'x'; there are: machine, "):
                await start_qemu(x=1)
            assert not (vm_dir / "images0").exists()
        """
    )
    run(pytester).assert_outcomes(passed=1)


def test_the_type_of_an_option_that_there_is_not_is_wrong(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        use="""
        from qmpblock.testing import QemuProcess, StartQemu

        async def use(start_qemu: StartQemu) -> QemuProcess:
            await start_qemu(guest=True, machine="q35")
            await start_qemu(guest="yes")
            return await start_qemu(gest=True)
        """
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "use.py"],
        cwd=pytester.path,
        capture_output=True,
        text=True,
        check=False,
    )
    said = re.findall(r"use.py:(\d+): error: (.*?)  \[", done.stdout)
    assert [line for line, _ in said] == ["5", "6"], done.stdout
    assert 'incompatible type "str"; expected "bool"' in said[0][1]
    assert 'Unexpected keyword argument "gest"' in said[1][1]


def test_the_options_are_those_of_a_process() -> None:
    signature = inspect.signature(QemuProcess)
    assert list(QemuOptions.__annotations__) == [n for n in signature.parameters if n != "disks"]
