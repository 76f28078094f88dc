"""Commands of ours that messages name: each can be run, once its words are filled in."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import qmpblock
from qmpblock.cli.app import _COMMANDS, _group

ROOT = Path(qmpblock.__file__).parent
#: Up to where the sentence goes on, or another command begins.
NAMED = re.compile(rf"qmpblock ((?:{'|'.join(_COMMANDS)})\b[^;`]*)")
END = re.compile(r"(?:[,;)]|\. | && | \|\| |: |, then).*", re.DOTALL)
#: Which are named as what they are, not as what is to be run.
TOLD = {
    ("policy/copies.py", "copy"),
    ("policy/copyentry.py", "copy"),
}


def texts(tree):
    """Yield the texts of a module but docstrings, whole, with a word where a value comes in."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        if isinstance(node, ast.JoinedStr):
            skipped |= {*node.values}
        if isinstance(node, ast.BinOp):
            skipped |= {node.left, node.right}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, (ast.BinOp, ast.JoinedStr, ast.Constant)):
            yield text_of(node)


def text_of(node):
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "WORD"


def named():
    """Yield (module, command) of all that are named."""
    for path in sorted(ROOT.rglob("*.py")):
        where = str(path.relative_to(ROOT))
        for text in texts(ast.parse(path.read_text())):
            for match in NAMED.finditer(text):
                command = END.sub("", match[1]).strip()
                if (where, command) not in TOLD:
                    yield where, command


@pytest.mark.parametrize(("where", "command"), sorted({*named()}))
def test_it_is_one_that_the_parser_takes(where, command):
    verb, *words = shlex.split(command)
    loaded = _group.get_command(None, verb)
    loaded.make_context(verb, words)
