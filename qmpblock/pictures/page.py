"""What all SVG pictures share: colours, the look of text, and what makes text safe to put there.

Pure: strings out.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

from qmpblock.errors import printable

__all__ = ["COLOURS", "GREY", "STYLE", "xml"]

#: Okabe and Ito's: told apart by colour-blind readers, on white and on black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
GREY = "#808080"
STYLE = "text{font:12px sans-serif;fill:#767676}.h{font-size:15px}.v{text-anchor:middle}"


def xml(text: str) -> str:
    """Escape for XML, in text and in attributes; what XML cannot hold is made visible."""
    return escape(printable(text, 1000), {'"': "&quot;"})
