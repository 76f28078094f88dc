"""What docs/python.md says can be imported, and from where."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"


def public() -> dict[str, list[str]]:
    """Return the names of its table, by the module that they are imported from."""
    table = PAGE.read_text(encoding="utf-8").partition("\n| from | |\n")[2].partition("\n\n")[0]
    rows = (row.split("|")[1:3] for row in table.splitlines()[1:])
    return {
        module: re.findall(r"`(\w+)`", names)
        for modules, names in rows
        for module in re.findall(r"`([\w.]+)`", modules)
    }
