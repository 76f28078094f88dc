"""tools/run_tests.py: how results are counted and shown, and what counts as a failure."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "run_tests.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_tests", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_tests"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


run_tests = load()

TESTS = """\
import pytest

def test_good():
    pass

def test_bad():
    assert SEEN

@pytest.mark.skip(reason="not here")
def test_left():
    pass

@pytest.fixture
def broken():
    raise OSError

def test_error(broken):
    pass
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty project in place of this one, for pytest to run in."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  live\n  soak\n")
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    monkeypatch.setattr(run_tests, "WORKERS", ())
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return tmp_path


def test_pytest_is_counted(project: Path) -> None:
    (project / "test_it.py").write_text(TESTS.replace("SEEN", "False"))
    result = run_tests.run_pytest("unit tests", "not live", [])
    assert not result.good
    assert (result.passed, result.failed, result.skipped) == (1, 2, 1)


def test_the_qemu_under_test_is_told(project: Path) -> None:
    (project / "test_it.py").write_text(
        "import os\ndef test_it():\n    assert os.environ['QMPBLOCK_QEMU'] == '/a b/qemu'\n"
    )
    for qemu, good in (("/a b/qemu", True), ("/other", False)):
        settings = {"QMPBLOCK_QEMU": qemu}
        assert run_tests.run_pytest("live tests", "not live", [], settings=settings).good == good


def test_no_tests_is_a_failure_unless_they_were_chosen(project: Path) -> None:
    (project / "test_it.py").write_text("def test_it(): pass\n")
    assert not run_tests.run_pytest("live tests", "live", []).good
    chosen = run_tests.run_pytest("live tests", "live", ["-k", "it"])
    assert (chosen.good, chosen.passed, chosen.note) == (True, 0, "no tests")


def test_a_pytest_that_does_not_start_is_a_failure(project: Path) -> None:
    result = run_tests.run_pytest("unit tests", "not live", ["--no-such-option"])
    assert (result.good, result.passed) == (False, None)
    assert "exit code 4" in result.note


def test_a_qemu_that_does_not_start_is_a_failure(tmp_path: Path) -> None:
    result = run_tests.run_live(str(tmp_path / "qemu"), [], {})
    assert (result.good, result.note) == (False, "it does not start")


def test_the_slowest_functions_are_told_all_cases_together(tmp_path: Path) -> None:
    cases = [("m.test_a", "test_one", 1.5), *(("m.test_b", f"test_two[{n}]", 1) for n in range(2))]
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        + "".join(f'<testcase classname="{c}" name="{n}" time="{t}"/>' for c, n, t in cases)
        + "</testsuite></testsuites>"
    )
    assert [line.strip() for line in run_tests.slowest(report)] == [
        "2.0 s  m.test_b::test_two (2 cases)",
        "1.5 s  m.test_a::test_one",
    ]


def test_the_slowest_are_told_after_a_run(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "test_it.py").write_text("def test_one(): pass\n")
    assert run_tests.run_pytest("unit tests", "not live", []).good
    assert " s  test_it::test_one\n" in capfd.readouterr().out.partition("slowest")[2]


def test_every_file_with_a_live_test_is_looked_into() -> None:
    """One elsewhere would never run."""
    tests = SCRIPT.parents[1] / "tests"
    marked = re.compile(r"^(@|pytestmark = .*|    )pytest\.mark\.live", re.MULTILINE)
    found = [
        str(path.relative_to(tests.parent))
        for path in sorted(tests.rglob("test_*.py"))
        if marked.search(path.read_text()) and "soak" not in path.parts
    ]
    assert len(found) > 50
    assert [path for path in found if not path.startswith(run_tests.LIVE_PATHS)] == []


def test_the_total_and_when_it_is_too_much() -> None:
    good, bad = run_tests.Result("a", True, 900), run_tests.Result("b", False, 300)
    assert run_tests.total([good, bad]) == run_tests.Result("total", False, 1200)
    slow = run_tests.total([good, bad, good])
    assert (slow.seconds, slow.note) == (2100, "slow: it should take at most 20 minutes")


def test_bytecode_is_kept_where_none_may_lie_beside_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "it.py").write_text("")
    cache = tmp_path / "cache"
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", "")  # for monkeypatch to set it back
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    run_tests.share_bytecode(str(cache))
    subprocess.run([sys.executable, "-c", "import it"], cwd=tmp_path, check=True)
    assert [path.name.partition(".")[0] for path in cache.rglob("it.*.pyc")] == ["it"]
    assert sorted(os.listdir(tmp_path)) == ["cache", "it.py"]


