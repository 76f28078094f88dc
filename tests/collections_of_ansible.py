"""The collection in ansible/, as Ansible's own loader has it: importable by its full name."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

HOME = Path(__file__).resolve().parents[1] / "ansible"
NAME = "ansible_collections.qmpblock.qmpblock"

for name, path in (
    ("ansible_collections", []),
    ("ansible_collections.qmpblock", []),
    (NAME, [str(HOME)]),
):
    package = sys.modules.setdefault(name, ModuleType(name))
    package.__path__ = path

MODULES = sorted(path.stem for path in (HOME / "plugins" / "modules").glob("*.py"))


def part(name):
    """Import a part, such as module_utils.command."""
    return importlib.import_module(f"{NAME}.plugins.{name}")


class EndedError(Exception):
    """A module has ended, with what it returns."""

    def __init__(self, failed, result):
        super().__init__(result)
        self.failed, self.result = failed, result


class FakeModule:
    """An AnsibleModule whose command answers what is given to it, in turn.

    :ivar asked: the command lines; `warned`: the warnings.
    """

    check_mode = False
    _diff = False

    def __init__(self, params, answers, directory):
        self.params = {"executable": "qmpblock", **params}
        self.answers = list(answers)
        self.tmpdir = str(directory)
        self.asked, self.environments, self.warned, self.policies = [], [], [], []

    def get_bin_path(self, name, required):
        assert required
        return f"/bin/{name}"

    def run_command(self, words, environ_update):
        self.asked.append(words[1:])
        self.environments.append(environ_update)
        self.policies += [Path(word).read_text() for word in words if word.endswith(".yaml")]
        return self.answers.pop(0)

    def warn(self, text):
        self.warned.append(text)

    def exit_json(self, **result):
        raise EndedError(False, result)

    def fail_json(self, **result):
        raise EndedError(True, result)
