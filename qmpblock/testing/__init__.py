"""The public test harness: tiny guests on real QEMU, images from YAML, faults.

docs/testing.md tells how to use it. Names are imported when they are first used: pytest
loads the plugin of this package at every start, also in projects that need little of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmpblock.testing.guest import TinyGuest
    from qmpblock.testing.images import BuiltDisk, BuiltImage, BuiltScenario, Tools, build
    from qmpblock.testing.invariant import Invariant, VMState, difference, snapshot
    from qmpblock.testing.qemu import QemuFailure, QemuProcess
    from qmpblock.testing.scenario import (
        Scenario,
        ScenarioError,
        load_scenario,
        load_scenarios,
        parse_scenario,
    )

_WHERE = {
    "BuiltDisk": "images",
    "BuiltImage": "images",
    "BuiltScenario": "images",
    "Invariant": "invariant",
    "QemuFailure": "qemu",
    "QemuProcess": "qemu",
    "Scenario": "scenario",
    "ScenarioError": "scenario",
    "TinyGuest": "guest",
    "Tools": "images",
    "VMState": "invariant",
    "build": "images",
    "difference": "invariant",
    "load_scenario": "scenario",
    "load_scenarios": "scenario",
    "parse_scenario": "scenario",
    "snapshot": "invariant",
}

__all__ = [
    "BuiltDisk",
    "BuiltImage",
    "BuiltScenario",
    "Invariant",
    "QemuFailure",
    "QemuProcess",
    "Scenario",
    "ScenarioError",
    "TinyGuest",
    "Tools",
    "VMState",
    "build",
    "difference",
    "load_scenario",
    "load_scenarios",
    "parse_scenario",
    "snapshot",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
