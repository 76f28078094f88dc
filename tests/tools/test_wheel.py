"""The wheel holds all of the package, and works without the repository: `pip install`, no QEMU."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import ZipFile

import pytest
from publicnames import public
from wheels import ROOT, Installed, install

from qmpblock import __version__

#: Imports every module; then takes the public names, given as JSON.
PROBE = """
import importlib, json, pkgutil, sys
import qmpblock
for module in pkgutil.walk_packages(qmpblock.__path__, "qmpblock."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for module, names in json.loads(sys.argv[1]).items():
    for name in names:
        getattr(importlib.import_module(module), name)
print(json.dumps({
    name: module.__file__ for name, module in sys.modules.items()
    if name.partition(".")[0] == "qmpblock"
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    return install(tmp_path_factory.mktemp("wheel"))


def test_it_holds_every_file_of_the_package_and_no_other(installed):
    with ZipFile(installed.wheel) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "qmpblock").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted
    assert {"qmpblock/py.typed", "qmpblock/testing/firmware/guest.rom"} <= held


def test_the_command_and_the_module_run(installed):
    for words in (("qmpblock",), ("python", "-m", "qmpblock")):
        assert installed.run(*words, "--version") == f"qmpblock {__version__}\n"


def test_every_module_and_every_public_name_is_imported_from_there(installed):
    names = public()
    assert sum(map(len, names.values())) > 40
    found = json.loads(installed.run("python", "-c", PROBE, json.dumps(names)))
    modules = {path for path in (ROOT / "qmpblock").rglob("*.py") if path.name != "__main__.py"}
    assert len(found) == len(modules)
    assert {Path(file).is_relative_to(installed.packages) for file in found.values()} == {True}


def test_the_repository_is_not_seen(installed):
    paths = json.loads(
        installed.run("python", "-c", "import json, sys; print(json.dumps(sys.path))")
    )
    assert [path for path in paths if Path(path).is_relative_to(ROOT) and path] == []
