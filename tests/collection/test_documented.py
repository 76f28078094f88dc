"""What the collection says of itself is so: options, examples, versions."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from collections_of_ansible import HOME, MODULES, part

import qmpblock


class AskedError(Exception):
    """What a module asks Ansible for."""


def spec_of(module, monkeypatch):
    """Return the argument spec of a module, by having it ask for it."""

    def asking(**words):
        raise AskedError(words)

    with monkeypatch.context() as patched:
        patched.setattr(module, "AnsibleModule", asking)
        with pytest.raises(AskedError) as asked:
            module.main()
    return asked.value.args[0]


def documented(module):
    """Return the options that its DOCUMENTATION has, with those of the fragments."""
    said = yaml.safe_load(module.DOCUMENTATION)
    options = dict(said["options"])
    fragments = part("doc_fragments.command").ModuleDocFragment
    for name in said["extends_documentation_fragment"]:
        kind = name.removeprefix("qmpblock.qmpblock.command").lstrip(".").upper()
        options |= yaml.safe_load(getattr(fragments, kind or "DOCUMENTATION"))["options"]
    return said, options


def settled(option):
    """Return what of an option its spec and its documentation both say."""
    found = {
        "type": option.get("type", "str"),
        "required": option.get("required", False),
        "default": option.get("default"),
        "choices": option.get("choices"),
        "elements": option.get("elements"),
    }
    inner = option.get("options") or option.get("suboptions") or {}
    return {**found, "options": {name: settled(one) for name, one in inner.items()}}


@pytest.mark.parametrize("name", MODULES)
def test_the_options_are_documented_as_they_are(name, monkeypatch):
    module = part(f"modules.{name}")
    asked = spec_of(module, monkeypatch)
    said, options = documented(module)
    assert said["module"] == name
    assert {key: settled(one) for key, one in options.items()} == {
        key: settled(one) for key, one in asked["argument_spec"].items()
    }
    assert asked["supports_check_mode"]
    assert said["attributes"]["check_mode"]["support"] == "full"


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_use_what_there_is(name, monkeypatch):
    module = part(f"modules.{name}")
    known = spec_of(module, monkeypatch)["argument_spec"]
    tasks = yaml.safe_load(module.EXAMPLES)
    examples = [task[key] for task in tasks for key in task if key == f"qmpblock.qmpblock.{name}"]
    assert examples
    for given in examples:
        assert set(given) <= set(known)
        assert {key for key, one in known.items() if one.get("required")} <= set(given)


def tasks_of(page):
    """Return the arguments of our modules in the YAML of a page, by the module's name."""
    for text in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        found = yaml.safe_load(text)
        for one in found if isinstance(found, list) else []:
            for task in one.get("tasks", [one]):
                for key, given in task.items():
                    if key.startswith("qmpblock.qmpblock."):
                        yield key.rpartition(".")[2], given


def test_the_pages_examples_use_what_there_is(monkeypatch):
    found = list(tasks_of(HOME.parent / "docs" / "ansible.md"))
    assert {name for name, _ in found} >= {"disk", "snapshot", "copy", "backup", "backup_info"}
    for name, given in found:
        assert set(given) <= set(spec_of(part(f"modules.{name}"), monkeypatch)["argument_spec"])


def test_the_pages_outcomes_are_the_modules():
    page = (HOME.parent / "docs" / "ansible.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", page, re.MULTILINE)
    assert {int(code): said for code, said in rows} == part("module_utils.command").OUTCOMES


@pytest.mark.parametrize("role", sorted(path.name for path in (HOME / "roles").iterdir()))
def test_the_variables_of_a_role_are_documented(role):
    home = HOME / "roles" / role
    main = yaml.safe_load((home / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]
    told = main["options"]
    defaults = yaml.safe_load((home / "defaults/main.yml").read_text())
    assert {name: one["default"] for name, one in told.items() if "default" in one} == defaults
    assert {name for name, one in told.items() if one.get("required")} == set(told) - set(defaults)
    tasks = (home / "tasks/main.yml").read_text()
    own = {"migrate_sides", *re.findall(r"register: (\w+)", tasks)}
    assert set(re.findall(rf"\b{role}_\w+", tasks)) - own == set(told)
    readme = set(re.findall(rf"\b{role}_\w+", (home / "README.md").read_text()))
    assert readme <= set(told)


def test_the_version_is_the_commands():
    galaxy = yaml.safe_load((HOME / "galaxy.yml").read_text())
    assert galaxy["version"] == qmpblock.__version__
    assert (galaxy["namespace"], galaxy["name"]) == ("qmpblock", "qmpblock")
    for path in [*(HOME / "plugins/modules").glob("*.py"), HOME / "plugins/inventory/vms.py"]:
        text = re.search(r"version_added: (\S+)", path.read_text())
        assert text is not None, path


def test_defaults_for_the_group_are_all_modules():
    runtime = yaml.safe_load((HOME / "meta/runtime.yml").read_text())
    assert runtime["action_groups"] == {"qmpblock": MODULES}


def test_no_module_imports_qmpblock():
    for path in (HOME / "plugins").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) qmpblock", path.read_text(), re.MULTILINE), path


def test_ansible_shows_it(tmp_path):
    """What is documented is complete enough for its own reader."""
    collection = tmp_path / "ansible_collections" / "qmpblock" / "qmpblock"
    collection.parent.mkdir(parents=True)
    collection.symlink_to(HOME)
    settings = {"ANSIBLE_COLLECTIONS_PATH": str(tmp_path), "ANSIBLE_HOME": str(tmp_path / "a")}
    for kind, names in (("module", MODULES), ("inventory", ["vms"])):
        every = [f"qmpblock.qmpblock.{name}" for name in names]
        done = subprocess.run(
            [Path(sys.executable).with_name("ansible-doc"), "--json", "-t", kind, *every],
            env={**os.environ, **settings, "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert sorted(json.loads(done.stdout)) == every
