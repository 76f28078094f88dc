"""What the public names of qmpblock.testing promise: names, members, parameters.

`python tests/promised.py` writes tests/data/promised.json anew, from what there is: to be run
when a name is published, never to make a test pass from which something has gone.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import qmpblock.testing
from qmpblock.testing import plugin

RECORD = Path(__file__).parent / "data" / "promised.json"


def parameters(function: Any) -> dict[str, str]:
    """Return a callable's parameters by name: how each is given, and whether it must be."""
    return {
        name: f"{one.kind.name.lower()}{'' if one.default is one.empty else ', optional'}"
        for name, one in inspect.signature(function).parameters.items()
        if name != "self"
    }


def members(kind: type) -> dict[str, Any]:
    """Return the public members of a class: parameters of what is called, None for the rest."""
    found: dict[str, Any] = {}
    for name, value in inspect.getmembers(kind):
        if not name.startswith("_") and not hasattr(BaseException, name):
            found[name] = parameters(value) if callable(value) else None
    fields = getattr(kind, "__dataclass_fields__", getattr(kind, "__annotations__", {}))
    found.update({name: None for name in fields if not name.startswith("_")})
    return found


def promises() -> dict[str, Any]:
    """Return all of it."""
    names: dict[str, Any] = {}
    for name in qmpblock.testing.__all__:
        value = getattr(qmpblock.testing, name)
        if inspect.isclass(value):
            made = {} if getattr(value, "_is_protocol", False) else parameters(value)
            names[name] = {"made": made, "members": members(value)}
        else:
            names[name] = {"called": parameters(value)}
    fixtures = [
        name
        for name, value in vars(plugin).items()
        if type(value).__name__ == "FixtureFunctionDefinition"
    ]
    return {"names": names, "fixtures": sorted(name for name in fixtures if name[0] != "_")}


if __name__ == "__main__":
    RECORD.write_text(json.dumps(promises(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
