"""Descriptions of one machine, as real QEMUs gave them (tests/data/migration)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from qmpblock.graph.model import Bitmap
from qmpblock.migration.describe import read_blocks
from qmpblock.migration.devicetree import read_tree
from qmpblock.migration.machine import GuestDisk, Machine

DATA = Path(__file__).resolve().parent / "data/migration"
QEMUS = ("7.2.22", "11.1.2")


def recorded(qemu: str, **more) -> Machine:
    said = json.loads((DATA / f"qemu-{qemu}.json").read_text())
    disks = tuple(
        GuestDisk(
            **{
                **disk,
                "bitmaps": tuple(Bitmap(**one) for one in disk["bitmaps"]),
                "jobs": (),
                "holes": True,
                "stored": frozenset(),
            }
        )
        for disk in said["disks"]
    )
    lists = {name: frozenset(said[name]) for name in ("types", "cpus")}
    return Machine(
        **{
            **said,
            **lists,
            "version": tuple(said["version"]),
            "blocked": (),
            "disks": disks,
            "devices": read_tree(said["devices"]),
            "blocks": read_blocks(said["blocks"]),
            **more,
        }
    )


def waiting(qemu: str, **more) -> Machine:
    """What waits at the destination: no bitmaps, and not running."""
    machine = recorded(qemu)
    disks = tuple(replace(disk, bitmaps=()) for disk in machine.disks)
    return replace(machine, **{"status": "inmigrate", "disks": disks, **more})
