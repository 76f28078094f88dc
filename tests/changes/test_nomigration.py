"""No migration, against a fake QEMU. What a real one does with it: live/test_ownership.py."""

import os

import pytest
from drawing import RUN, chain
from fake_objects import fake_vm

from qmpblock.changes.nomigration import allow_migration, forbid_migration
from qmpblock.errors import UnsupportedError
from qmpblock.names import blocker_name
from qmpblock.qemu.monitor import Monitor

NAME = blocker_name(RUN)


def said(qemu, command):
    return [one["arguments"] for one in qemu.fake.seen if one["execute"] == command]


def memory_files():
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue  # that of the listing
    return [name for name in found if NAME in name]


async def test_it_is_a_node_that_cannot_be_migrated(tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
        assert await forbid_migration(vm.monitor, RUN) is True
        [node] = said(qemu, "blockdev-add")
        assert (node["driver"], node["node-name"], node["read-only"]) == ("vdi", NAME, True)
        assert node["file"]["filename"].startswith("/proc/self/fd/")
        assert said(qemu, "getfd") == said(qemu, "closefd") == [{"fdname": NAME}]
        assert memory_files() == []
        await allow_migration(vm.monitor, RUN)
        assert said(qemu, "blockdev-del") == [{"node-name": NAME}]


@pytest.mark.parametrize(
    ("words", "held"),
    [
        ("disallowing migration blocker (--only-migratable) for: The vdi format", False),
        ("Driver 'vdi' can only be used for read-only devices", False),
        ("Could not open '/proc/self/fd/14': Permission denied", False),
        (f"Duplicate nodes with node-name='{NAME}'", True),
    ],
)
async def test_where_it_cannot_be_had(words, held, tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
        qemu["blockdev-add"] = {"error": {"class": "GenericError", "desc": words}}
        assert await forbid_migration(vm.monitor, RUN) is held
        assert memory_files() == []


async def test_a_migration_that_is_under_way_is_first(tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
        words = "disallowing migration blocker (migration/snapshot in progress) for: The vdi"
        qemu["blockdev-add"] = {"error": {"class": "GenericError", "desc": words}}
        with pytest.raises(UnsupportedError, match="being migrated") as caught:
            await forbid_migration(vm.monitor, RUN)
        assert caught.value.standing == "nothing was touched"
        assert said(qemu, "closefd") == [{"fdname": NAME}]


async def test_allowing_it_again_is_idempotent(tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0")) as (vm, qemu):
        qemu["blockdev-del"] = {
            "error": {
                "class": "GenericError",
                "desc": f"Failed to find node with node-name='{NAME}'",
            }
        }
        qemu["closefd"] = {
            "error": {
                "class": "GenericError",
                "desc": "File descriptor named 'x' not found",
            }
        }
        await allow_migration(vm.monitor, RUN)


async def test_not_over_tcp():
    from qmpblock.address import TCPAddress

    assert await forbid_migration(Monitor(TCPAddress("localhost", 1), 1.0), RUN) is False
