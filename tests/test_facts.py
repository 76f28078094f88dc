"""What the code cites of QEMU's behaviour is told in docs/qemu.md, with a test that shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/qemu.md").read_text(encoding="utf-8")
CITED = re.compile(r"\b[KF][1-9]\d?\b")
ELSEWHERE = re.compile(r"qemu-facts|\(facts |facts-[a-z]+ \d")  # notes that a reader here has not
ENTRIES = {
    title.partition(":")[0]: text
    for title, text in re.findall(r"^### (.+)\n((?:(?!^##).*\n)+)", PAGE, re.MULTILINE)
}
SOURCES = sorted(
    path
    for folder, pattern in (
        ("qmpblock", "*.py"),
        ("tests", "*.py"),
        ("bench", "*.py"),
        ("docs", "*.md"),
    )
    for path in (ROOT / folder).rglob(pattern)
    if path != Path(__file__)
)


def test_every_label_is_one_and_is_used_once():
    labels = re.findall(r"^### ([^:\n]+)", PAGE, re.MULTILINE)
    assert len(labels) == len(set(labels)) == len(ENTRIES)
    for kind in "KF":
        numbers = [int(label[1:]) for label in labels if label[0] == kind]
        assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_cited_is_told(path):
    text = path.read_text(encoding="utf-8")
    assert set(CITED.findall(text)) <= set(ENTRIES)
    assert not ELSEWHERE.search(text)


@pytest.mark.parametrize("label", ENTRIES)
def test_every_fact_names_a_test_that_exists(label):
    text = ENTRIES[label]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert named or re.search(r"^No test: .+", text, re.MULTILINE)
    for module, function in named:
        assert f"def {function}(" in (ROOT / module).read_text(encoding="utf-8")
