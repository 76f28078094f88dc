"""Policies: the desired state of many disks, read from YAML, compared, brought about, kept.

Names are imported when they are first used, so that reading a policy alone costs little.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmpblock.policy.copies import CopiesPlan, CopiesResult
    from qmpblock.policy.file import Policy, load_policy
    from qmpblock.policy.run import DiskPlan, DiskResult, apply, plan
    from qmpblock.policy.watch import Watch

__all__ = [
    "CopiesPlan",
    "CopiesResult",
    "DiskPlan",
    "DiskResult",
    "Policy",
    "Watch",
    "apply",
    "load_policy",
    "plan",
]

_HOMES = {
    "CopiesPlan": "copies",
    "CopiesResult": "copies",
    "DiskPlan": "look",
    "DiskResult": "run",
    "Policy": "file",
    "Watch": "watch",
    "apply": "run",
    "load_policy": "file",
    "plan": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"qmpblock.policy.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
