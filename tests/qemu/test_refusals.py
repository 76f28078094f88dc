"""QEMU's words are looked into in one module. What they are: live/test_refusals.py."""

import ast
from pathlib import Path

import pytest
from refused import PREDICATES, fitting

import qmpblock
from qmpblock.errors import CommandError
from qmpblock.qemu.refusals import not_found, tolerate

PACKAGE = Path(qmpblock.__file__).parent


def said(words, kind="GenericError"):
    return CommandError("x", {}, kind, words)


async def answer(error=None):
    if error is not None:
        raise error


async def test_what_is_tolerated():
    assert await tolerate(not_found, answer()) is True
    assert await tolerate(not_found, answer(said("object 'x' not found"))) is False


async def test_what_is_not():
    other = said("object 'x' is in use")
    with pytest.raises(CommandError) as caught:
        await tolerate(not_found, answer(other))
    assert caught.value is other
    with pytest.raises(OSError, match="not found"):
        await tolerate(not_found, answer(OSError("not found")))


@pytest.mark.parametrize(
    ("words", "names"),
    [
        # What no test provokes: it takes rights, or file systems, that tests have not.
        ("Could not open '/i/d1': Permission denied", {"read_only", "could_not_open"}),
        ("Could not open '/i/d1': Operation not permitted", {"read_only", "could_not_open"}),
        (
            "Could not reopen file: Read-only file system",
            {"read_only", "read_only_file_system", "could_not_open"},
        ),
        # Of an object that is none of ours, so that it must not be taken for none at all.
        ("Property 'iothread.data' not found", {"not_found"}),
        ("Something else", set()),
    ],
)
def test_words_that_are_not_provoked(words, names):
    assert fitting(said(words)) == names


def compares(path):
    """Yield the lines where a module compares what QEMU or a tool said with anything."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare) and not isinstance(node.ops[0], ast.Is | ast.IsNot):
            for part in ast.walk(node):
                if isinstance(part, ast.Attribute) and part.attr in (
                    "description",
                    "error_class",
                    "stderr",
                ):
                    yield node.lineno


def test_nobody_else_looks_into_qemus_words():
    here = PACKAGE / "qemu" / "refusals.py"
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if path != here
        for line in compares(path)
    ]
    assert found == []
    assert len(list(compares(here))) >= len(PREDICATES)
