"""What the live tests of policies share: writing one, planning and applying it, the closed images.

`planned` and `applied` run the commands, and see to their documents' schema; `plan_of` and
`apply_to` do the same by the library, without a process.
"""

import json
from dataclasses import replace
from pathlib import Path

import yaml
from chains import cli
from jsonschema import Draft202012Validator

from qmpblock.cli import apply_command, plan_command
from qmpblock.policy import run as policies
from qmpblock.policy.file import parse_policy

FULL = {"backing": "independent", "allocation": "full"}
SCHEMAS = Path(__file__).parents[1] / "docs" / "schema"
# What the images that leave the chain take with them, and what the active one records then.
DROPPED = r"^(disappeared: (node|edge|open file): |appeared: (node|edge): d0 )"


def written(directory, content, name="policy.yaml"):
    """Write a policy file."""
    path = directory / name
    path.write_text(yaml.safe_dump(content))
    return str(path)


def one_disk(vm, disk, **wanted):
    """Return the policy of one disk of one VM."""
    return {"vms": [{"address": vm.monitor_path, "disks": [{"disk": disk, **wanted}]}]}


def _valid(text, name):
    value = json.loads(text)
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    Draft202012Validator(schema).validate(value)
    return value["disks"]


async def planned(path, code=0):
    """Run `qmpblock plan`; return what it says of each disk."""
    got, out, err = await cli("plan", path, "--json")
    assert got == code, err
    return _valid(out, "plan")


async def applied(path, code=0):
    """Run `qmpblock apply`; return what it did to each disk."""
    got, out, err = await cli("apply", path, "--json")
    assert got == code, err
    return _valid(out, "apply")


async def plan_of(policy):
    """Return the documents of `plan`."""
    plans = await policies.plan(parse_policy(yaml.safe_dump(policy)))
    return [plan_command.document(one) for one in plans]


async def apply_to(policy, **calls):
    """Apply a policy; return the documents of `apply`."""
    results = await policies.apply(parse_policy(yaml.safe_dump(policy)), **calls)
    return [apply_command.document(one) for one in results]


async def check_closed(built, digest, *, alone, number=0):
    """Check the closed images: the content is what it was, and, alone, needs no other image."""
    active = built.disks[number].active
    if alone:
        active = await without_backing(active, built.tools)
    assert await active.digest(built.tools) == digest
    await active.check(built.tools)


async def without_backing(image, tools):
    """Return a closed image that no longer has a backing image, as its header must say."""
    words = ["info", "--output=json", "-f", image.spec.format, str(image.path)]
    assert "backing-filename" not in json.loads(await tools.run(tools.img, *words))
    return replace(image, backing=None)
