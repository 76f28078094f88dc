"""qmpblock verify: words, JSON, exit codes, and nothing left of one that was interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from qmpblock.cli.app import run

MIB = 1 << 20
SCHEMA = Path(__file__).parents[2] / "docs/schema/verify.schema.json"


@pytest.fixture
def images(tmp_path):
    one, other = tmp_path / "one.raw", tmp_path / "other.raw"
    for path in (one, other):
        path.write_bytes(b"x" * 2 * MIB)
    return one, other


def change(path, *places):
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            file.write(b"y")


def verify(capsys, *arguments):
    code = run(["verify", *map(str, arguments)])
    return code, capsys.readouterr()


def document(capsys, *arguments):
    code, captured = verify(capsys, *arguments, "--json")
    found = json.loads(captured.out)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(found)
    return code, found


def test_equal_ones(images, capsys):
    code, captured = verify(capsys, *images)
    assert (code, captured.out) == (0, f"equal: {images[0]} and {images[1]}, 2,097,152 bytes\n")
    assert f"verify {images[0]}: comparing, 0 of 2M" in captured.err
    code, found = document(capsys, *images)
    assert code == 0
    assert found.pop("seconds") >= 0
    assert found == {
        "equal": True,
        "sizes": [2 * MIB, 2 * MIB],
        "first_difference": None,
        "differing": 0,
        "unequal": [],
        "compared": 2 * MIB,
    }


def test_different_ones(images, capsys):
    change(images[1], 1000, MIB + 1, MIB + 2)
    code, captured = verify(capsys, *images)
    assert (code, captured.out) == (
        1,
        f"different: {images[0]} and {images[1]}: from offset 1,000 on\n",
    )
    code, captured = verify(capsys, *images, "--all")
    assert (code, captured.out) == (
        1,
        f"different: {images[0]} and {images[1]}: from offset 1,000 on; 3 bytes differ in all\n",
    )
    code, found = document(capsys, *images)
    assert (code, found["differing"], found["unequal"]) == (1, None, None)
    code, found = document(capsys, *images, "--all")
    assert (code, found["first_difference"], found["differing"]) == (1, 1000, 3)
    assert found["unequal"] == [[0, 65536], [MIB, MIB + 65536]]


def test_sizes_that_differ(images, capsys):
    os.truncate(images[1], 3 * MIB)
    code, captured = verify(capsys, *images)
    assert code == 1
    assert "one is of 2,097,152 bytes, the other of 3,145,728; they were not read" in captured.out
    code, found = document(capsys, *images)
    assert (code, found["equal"], found["first_difference"], found["compared"]) == (
        1,
        False,
        None,
        0,
    )
    assert verify(capsys, *images, "--longer", "zeros")[0] == 0
    change(images[1], 3 * MIB - 1)
    assert verify(capsys, *images, "--longer", "zeros")[0] == 1
    assert verify(capsys, *images, "--longer", "any")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["one.raw"], "IMAGE"),
        (["one.raw", "other.raw", "more"], "more"),
        (["one.raw", "other.raw", "--longer", "some"], "some"),
        (["one.raw", "none.raw"], "there is no image none.raw"),
        (["one.raw", "nameless"], "does not tell the image's format"),
        (["nbd://host/x", "one.raw"], "does not tell"),
    ],
)
def test_a_wrong_request_is_2(images, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(images[0].parent)
    Path("nameless").write_bytes(b"x")
    code, captured = verify(capsys, *arguments)
    assert (code, captured.out) == (2, "")
    assert words in captured.err


def test_one_that_a_program_writes_to_is_refused(images, capsys):
    with images[1].open("r+b"):
        for pair in (images, images[::-1]):
            code, captured = verify(capsys, *pair)
            assert (code, captured.out) == (2, "")
            assert f"{images[1]} is in use: this very process" in captured.err


@pytest.mark.parametrize("options", [(), ("--all",)])
def test_interrupted_it_leaves_no_process(tmp_path, options):
    for name in ("one.raw", "other.raw"):
        with (tmp_path / name).open("wb") as file:
            for _ in range(512):
                file.write(b"x" * MIB)
    command = [sys.executable, "-m", "qmpblock", "verify", "one.raw", "other.raw", *options]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stderr.readline()
        assert "comparing" in line, line
        started = of_group(process.pid)
        assert started  # it is at work
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, out) == (130, ""), err
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


def of_group(pid):
    """Return what a process has started, and waits until there is something."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = [
            int(one)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for one in (task / "children").read_text().split()
        ]
        if found:
            return found
        time.sleep(0.01)
    return []
