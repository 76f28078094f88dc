"""The documentation does what it says: commands, outputs, Python, links.

How a fenced block is tested depends on the word after its fence:

- `console`: those of README and of docs/map.md, jobs.md, allocate.md, policy.md,
  copy.md, backup.md, export.md, metrics.md and verify.md
  are run, one after the other, on a real QEMU, and print
  what stands there (`...` is anything; the numbers of QEMU's own node names do not count);
- `python run=script`: run as a program of its own, at that place;
- `python run=vm`: run with `vm` and `disk` at hand, top-level await allowed, after the console
  blocks;
- `python run=pure`: run anywhere;
- any `python`: compiles.

Every `qmpblock` command line, wherever it stands, is parsed by the command's own parser.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import inspect
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from publicnames import public

import qmpblock
from qmpblock.cli import app
from qmpblock.errors import Error

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
README, MAP, PYTHON = ROOT / "README.md", ROOT / "docs/map.md", ROOT / "docs/python.md"
JOBS, ALLOCATE = ROOT / "docs/jobs.md", ROOT / "docs/allocate.md"
POLICY, VERIFY = ROOT / "docs/policy.md", ROOT / "docs/verify.md"
COPY, EXPORT = ROOT / "docs/copy.md", ROOT / "docs/export.md"
BACKUP, METRICS = ROOT / "docs/backup.md", ROOT / "docs/metrics.md"
ARCHITECTURE = ROOT / "docs/architecture.md"
EXIT_CODES = {0, 1, 2, 3, 4, 130}

FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `words` follow its fence."""

    page: Path
    line: int
    words: tuple[str, ...]
    body: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, m.start()) + 1, tuple(m["info"].split()), m["body"])
        for m in FENCE.finditer(text)
    ]


EVERY = [block for page in PAGES for block in blocks(page)]
PYTHON_BLOCKS = [block for block in EVERY if block.words[:1] == ("python",)]


def joined(text: str) -> str:
    return text.replace("\\\n", " ")


def console(body: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a console block, and what it is to print.

    A command goes on after a backslash, and while a quote is open.
    """
    lines = body.splitlines(keepends=True)
    while lines:
        command = lines.pop(0)
        assert command.startswith("$ "), command
        command = command[2:]
        while command.endswith("\\\n") or not closed(command):
            command += lines.pop(0)
        output = ""
        while lines and not lines[0].startswith("$ "):
            output += lines.pop(0)
        yield command, output


def closed(command: str) -> bool:
    try:
        shlex.split(command)
    except ValueError:
        return False
    return True


def command_lines(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield every `qmpblock ...` of a page, with its arguments."""
    text = page.read_text(encoding="utf-8")
    found: list[tuple[str, str]] = []
    for block in blocks(page):
        if block.words[:1] == ("console",):
            found += [(str(block), command) for command, _ in console(block.body)]
        elif block.words[:1] == ("sh",):
            found += [(str(block), line) for line in joined(block.body).splitlines()]
        elif not block.words:  # a list of commands, each with its explanation after some spaces
            listed = re.findall(r"^(qmpblock .*?)(?:   .*)?$", block.body, re.MULTILINE)
            found += [(str(block), line) for line in listed]
    prose = FENCE.sub("", text)
    found += [(page.name, line) for line in re.findall(r"^ {4}(qmpblock .*)$", prose, re.MULTILINE)]
    found += [(page.name, code) for code in re.findall(r"`(qmpblock [^`]+)`", prose)]
    for where, line in found:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("();<>|&"):
                words.append(word)
                continue
            if words and re.fullmatch(r"(.*/)?qmpblock", words[0]):
                yield where, words[1:]
            words = []


COMMANDS = [
    pytest.param(words, id=f"{where} {' '.join(words)}")
    for page in PAGES
    for where, words in command_lines(page)
]


def parse(words: list[str]) -> click.Context | None:
    """Parse a command line as `qmpblock` does, and run nothing; None for --help and --version."""
    group = app._group
    try:
        with contextlib.redirect_stdout(None):
            context = group.make_context("qmpblock", list(words))
            name, command, rest = group.resolve_command(
                context, [*context._protected_args, *context.args]
            )
            assert command is not None
            return command.make_context(name, rest, parent=context)
    except click.exceptions.Exit:
        return None


def test_there_are_command_lines_to_check():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_line_parses(words):
    if len(words) == 1 and not words[0].startswith("-"):  # prose that names a command
        assert words[0] in app._COMMANDS
    else:  # `qmpblock map ... --json`: any disk
        parse(["ADDRESS" if word == "..." else word for word in words])


@pytest.mark.parametrize(
    "words", [["teleport", "vm.qmp", "vd0"], ["map", "--depth", "x"], ["disks"], ["map"]]
)
def test_what_is_no_command_line_does_not_parse(words):
    """The parser that the test above relies on does refuse."""
    with pytest.raises(click.UsageError):
        parse(words)


def test_every_option_of_map_is_described():
    command = app._group.get_command(click.Context(app._group), "map")
    assert command is not None
    options = {name for p in command.params for name in p.opts if name.startswith("--")}
    table = MAP.read_text(encoding="utf-8").partition("| option |")[2].partition("\n\n")[0]
    assert set(re.findall(r"--[a-z][a-z-]*", table)) == options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE)
    assert set(named) <= set(targets)


