"""Run the checks and the tests, phase by phase, and sum them up: `make test`, `make matrix`.

`test` (the default): ruff, import-linter, mypy, the unit tests, the live tests on this machine's
QEMU, and the live tests again on a newer one, which share the cases of a function, and what shows
the same on each (tests/live/conftest.py). With --qemu, the live tests on that one only.
`matrix`: the live tests on this machine's QEMU and on each newer one, all of them on each.
`check`: ruff, import-linter and mypy only.

A phase that fails does not stop the next ones. Exit code 1 if any failed, 130 when
interrupted. Words after `--` go to pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QEMU = "qemu-system-x86_64"
NEWER = ("11",)
MATRIX = ("10", "11")
# QEMUs mostly wait: on 2 cores, 3 workers keep them busy. ARGS="-n 0" turns it off, for --pdb.
# Neighbours stay in one worker, with what they share, until another one has nothing left to do.
WORKERS = ("-n", str(min(4, max(3, os.cpu_count() or 1))), "--dist", "worksteal")
# Where to look for the tests of a phase, unless the words name files: collecting all of them in
# each worker costs more than many a test.
UNIT_FILES = ("--ignore=tests/live", "--ignore=tests/soak")
LIVE_PATHS = ("tests/live", "tests/test_docs.py", "tests/testing/test_qmplog.py")
LIVE_FILES = ("-o", f"testpaths={' '.join(LIVE_PATHS)}")
LIMIT = 20 * 60  # seconds that all of `test` should take
SLOWEST = 12  # functions, told of each phase
# What its command `lint-imports` is; it cannot be run as a module.
LINT_IMPORTS = "from importlinter.cli import lint_imports_command as run; run()"
NO_TESTS = 5  # pytest's exit code for "nothing collected"


@dataclass(frozen=True)
class Result:
    """How a phase went: for tests, how many; for all, whether it passed and how long it took."""

    title: str
    good: bool
    seconds: float = 0.0
    passed: int | None = None
    failed: int = 0
    skipped: int = 0
    note: str = ""


def count(report: Path) -> tuple[int, int, int]:
    """Read how many tests passed, failed (errors among them) and were skipped, from JUnit XML."""
    passed = failed = skipped = 0
    for suite in ET.parse(report).getroot().iter("testsuite"):
        bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        left = int(suite.get("skipped", 0))
        passed += int(suite.get("tests", 0)) - bad - left
        failed += bad
        skipped += left
    return passed, failed, skipped


def slowest(report: Path) -> list[str]:
    """Name the test functions that took longest, all their cases together, from JUnit XML."""
    seconds: Counter[str] = Counter()
    cases: Counter[str] = Counter()
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{str(case.get('name')).partition('[')[0]}"
        seconds[name] += float(case.get("time", 0))  # type: ignore[assignment]  # it adds up
        cases[name] += 1
    return [
        f"{spent:8.1f} s  {name}" + (f" ({cases[name]} cases)" if cases[name] > 1 else "")
        for name, spent in seconds.most_common(SLOWEST)
    ]


def table(results: Sequence[Result]) -> str:
    """Draw the results as text, a line each."""
    width = max(len(result.title) for result in results)
    lines = [f"{'':{width}}  passed  failed  skipped  seconds"]
    for result in results:
        counts = f"{'ok' if result.good else 'FAILED':>6}  {'':6}  {'':7}"
        if result.passed is not None:
            counts = f"{result.passed:6}  {result.failed:6}  {result.skipped:7}"
        note = f"  {result.note}" if result.note else ""
        lines.append(f"{result.title:{width}}  {counts}  {result.seconds:7.1f}{note}")
    return "\n".join(lines)


def total(results: Sequence[Result]) -> Result:
    """Sum up the seconds, with a note where they are too many."""
    seconds = sum(result.seconds for result in results)
    slow = f"slow: it should take at most {LIMIT / 60:g} minutes" if seconds > LIMIT else ""
    return Result("total", all(result.good for result in results), seconds, note=slow)


def share_bytecode(folder: str) -> None:
    """Keep bytecode in `folder` where the environment forbids to keep it beside its source.

    The tests start the command thousands of times, and each would compile all of it again.
    """
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        os.environ["PYTHONPYCACHEPREFIX"] = folder


@contextlib.contextmanager
def compiling() -> Iterator[subprocess.Popen[bytes]]:
    """Have all tests compiled meanwhile, on the processor that mypy leaves alone.

    Else each worker of the first phase compiles whatever it collects, all at the same time.
    """
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    nowhere = subprocess.DEVNULL  # what is wrong will be said by the phase that it is of
    with subprocess.Popen(command, cwd=ROOT, stdout=nowhere, stderr=nowhere) as process:
        try:
            yield process
        finally:
            process.terminate()


def say(text: str) -> None:
    """Print at once, so that it stands before what the phase prints itself."""
    print(text, flush=True)


def run_check(title: str, *command: str) -> Result:
    """Run one of the checkers: what Python is to run."""
    say(f"\n== {title}")
    start = time.monotonic()
    code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    return Result(title, code == 0, time.monotonic() - start)


def run_pytest(
    title: str,
    marks: str,
    words: Sequence[str],
    *,
    settings: Mapping[str, str] | None = None,
    where: Sequence[str] = (),
) -> Result:
    """Run the tests with these marks.

    :param words: more for pytest; with some, a phase in which no test is left is no failure.
    :param settings: more for the environment, such as the QEMU under test.
    :param where: pytest's options that keep it from collecting what has other marks.
    """
    settings = settings or {}
    say(" ".join([f"\n== {title}", *(f"{name}={value}" for name, value in settings.items())]))
    environment = {**os.environ, **settings}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            *WORKERS,
            *where,
            "-m",
            marks,
            f"--junitxml={report}",
        ]
        start = time.monotonic()
        code = subprocess.run([*command, *words], cwd=ROOT, env=environment, check=False).returncode
        seconds = time.monotonic() - start
        if not report.exists():
            return Result(title, False, seconds, note=f"pytest ended with exit code {code}")
        passed, failed, skipped = count(report)
        say("\n".join(["slowest functions, all cases of each:", *slowest(report)]))
    if code == NO_TESTS:
        note = "no tests" if words else "no tests: that is a failure"
        return Result(title, bool(words), seconds, 0, note=note)
    note = "" if code == 0 or failed else f"pytest ended with exit code {code}"
    return Result(title, code == 0, seconds, passed, failed, skipped, note)


def version_of(qemu: str) -> str:
    """Return a QEMU's version, for people; raises OSError or CalledProcessError."""
    printed = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    return printed.partition("version ")[2].split()[0]