def test_all_is_compiled_before_the_workers_come(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pytest compiles it: with its asserts rewritten."""
    (project / "test_it.py").write_text("import mine\ndef test_it(): assert mine\n")
    (project / "mine.py").write_text("")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", "")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", str(project))
    run_tests.share_bytecode(str(tmp_path / "cache"))
    with run_tests.compiling() as process:
        assert process.wait() == 0
    found = {path.name for path in (tmp_path / "cache").rglob("*.pyc")}
    assert any(re.fullmatch(r"test_it\..*-pytest-.*", name) for name in found)
    assert any(re.fullmatch(r"mine\.[^.]*\.pyc", name) for name in found)


def test_what_compiles_does_not_outlive_the_tests(project: Path) -> None:
    (project / "test_it.py").write_text("import time\ntime.sleep(600)\n")
    with run_tests.compiling() as process:
        pass
    assert process.returncode == -signal.SIGTERM


def test_table() -> None:
    results = [
        run_tests.Result("mypy", False, 7.25),
        run_tests.Result("live tests", True, 100.0, 120, 0, 3),
        run_tests.Result("others", True, note="not run"),
    ]
    assert run_tests.table(results).splitlines() == [
        "            passed  failed  skipped  seconds",
        "mypy        FAILED                       7.2",
        "live tests     120       0        3    100.0",
        "others          ok                       0.0  not run",
    ]


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], dict[str, str]]]:
    """Have nothing run: which QEMUs would be, with which words and settings."""
    seen = []

    def run(qemu: str, words: list[str], turn: dict[str, str]) -> object:
        seen.append((Path(qemu).name, words, turn))
        return run_tests.Result("live", True)

    monkeypatch.setattr(run_tests, "run_live", run)
    monkeypatch.setattr(run_tests, "compiling", contextlib.nullcontext)
    monkeypatch.setattr(run_tests, "fetch_newer", lambda wanted: f"/newer/{wanted}")
    for name in ("run_check", "run_pytest"):
        monkeypatch.setattr(run_tests, name, lambda *_, **__: run_tests.Result("other", True))
    return seen


def test_words_after_the_dashes_are_pytests(
    live: list[tuple[str, list[str], dict[str, str]]],
) -> None:
    assert run_tests.main(["matrix", "--qemu", "", "--", "-k", "a b"]) == 0
    assert [(name, words) for name, words, _ in live] == [
        (name, ["-k", "a b"]) for name in ("qemu-system-x86_64", "10", "11")
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["test"], ["0/2", "1/2"]),
        (["test", "--", "-k", "map"], ["0/1", "0/1"]),  # chosen, so for each
        (["test", "--qemu", "/one"], ["0/1"]),
        (["matrix"], ["0/1", "0/1", "0/1"]),
    ],
)
def test_qemus_take_turns(
    words: list[str],
    expected: list[str],
    live: list[tuple[str, list[str], dict[str, str]]],
) -> None:
    assert run_tests.main(words) == 0
    assert [turn["QMPBLOCK_TURN"] for _, _, turn in live] == expected
    assert len({turn["QMPBLOCK_SEED"] for _, _, turn in live}) == 1


def test_the_sample_follows_from_what_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=n", "-c", "user.email=e")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    seeds = []
    git("init")
    for text in ("one", "one", "another", "one"):
        (tmp_path / "file").write_text(text)
        git("add", "file")
        git("commit", "--allow-empty", "-m", "message")
        seeds.append(run_tests.seed_of_tree())
    assert seeds[0] == seeds[1] == seeds[3] != seeds[2]


def test_what_is_tried_by_example_follows_from_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setenv("QMPBLOCK_SEED", "7")
    monkeypatch.setattr(run_tests, "compiling", contextlib.nullcontext)
    for name in ("run_check", "run_live"):
        monkeypatch.setattr(run_tests, name, lambda *_, **__: run_tests.Result("other", True))
    monkeypatch.setattr(
        run_tests,
        "run_pytest",
        lambda *_, **how: seen.append(how) or run_tests.Result("unit", True),
    )
    assert run_tests.main(["test", "--qemu", "/one"]) == 0
    assert [word for word in seen[0]["where"] if "seed" in word] == ["--hypothesis-seed=7"]
    assert seen[0]["settings"] == {"QMPBLOCK_SEED": "7"}


def test_what_is_no_repository_has_a_sample_by_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    assert run_tests.seed_of_tree() != run_tests.seed_of_tree()


def test_one_that_cannot_be_had_has_no_turn(
    monkeypatch: pytest.MonkeyPatch, live: list[tuple[str, list[str], dict[str, str]]]
) -> None:
    monkeypatch.setattr(run_tests, "fetch_newer", lambda wanted: None)
    assert run_tests.main(["test"]) == 0
    assert [turn["QMPBLOCK_TURN"] for _, _, turn in live] == ["0/1"]
