"""The `qmpblock` command. Nothing outside this package prints or exits."""

from __future__ import annotations

import gc
import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; never returns."""
    # What a short-lived command would pay for and never use: BLAS threads, and looking for
    # cycles among millions of numbers.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(100_000)

    try:
        from qmpblock.cli.app import delivered, run
        from qmpblock.cli.standardio import take_over
    except KeyboardInterrupt:  # the half second before anybody handles it
        sys.stderr.write("qmpblock: interrupted; nothing was touched\n")
        sys.exit(130)

    output, arguments = take_over(), sys.argv[1:]
    code = run(arguments)
    sys.exit(delivered(code, arguments, output.lost))