def seed_of_tree() -> int:
    """Return the seed that follows from what is committed; one by chance where that is not told.

    So two runs of one tree take the same sample, wherever they are, and the next commit another.
    """
    asked = ("git", "rev-parse", "HEAD^{tree}")
    try:
        told = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return random.SystemRandom().getrandbits(32)
    return int(told[:8], 16)


def seed() -> int:
    """Return the seed of this run."""
    return int(os.environ.get("QMPBLOCK_SEED") or seed_of_tree())


def run_unit(words: Sequence[str]) -> Result:
    """Run the unit tests, whose examples and samples follow from the seed, too."""
    chosen = str(seed())
    where = (*UNIT_FILES, f"--hypothesis-seed={chosen}")
    settings = {"QMPBLOCK_SEED": chosen}
    return run_pytest("unit tests", "not live and not soak", words, settings=settings, where=where)


def turns(qemus: int) -> Iterator[dict[str, str]]:
    """Yield, for one QEMU after the other, the settings that deal out the tests among so many."""
    chosen = str(seed())
    for turn in itertools.cycle(range(qemus)):
        yield {"QMPBLOCK_SEED": chosen, "QMPBLOCK_TURN": f"{turn}/{qemus}"}


def run_live(qemu: str, words: Sequence[str], turn: Mapping[str, str]) -> Result:
    """Run the live tests on one QEMU, a path or a name; `turn` is one of `turns`."""
    found = shutil.which(qemu)
    try:
        title = f"live tests on QEMU {version_of(found or qemu)}"
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        say(f"\n== live tests: {qemu} does not start: {error}")
        return Result(f"live tests on {qemu}", False, note="it does not start")
    settings = {"QMPBLOCK_QEMU": str(Path(found or qemu).absolute()), **turn}
    return run_pytest(title, "live and not soak", words, settings=settings, where=LIVE_FILES)


def fetch_newer(wanted: str) -> str | None:
    """Return a newer QEMU, fetched where it is not cached; None, with the reason told, if not."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "fetch_qemu.py", wanted],
        stdout=subprocess.PIPE,  # and its stderr, what it does or why it cannot, to the reader
        text=True,
        check=False,
    )
    return None if done.returncode else done.stdout.strip()


def run_newer(
    wanted: str, words: Sequence[str], dealt: Iterator[Mapping[str, str]], *, needed: bool
) -> Result:
    """Run the live tests on a newer QEMU.

    :param dealt: `turns`, of which it takes one.
    :param needed: whether not having it is a failure.
    """
    qemu = fetch_newer(wanted)
    if qemu is None:
        say(f"\n== live tests on QEMU {wanted}.x: not run; it cannot be had (the reason is above)")
        return Result(f"live tests on QEMU {wanted}.x", not needed, note="not run: cannot be had")
    return run_live(qemu, words, next(dealt))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description="Run the checks and the tests.")
    parser.add_argument("what", nargs="?", choices=("test", "matrix", "check"), default="test")
    parser.add_argument("--qemu", default="", help="run the live tests on this one only")
    options = parser.parse_args(given[:cut])
    words = given[cut + 1 :]

    results: list[Result] = []
    beside = compiling() if options.what == "test" and not words else contextlib.nullcontext()
    try:
        with beside:
            if options.what in ("test", "check"):
                results.append(run_check("ruff check", "-m", "ruff", "check"))
                results.append(run_check("ruff format", "-m", "ruff", "format", "--check"))
                results.append(run_check("imports", "-c", LINT_IMPORTS, "--no-cache"))
                results.append(run_check("mypy", "-m", "mypy"))
                results.append(run_check("mypy tools", "-m", "mypy", "tools"))
            newer: list[str] = []
            if options.what == "test":
                if not options.qemu:  # first, for unit tests use the newer qemu-nbd as a peer
                    newer = [wanted for wanted in NEWER if fetch_newer(wanted)]
                results.append(run_unit(words))
        # What words choose runs on each of them.
        dealt = turns(1 if words else 1 + len(newer))
        if options.what in ("test", "matrix"):
            results.append(run_live(options.qemu or QEMU, words, next(dealt)))
        if options.what == "test" and not options.qemu:
            results += [run_newer(wanted, words, dealt, needed=False) for wanted in NEWER]
        if options.what == "matrix":
            results += [run_newer(wanted, words, dealt, needed=True) for wanted in MATRIX]
    except KeyboardInterrupt:  # the phase under way got it too, and has ended
        say("\ninterrupted")
        return 130
    say(f"\n{table([*results, total(results)])}")
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as bytecode:
        share_bytecode(bytecode)
        sys.exit(main())
