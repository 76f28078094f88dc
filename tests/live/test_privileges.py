"""Which command works with whose rights: the table of docs/privileges.md, measured.

QEMU runs as a user of its own. Its images, their directory and its monitor belong to that user
and to a group, as docs/privileges.md advises.
"""

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest
from chains import cli
from jsonschema import Draft202012Validator
from otherusers import GROUP, USERS, VM_USER, Runner, UsersQemu

import qmpblock
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

PAGE = Path(__file__).parents[2] / "docs" / "privileges.md"
DISKS = """
about: A chain, and a raw disk with blanks.
disks:
  - images:
      - {format: qcow2, size: 1M, content: [write 0 64K 0xaa]}
      - {size: 1M, content: [write 512K 64K 0xbb]}
  - images: [{format: raw, size: 1M, content: [write 0 64K 0xcc]}]
"""


def table():
    """Return the table of the page: of each command what it does with each user's rights."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    start = next(at for at, row in enumerate(rows) if row[0] == "command")
    names = rows[start][1:]
    found = {}
    for row in rows[start + 2 :]:
        if len(row) != len(names) + 1:
            break
        found[row[0]] = dict(zip(names, row[1:], strict=True))
    return found


def test_the_table_is_of_these_users():
    assert {tuple(row) for row in table().values()} == {tuple(USERS)}


class Site:
    """A VM of its own user, whose files and monitor a group may use."""

    def __init__(self, directory, qemu):
        self.directory, self.qemu = directory, qemu
        self.images = directory / "images"
        self.vm = None

    async def start(self):
        """Make the images, and start QEMU."""
        self.directory.chmod(0o755)
        built = await build(parse_scenario(DISKS, "disks"), self.images, Tools.of(self.qemu))
        closed = self.images / "closed.qcow2"
        await asyncio.to_thread(shutil.copy, built.disks[0].active.chain()[1].path, closed)
        for name in ("copy.qcow2", "resumed.qcow2.partial"):
            await asyncio.to_thread(shutil.copy, closed, self.images / name)
        for path in (self.images, *self.images.rglob("*")):
            os.chown(path, VM_USER, GROUP)
            path.chmod(0o2770 if path.is_dir() else 0o660)
        place = self.directory / "vm"
        place.mkdir()
        os.chown(place, VM_USER, GROUP)
        place.chmod(0o2770)
        self.vm = UsersQemu.of(
            built, directory=place, qemu=self.qemu, user=USERS["the VM's user"], umask=0o007
        )
        return self.vm

    async def back_up(self):
        """Make a backup, as whoever runs this, to be read by all of them."""
        async with qmpblock.connect(self.vm.monitor_path) as vm:
            disk = await vm.disk("vd1")
            async with vm.backup(self.images / "made", [disk]):
                pass

    def runner(self, user):
        """Return what runs commands as a user, who has a state directory of their own."""
        own = {}
        for variable, name in (("QMPBLOCK_STATE", "state"), ("TMPDIR", "tmp")):
            path = self.directory / f"{name}-of-user"
            path.mkdir(mode=0o700)
            os.chown(path, user.uid, user.uid)
            own[variable] = str(path)
        return Runner(user, own)

    def policy(self):
        """Write a policy about the second disk, and return its file."""
        path = self.directory / "policy.yaml"
        vm = {"address": self.vm.monitor_path, "disks": [{"disk": "vd1", "allocation": "full"}]}
        path.write_text(json.dumps({"vms": [vm]}))
        return path

    def commands(self):
        """Return the commands of the table; each leaves what the next one needs."""
        address, images = self.vm.monitor_path, self.images
        return {
            "disks": ("disks", address),
            "map": ("map", address, "vd0"),
            "map --layers": ("map", address, "vd0", "--layers"),
            "map IMAGE": ("map", images / "closed.qcow2"),
            "verify IMAGE IMAGE": ("verify", images / "closed.qcow2", images / "copy.qcow2"),
            "allocate": ("allocate", address, "vd0"),
            "allocate --full (qcow2)": ("allocate", address, "vd0", "--full"),
            "allocate --full (raw)": ("allocate", address, "vd1", "--full"),
            "snapshot": ("snapshot", address, f"vd0={images}/new.qcow2"),
            "copy": ("copy", address, "vd0", images / "start.qcow2"),
            "copy --at end": ("copy", address, "vd0", images / "end.qcow2", "--at", "end"),
            "copy --dry-run": ("copy", address, "vd0", images / "none.qcow2", "--dry-run"),
            "copy --latency": ("copy", address, "vd0", images / "slow.qcow2", "--latency", "20ms"),
            "copy --resume": ("copy", address, "vd0", images / "resumed.qcow2", "--resume"),
            "export": ("export", address, "vd0", "--", "true"),
            "commit (middle layer)": ("commit", address, "vd0", "--top", "@1", "--base", "@2"),
            "commit (active layer)": ("commit", address, "vd0"),
            "snapshot (again)": ("snapshot", address, f"vd0={images}/newer.qcow2"),
            "stream": ("stream", address, "vd0"),
            # Last, for what it leaves ends with a layer that is committed, which is a warning.
            "backup": ("backup", address, images / "backups", "--disk", "vd0"),
            "backup --dry-run": (
                *("backup", address, images / "backups", "--disk", "vd0", "--dry-run"),
            ),
            "backup check": ("backup", "check", images / "made"),
            "restore": ("restore", images / "made", images / "restored"),
            "plan": ("plan", self.policy()),
            "apply": ("apply", self.policy()),
            "jobs": ("jobs", address),
            "recover": ("recover", address),
            "metrics": ("metrics", address, "--json"),
            "doctor": ("doctor", address),
        }


@pytest.mark.parametrize("name", USERS)
async def test_what_works_with_whose_rights(vm_dir, qemu_binary, name):
    if os.geteuid() != 0:
        pytest.skip("only root can run something as other users")
    site = Site(vm_dir, qemu_binary)
    measured, printed = {}, {}
    async with await site.start():
        await site.back_up()
        runner = site.runner(USERS[name])
        try:
            for what, arguments in site.commands().items():
                code, printed[what] = await asyncio.to_thread(runner.run, *arguments)
                measured[what] = "yes" if code == 0 else f"no ({code})"
        finally:
            runner.close()
    print(json.dumps(printed, indent=1).replace("\\n", "\n"))
    print(json.dumps(measured, indent=1))
    wanted = {what: row[name] for what, row in table().items()}
    assert {what: measured.get(what) for what in wanted} == wanted


async def doctor(address):
    """Return the exit code, and what was found, by what was looked for."""
    code, printed, _ = await cli("doctor", address, "--json")
    found = json.loads(printed)
    schema = json.loads((PAGE.parent / "schema" / "doctor.schema.json").read_text())
    Draft202012Validator(schema).validate(found)
    return code, {one["what"]: one for one in found}


async def test_a_doctor_sees_the_images(start_qemu):
    vm = await start_qemu(parse_scenario(DISKS, "disks"))
    code, found = await doctor(vm.monitor_path)
    assert code == (4 if any(one["missing"] for one in found.values()) else 0)
    for what in ("VM's process", "VM's open files", "vd0 @0", "vd0 @1", "vd0 directory", "vd1 @0"):
        assert not found[what]["missing"], found[what]
    base = vm.disks[0].active.chain()[1].path
    base.rename(base.with_name("elsewhere"))
    code, found = await doctor(vm.monitor_path)
    assert code == 4
    assert found["vd0 @1"]["missing"]
    base.with_name("elsewhere").rename(base)


async def test_a_doctor_sees_little_over_tcp(start_qemu, free_port):
    vm = await start_qemu([], extra=["-qmp", f"tcp:127.0.0.1:{free_port},server=on,wait=off"])
    code, found = await doctor(f"127.0.0.1:{free_port}")
    assert code == 4
    assert not found["monitor"]["missing"]
    assert found["VM's process"]["missing"]
    assert found["VM's open files"]["missing"]
    assert vm.running