def test_the_exit_codes_are_those_of_the_errors():
    rows = re.findall(r"^\| (\d+) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(row) for row in rows} == EXIT_CODES
    from qmpblock import errors

    used = {error.exit_code for error in vars(errors).values() if hasattr(error, "exit_code")}
    assert used | {0, 4, app.INTERRUPTED} == EXIT_CODES


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=str)
def test_python_compiles(block):
    compile(block.body, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("block", [b for b in PYTHON_BLOCKS if "run=pure" in b.words], ids=str)
def test_pure_python_runs(block):
    exec(compile(block.body, str(block), "exec"), {})


def test_every_way_to_run_python_is_known():
    known = {"run=script", "run=vm", "run=pure"}
    used = {word for b in PYTHON_BLOCKS for word in b.words[1:] if word.startswith("run=")}
    assert used == known


@pytest.mark.parametrize("module", public())
def test_what_is_public_is_there(module):
    found, names = importlib.import_module(module), public()[module]
    assert set(names) <= set(found.__all__)
    assert all(hasattr(found, name) for name in names)


def test_all_of_the_package_itself_and_every_error_is_public():
    assert set(public()["qmpblock"]) == set(qmpblock.__all__)
    errors = importlib.import_module("qmpblock.errors")
    classes = [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]
    assert set(public()["qmpblock.errors"]) == set(classes)


def test_what_the_pages_import_is_public():
    """Of the package, in every block of Python; docs/testing.md has names of its own."""
    imported = [
        (node.module, alias.name)
        for block in PYTHON_BLOCKS
        for node in ast.walk(ast.parse(block.body))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("qmpblock")
        for alias in node.names
    ]
    assert len(imported) > 8
    ours = [one for one in imported if not one[0].startswith("qmpblock.testing")]
    assert [one for one in ours if one[1] not in public().get(one[0], ())] == []
    assert [one for one in imported if not hasattr(importlib.import_module(one[0]), one[1])] == []


def owners() -> dict[str, object]:
    """What the names before the dot stand for in docs/python.md."""
    from qmpblock import AllocationMap, ClosedImage, Disk, Monitor, export, nbd, ranges

    return {
        "AllocationMap": AllocationMap,
        "Client": nbd.Client,
        "Ranges": ranges.Ranges,
        "disk": Disk,
        "image": ClosedImage,
        "m": AllocationMap,
        "monitor": Monitor,
        "qmpblock": qmpblock,
        "qmpblock.export": export,
        "qmpblock.nbd": nbd,
        "vm": qmpblock.VM,
    }


def described() -> list[tuple[str, str, str | None]]:
    """Every `owner.name` and `owner.name(parameters)` in the prose of docs/python.md."""
    prose = FENCE.sub("", PYTHON.read_text(encoding="utf-8"))
    known = "|".join(re.escape(name) for name in sorted(owners(), key=len, reverse=True))
    pattern = rf"`(?:await )?({known})\.(\w+)(?:\(([^`]*)\))?`"
    return re.findall(pattern, prose)


# Set by __init__, so that the class does not have them.
ATTRIBUTES = {("disk", "device"), ("image", "chain"), ("vm", "monitor")}


@pytest.mark.parametrize(("owner", "name", "parameters"), described())
def test_what_python_md_describes_exists(owner, name, parameters):
    if (owner, name) in ATTRIBUTES or (owner, name) == ("qmpblock", "testing"):
        return
    if owner == "qmpblock" and (Path(qmpblock.__file__).parent / name).is_dir():
        importlib.import_module(f"{owner}.{name}")  # a subpackage: an attribute once imported
    found = getattr(owners()[owner], name)
    if not parameters or "..." in parameters:
        return
    tree = ast.parse(f"def f({parameters}): ...").body[0]
    assert isinstance(tree, ast.FunctionDef)
    actual = inspect.signature(found).parameters
    for kind, arguments in (
        (inspect.Parameter.KEYWORD_ONLY, tree.args.kwonlyargs),
        (inspect.Parameter.POSITIONAL_OR_KEYWORD, tree.args.args),
    ):
        for argument in arguments:
            assert actual[argument.arg].kind is kind
    if tree.args.vararg is not None:
        assert actual[tree.args.vararg.arg].kind is inspect.Parameter.VAR_POSITIONAL


def test_enough_is_described():
    assert len(described()) > 30


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub makes anchors of them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    for link in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def committed() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what is committed cannot be told")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in os.fsdecode(listed.stdout).split("\0") if name]


# Put together here, so that this file does not name them itself.
REGISTRIES = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pypi", "python", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("crates", "io"),
    )
]
MACHINE = re.compile(r"(?<![\w./-])/{}(?:/|\b)".format("work"))


