"""Fuzz the readers, guided by coverage: `make fuzz`.

Each target runs in a process of its own. What the fuzzer finds worth keeping goes into a
working corpus in the cache, and the next run goes on from there. An input that fails is left in
tests/fuzz/failures, from where `python tests/fuzz TARGET --input FILE` shows it once more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_FAILURES = _HERE / "failures"
_LONGEST = 2048  # bytes of an input
_LOOK = 4096  # inputs between looks at our memory
_GROWTH = 256 << 20  # bytes: the fuzzer keeps a corpus, the readers must keep nothing
# An input of these costs several of the others.
_SHARES = {"graph": 0.4, "journal": 0.6, "nbd_handshake": 0.6}


_OF_NUMPY = frozenset({"lockstep", "maprecords", "nbd_transmission", "nbd_wire"})


def _resident() -> int:
    """Return the memory that this process holds, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _child(name: str, count: int, seed: int, corpus: Path) -> None:
    """Fuzz one target in this process, which ends with that."""
    import atheris  # type: ignore[import-not-found]

    # As instrument_imports, but for what NumPy compares: traced, each result of that leaks.
    tracing = atheris.import_hook.HookManager(
        {"qmpblock"}, set(), False, trace_dataflow=name not in _OF_NUMPY
    )
    with tracing:
        from fuzz.targets import SEEDS, TARGETS
    for number, data in enumerate(SEEDS.get(name, ())):
        (corpus / f"seed-{number}").write_bytes(data)
    target = TARGETS[name]
    seen, settled = 0, 0

    def watched(data: bytes) -> None:
        nonlocal seen, settled
        target(data)
        seen += 1
        if seen % _LOOK == 0:
            now = _resident()
            settled = settled or now
            assert now - settled < _GROWTH, f"{now - settled} bytes kept by {seen} inputs"

    atheris.Setup(
        [
            sys.argv[0],
            f"-runs={count}",
            f"-seed={seed}",
            f"-max_len={_LONGEST}",
            f"-artifact_prefix={_FAILURES}/{name}-",
            "-timeout=60",  # seconds for one input, on a machine that has other things to do
            "-print_final_stats=1",
            "-verbosity=0",
            str(corpus),
        ],
        watched,
    )
    atheris.Fuzz()


def _fuzz(name: str, count: int, seed: int, cache: Path) -> bool:
    """Fuzz one target in a process of its own; print a line, and return whether it held."""
    corpus = cache / name
    corpus.mkdir(parents=True, exist_ok=True)
    _FAILURES.mkdir(exist_ok=True)
    words = [sys.executable, str(_HERE), name, "--child"]
    words += ["--count", str(count), "--seed", str(seed), "--corpus", str(cache)]
    began = time.monotonic()
    done = subprocess.run(words, cwd=_ROOT, capture_output=True, text=True, check=False)
    spent = time.monotonic() - began
    peak = next((x.split()[-1] for x in done.stderr.splitlines() if "peak_rss" in x), "?")
    verdict = "held" if done.returncode == 0 else f"FAILED (exit {done.returncode})"
    print(
        f"{name:<17} {count:>9} inputs, seed {seed}: {verdict}; {spent:6.0f} s, "
        f"{count / spent:6.0f}/s, at most {peak} MB",
        flush=True,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if not line.startswith("INFO: Instr")]
        print("\n".join([*done.stdout.splitlines()[-30:], *said[-30:]]), flush=True)
    return done.returncode == 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make fuzz ARGS=", description=__doc__)
    cache = Path(os.environ.get("QMPBLOCK_CACHE", "~/.cache/qmpblock")).expanduser()
    parser.add_argument("targets", nargs="*", help="which; all if none is named")
    parser.add_argument("--count", type=int, default=10000, help="inputs in all (default 10000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, default=cache / "fuzz", help="default %(default)s")
    parser.add_argument("--input", type=Path, help="show what this one input does")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Fuzz what the command line says; the exit code says whether all held."""
    given = _arguments()
    if given.child:
        _child(given.targets[0], given.count, given.seed, given.corpus / given.targets[0])
    from fuzz.targets import TARGETS

    if unknown := set(given.targets) - set(TARGETS):
        print(f"no such target: {', '.join(unknown)}; there are {', '.join(TARGETS)}")
        return 2
    if given.input is not None:
        TARGETS[given.targets[0]](given.input.read_bytes())
        return 0
    names = given.targets or list(TARGETS)
    whole = sum(_SHARES.get(name, 1) for name in names)
    counts = {name: max(1, int(given.count * _SHARES.get(name, 1) / whole)) for name in names}
    held = [_fuzz(name, counts[name], given.seed, given.corpus) for name in names]
    print(f"{sum(counts.values())} inputs, {held.count(False)} targets failed")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.path[:0] = [str(_ROOT), *(str(_ROOT / one) for one in ("tests", "tests/nbd"))]
    sys.exit(main())
