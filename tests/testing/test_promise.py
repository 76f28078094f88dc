"""What was published of qmpblock.testing stays: names, members, parameters, fixtures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from promised import RECORD, promises

PAGES = Path(__file__).parents[2] / "docs"
PROMISED: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))


def broken(promised: Any, now: Any, where: str) -> list[str]:
    """Return what was promised and is not so any more. More than that may be there."""
    if promised is None or isinstance(promised, str):
        right = promised is None or now == promised or now == f"{promised}, optional"
        return [] if right else [f"{where}: {promised} is now {now}"]
    gone = [f"{where}.{name} has gone" for name in promised if name not in (now or {})]
    new = [
        f"{where}: {name} is new, and must be given"
        for name, how in (now or {}).items()
        if isinstance(how, str)
        and name not in promised
        and "optional" not in how
        and "var" not in how
    ]
    return (
        gone
        + new
        + [
            line
            for name, one in promised.items()
            if name in (now or {})
            for line in broken(one, now[name], f"{where}.{name}")
        ]
    )


def test_nothing_that_was_published_has_gone() -> None:
    now = promises()
    assert broken(PROMISED["names"], now["names"], "qmpblock.testing") == []
    assert set(PROMISED["fixtures"]) <= set(now["fixtures"])


def test_what_is_new_is_recorded() -> None:
    """`python tests/promised.py` does it, once a name is meant to be published."""
    now = promises()
    assert set(now["names"]) == set(PROMISED["names"])
    assert now["fixtures"] == PROMISED["fixtures"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda names: names.pop("Bounds"), ["t.Bounds has gone"]),
        (lambda names: names["Bounds"]["made"].pop("acked"), ["t.Bounds.made.acked has gone"]),
        (
            lambda names: names["read_area"]["called"].update(extra="keyword_only"),
            ["t.read_area.called: extra is new, and must be given"],
        ),
        (lambda names: names["read_area"]["called"].update(extra="keyword_only, optional"), []),
        (
            lambda names: names["read_area"]["called"].update(offset="keyword_only"),
            ["t.read_area.called.offset: positional_or_keyword is now keyword_only"],
        ),
    ],
)
def test_a_broken_promise_is_found(change: Any, said: list[str]) -> None:
    names = json.loads(json.dumps(PROMISED["names"]))
    change(names)
    assert broken(PROMISED["names"], names, "t") == said


def test_every_public_name_is_in_a_page() -> None:
    pages = "".join((PAGES / name).read_text() for name in ("testing.md", "test-your-tool.md"))
    told = set(re.findall(r"\w+", pages))
    assert [name for name in PROMISED["names"] if name not in told] == []
    assert [name for name in PROMISED["fixtures"] if name not in told] == []
