"""The table of docs/migration.md is that of the code."""

from __future__ import annotations

from pathlib import Path

from qmpblock.migration.mismatch import KINDS

PAGE = Path(__file__).resolve().parents[2] / "docs/migration.md"


def table() -> str:
    rows = [
        f"| `{name}` | {kind.what} | {kind.noticed} | {kind.otherwise} | "
        f"{'refused' if kind.refused else 'warning'} | {kind.remedy} |"
        for name, kind in KINDS.items()
    ]
    head = (
        "| finding | what differs, or is so | when QEMU would notice | what would happen | here | "
        "what to do |\n|---|---|---|---|---|---|"
    )
    return "\n".join([head, *rows]) + "\n"


def test_the_page_has_every_kind_as_the_code_has_it():
    """Prints what belongs into the page where it does not stand there."""
    assert table() in PAGE.read_text(encoding="utf-8"), table()


def test_no_word_would_break_the_table():
    for kind in KINDS.values():
        text = (kind.what, kind.noticed, kind.otherwise, kind.remedy)
        assert not any("|" in one or one.endswith(".") for one in text), text