def test_no_committed_file_names_this_machine_or_a_registry():
    for path in committed():
        if not path.is_file():
            continue  # being moved
        content = path.read_bytes()
        if b"\0" in content:
            continue
        text = content.decode("utf-8")
        assert not MACHINE.search(text), path
        assert not [host for host in REGISTRIES if host in text.lower()], path


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


# -- the walk through README and docs/map.md, on a real QEMU


def same(wanted: str, got: str) -> bool:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    wanted, got = (re.sub(r"#block\d+", "#block", text) for text in (wanted, got))
    return doctest.OutputChecker().check_output(wanted, got, options)


def test_outputs_are_compared():
    assert same("node #block12  4M\n", "node #block7   4M\n")
    assert not same("node #block12  4M\n", "node #block7   5M\n")
    assert not same("", "qmpblock: no\n")


class Walk:
    """A newcomer at a shell, in a directory of their own."""

    def __init__(self, directory: Path, qemu: str) -> None:
        from qmpblock.testing import Tools

        self.directory = directory / "walk"
        self.directory.mkdir()
        programs = directory / "bin"
        programs.mkdir()
        tools = Tools.of(qemu)
        # As links: qemu-img is started with few files to open, and what a script would start
        # is none of them.
        for name, program in {"qemu-img": tools.img, "qemu-io": tools.io}.items():
            (programs / name).symlink_to(program)
        for name, command in {
            "qemu-system-x86_64": [qemu],
            "qmpblock": [sys.executable, "-m", "qmpblock"],
            "python3": [sys.executable],
        }.items():
            (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
            (programs / name).chmod(0o755)
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")},
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUTF8": "1",
            "COLUMNS": "80",
        }

    def follow(self, block: Block) -> None:
        if block.words[0] == "console":
            for command, output in console(block.body):
                got = self.run("sh", "-c", command)
                assert same(output, got), f"{block}: {command}\nprinted:\n{got}"
        else:
            self.run(sys.executable, "-c", block.body)

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def pid(self) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return int((self.directory / "vm.pid").read_text())
        return None

    def wait_for_the_end(self) -> bool:
        """Whether the VM ends within ten seconds."""
        for _ in range(200):
            pid = self.pid()
            if pid is None or not Path(f"/proc/{pid}").exists():
                return True
            time.sleep(0.05)
        return False


def test_the_tree_names_each_module_and_package_once():
    tree = README.read_text().partition("\nqmpblock/  ")[2].partition("\nfixtures/")[0]
    names = re.findall(r"(?<![\w`])(\w+\.py|\w+/)(?=\s)", tree)
    assert sorted(names) == sorted(
        path.name + "/" * path.is_dir()
        for path in (ROOT / "qmpblock").glob("[!_]*")
        if path.is_dir() or path.suffix == ".py"
    )


def test_the_picture_of_the_rooms_is_what_is_drawn_now():
    tool = runpy.run_path(str(ROOT / "tools/draw_architecture.py"))
    pyproject, readme = (ROOT / "pyproject.toml").read_text(), README.read_text()
    drawn = tool["draw"](tool["read"](pyproject, readme))
    if (ROOT / "docs/architecture.svg").read_text() != drawn:
        pytest.fail("the rooms have changed: run .venv/bin/python tools/draw_architecture.py")


