"""The public test harness: tiny guests on real QEMU, images from YAML, faults.

docs/testing.md tells how to use it. Names are imported when they are first used: pytest
loads the plugin of this package at every start, also in projects that need little of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmpblock.testing.area import read_area
    from qmpblock.testing.daemon import StorageDaemon
    from qmpblock.testing.destination import StartDestination, counterpart
    from qmpblock.testing.faults import Controller, fill_up, inject, slow, small_file_system, unplug
    from qmpblock.testing.guest import TinyGuest
    from qmpblock.testing.guest_console import GuestError
    from qmpblock.testing.guest_protocol import GuestDisk, GuestHello, Latency, StressProgress
    from qmpblock.testing.images import BuiltDisk, BuiltImage, BuiltScenario, Tools, build
    from qmpblock.testing.invariant import Invariant, VMState, difference, snapshot
    from qmpblock.testing.linux import LinuxGuest, LinuxImage, ShellError
    from qmpblock.testing.linux_image import LinuxUnavailableError
    from qmpblock.testing.loops import WrongLoopError
    from qmpblock.testing.plugin import StartQemu
    from qmpblock.testing.qemu import QemuFailure, QemuProcess
    from qmpblock.testing.scenario import (
        Scenario,
        ScenarioError,
        load_scenario,
        load_scenarios,
        parse_scenario,
    )
    from qmpblock.testing.stamps import (
        Acknowledged,
        BlockFault,
        Bounds,
        OneInstant,
        PointInTime,
        StressSpec,
        Taken,
        check_acknowledged,
        check_one_instant,
        check_point_in_time,
        checksum,
        expected_content,
        stamped,
    )

_WHERE = {
    "Acknowledged": "stamps",
    "BlockFault": "stamps",
    "Bounds": "stamps",
    "BuiltDisk": "images",
    "BuiltImage": "images",
    "BuiltScenario": "images",
    "Controller": "faults",
    "GuestDisk": "guest_protocol",
    "GuestError": "guest_console",
    "GuestHello": "guest_protocol",
    "Invariant": "invariant",
    "Latency": "guest_protocol",
    "LinuxGuest": "linux",
    "LinuxImage": "linux",
    "LinuxUnavailableError": "linux_image",
    "OneInstant": "stamps",
    "PointInTime": "stamps",
    "QemuFailure": "qemu",
    "QemuProcess": "qemu",
    "Scenario": "scenario",
    "ScenarioError": "scenario",
    "ShellError": "linux",
    "StartDestination": "destination",
    "StartQemu": "plugin",
    "StorageDaemon": "daemon",
    "StressProgress": "guest_protocol",
    "StressSpec": "stamps",
    "Taken": "stamps",
    "TinyGuest": "guest",
    "Tools": "images",
    "VMState": "invariant",
    "WrongLoopError": "loops",
    "build": "images",
    "check_acknowledged": "stamps",
    "check_one_instant": "stamps",
    "check_point_in_time": "stamps",
    "checksum": "stamps",
    "counterpart": "destination",
    "difference": "invariant",
    "expected_content": "stamps",
    "fill_up": "faults",
    "inject": "faults",
    "load_scenario": "scenario",
    "load_scenarios": "scenario",
    "parse_scenario": "scenario",
    "read_area": "area",
    "slow": "faults",
    "small_file_system": "faults",
    "snapshot": "invariant",
    "stamped": "stamps",
    "unplug": "faults",
}

__all__ = [
    "Acknowledged",
    "BlockFault",
    "Bounds",
    "BuiltDisk",
    "BuiltImage",
    "BuiltScenario",
    "Controller",
    "GuestDisk",
    "GuestError",
    "GuestHello",
    "Invariant",
    "Latency",
    "LinuxGuest",
    "LinuxImage",
    "LinuxUnavailableError",
    "OneInstant",
    "PointInTime",
    "QemuFailure",
    "QemuProcess",
    "Scenario",
    "ScenarioError",
    "ShellError",
    "StartDestination",
    "StartQemu",
    "StorageDaemon",
    "StressProgress",
    "StressSpec",
    "Taken",
    "TinyGuest",
    "Tools",
    "VMState",
    "WrongLoopError",
    "build",
    "check_acknowledged",
    "check_one_instant",
    "check_point_in_time",
    "checksum",
    "counterpart",
    "difference",
    "expected_content",
    "fill_up",
    "inject",
    "load_scenario",
    "load_scenarios",
    "parse_scenario",
    "read_area",
    "slow",
    "small_file_system",
    "snapshot",
    "stamped",
    "unplug",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
