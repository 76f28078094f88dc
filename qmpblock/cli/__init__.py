"""The `qmpblock` command. Nothing outside this package prints or exits."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; never returns."""
    from qmpblock.cli.app import run

    sys.exit(run(sys.argv[1:]))
