"""Run the soak tests whole, in slices, and remember how far they came: `make soak`.

Each slice is one pytest of tests/soak and of its share of tests/live, with QMPBLOCK_SOAK=full,
QMPBLOCK_ROUNDS (how many rounds each soak test does), QMPBLOCK_SEED (of their random choices; slice
by slice another, and from the same start always the same) and QMPBLOCK_SLICE (which of how many:
matrices of points are dealt out among the slices). A slice that passed is recorded, so that a run
that was interrupted goes on where it was. The record counts only for the same QEMU and the same
code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def default_record() -> Path:
    """Return where the progress is kept: beside qmpblock's other state of this user."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "qmpblock" / "soak.json"


def subject(qemu: str) -> str:
    """Name what is under test: the QEMU, its version, and a digest of all else and of the tests."""
    printed = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256()
    for folder in ("qmpblock", "tests", "fixtures", "ansible"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return f"{printed.splitlines()[0]}, code {digest.hexdigest()[:12]}"


def load(record: Path, about: str) -> dict[str, int]:
    """Read the progress on this subject: `rounds` done, with the run's first `seed`."""
    try:
        kept = json.loads(record.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        kept = {}
    if kept.get("about") == about:
        return {"rounds": int(kept["rounds"]), "seed": int(kept["seed"])}
    return {"rounds": 0, "seed": secrets.randbits(32)}


def save(record: Path, about: str, progress: dict[str, int]) -> None:
    """Write the progress, whole or not at all."""
    record.parent.mkdir(parents=True, exist_ok=True)
    new = record.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps({"about": about, **progress}) + "\n")
    new.replace(record)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run the soak tests whole.")
    parser.add_argument("--rounds", type=int, default=500, help="in all (default: %(default)s)")
    parser.add_argument("--slice", type=int, default=50, help="rounds a slice (%(default)s)")
    parser.add_argument("--seed", type=int, help="start anew with this one")
    parser.add_argument("--qemu", default="", help="the QEMU under test")
    parser.add_argument("--record", type=Path, default=default_record(), help="%(default)s")
    options = parser.parse_args(arguments)

    qemu = options.qemu or os.environ.get("QMPBLOCK_QEMU") or "qemu-system-x86_64"
    about = subject(qemu)
    progress = load(options.record, about)
    if options.seed is not None:
        progress = {"rounds": 0, "seed": options.seed}
    start = time.monotonic()
    print(f"soak: {about}; seed {progress['seed']}", flush=True)
    if progress["rounds"]:
        print(f"soak: going on after {progress['rounds']} rounds ({options.record})", flush=True)
    while progress["rounds"] < options.rounds:
        rounds = min(options.slice, options.rounds - progress["rounds"])
        seed = progress["seed"] + progress["rounds"]
        environment = {
            "QMPBLOCK_SOAK": "full",
            "QMPBLOCK_QEMU": qemu,
            "QMPBLOCK_ROUNDS": str(rounds),
            "QMPBLOCK_SEED": str(seed),
            "QMPBLOCK_SLICE": f"{progress['rounds'] // options.slice}"
            f"/{-(-options.rounds // options.slice)}",
        }
        command = [sys.executable, "-m", "pytest", "-m", "soak or live", "-q", "-rP"]
        command += ["tests/soak", "tests/live"]
        try:
            code = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **environment}, check=False
            ).returncode
        except KeyboardInterrupt:
            print(f"\nsoak: interrupted after {progress['rounds']} rounds; run it again to go on")
            return 130
        if code:
            settings = " ".join(f"{name}={value}" for name, value in environment.items())
            print(f"soak: FAILED between rounds {progress['rounds']} and ", end="")
            print(
                f"{progress['rounds'] + rounds}. To see it again:\n  {settings} {' '.join(command)}"
            )
            return 1
        progress["rounds"] += rounds
        save(options.record, about, progress)
        print(f"soak: {progress['rounds']} of {options.rounds} rounds", flush=True)
    spent = time.monotonic() - start
    print(f"soak: {progress['rounds']} rounds passed, seed {progress['seed']}, {spent:.0f} s now")
    return 0


if __name__ == "__main__":
    sys.exit(main())