def test_each_module_says_what_it_is():
    for path in (ROOT / "qmpblock").rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def code_spans(page: Path) -> list[str]:
    """What stands between backquotes in the prose and the tables of a page."""
    return re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))


def defines(path: Path, name: str) -> bool:
    """Whether a module defines `name`, or `Class.name` in that class."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            if part in [getattr(one, "id", getattr(one, "name", None)) for one in targets] or (
                isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == part
            ):
                body = getattr(node, "body", [])
                break
        else:
            return False
    return True


def test_what_a_module_defines_is_found():
    path = ROOT / "qmpblock/errors.py"
    assert defines(path, "Error")
    assert defines(path, "Error.exit_code")
    assert defines(path, "UNTOUCHED")
    assert not defines(path, "Error.exit")
    assert not defines(path, "exit_code")
    assert not defines(path, "printable.text")


CITED = [span for span in code_spans(ARCHITECTURE) if "::" in span]


@pytest.mark.parametrize("cited", sorted(set(CITED)))
def test_what_the_house_cites_exists(cited):
    path, _, name = cited.partition("::")
    assert defines(ROOT / "qmpblock" / path, name)


def test_every_path_that_the_house_names_exists():
    spans = {span for span in code_spans(ARCHITECTURE) if "::" not in span}
    paths = {span for span in spans if re.fullmatch(r"[\w/.]+(/|\.\w+)", span)}
    assert len(CITED) > 50
    assert len(paths) > 20
    paths.remove("cli/NAME_command.py")
    assert [p for p in paths if not ((ROOT / p).exists() or (ROOT / "qmpblock" / p).exists())] == []
    # What else is cited is a command, or one of these.
    words = {span for span in spans - paths if not re.match(r"qmpblock |make |kill ", span)}
    words -= {"cli/NAME_command.py", "qmpblock-", "--json", "console"}
    walks = ARCHITECTURE.read_text().partition("\n## Where does")[0]
    asked = set(re.findall(r"`([a-z-]+)`", walks))  # tests/live/test_architecture.py checks these
    assert words - asked == {"standing", "remedy"}
    assert set(vars(Error("what failed"))) >= {"standing", "remedy"}


def boundary() -> list[str]:
    """The modules by which docs/safety.md says that what others choose comes in."""
    page = (ROOT / "docs/safety.md").read_text().partition("\n### Where the boundary runs\n")[2]
    rows = page.partition("\n## ")[0].splitlines()
    return re.findall(r"`([\w/]+\.py)`", " ".join(row.split("|")[1] for row in rows if "|" in row))


def test_the_modules_of_the_boundary_exist():
    found = boundary()
    assert len(found) > 10
    assert len(set(found)) == len(found)
    assert [name for name in found if not (ROOT / "qmpblock" / name).is_file()] == []


def steps(page: Path) -> list[Block]:
    return [b for b in blocks(page) if b.words[:1] == ("console",) or "run=script" in b.words]


@pytest.mark.live
async def test_a_newcomer_can_follow(vm_dir, qemu_binary, monkeypatch):
    """All of README; the other pages before it ends the VM."""
    walk = Walk(vm_dir, qemu_binary)
    readme = steps(README)
    assert "kill $(cat vm.pid)" in readme[-1].body
    try:
        pages = (MAP, VERIFY, PYTHON, JOBS, COPY, EXPORT, METRICS, ALLOCATE, POLICY, BACKUP)
        for page in pages:
            readme[-1:-1] = steps(page)
        for block in readme[:-1]:
            walk.follow(block)
        monkeypatch.chdir(walk.directory)
        async with qmpblock.connect("vm.qmp") as vm:
            names = {"vm": vm, "disk": await vm.disk("vd0"), "qmpblock": qmpblock}
            for block in blocks(PYTHON):
                if "run=vm" in block.words:
                    await run(block, names)
            assert await vm.monitor.execute("query-block-exports") == []
        assert (walk.directory / "map.svg").read_text().startswith("<?xml")
        walk.follow(readme[-1])
        assert walk.wait_for_the_end()
    finally:
        pid = walk.pid()
        if pid is not None and not walk.wait_for_the_end():
            os.kill(pid, signal.SIGKILL)


async def run(block: Block, names: dict[str, object]) -> None:
    code = compile(block.body, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if inspect.isawaitable(result):
        await result
