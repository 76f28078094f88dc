"""`python -m qmpblock` is the `qmpblock` command."""

from qmpblock.cli import main

main()
