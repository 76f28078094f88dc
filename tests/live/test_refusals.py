"""QEMU refuses in words that `qmpblock.qemu.refusals` knows, each by its name and no other."""

import asyncio
import contextlib
import socket

import pytest
from refused import PREDICATES, fitting, refused

from qmpblock.address import UnixAddress
from qmpblock.changes.nomigration import _empty_vdi
from qmpblock.errors import Error
from qmpblock.nbd import Client
from qmpblock.testing.images import Tools, build
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

MIB = 1 << 20
SLOW = 2 * 10**9  # nanoseconds that a request takes
#: What others provoke: beside a test of what is done about it, or not at all (test_refusals.py of
#: the unit tests says why).
ELSEWHERE = {"is_ejected", "read_only_file_system"}


class Refusals:
    """A VM whose QEMU is asked for what it refuses; which names fit is kept."""

    def __init__(self, vm, folder, tools):
        self.vm = vm
        self.folder = folder
        self.tools = tools
        self.seen = set()

    async def make_image(self, name, *arguments):
        path = self.folder / name
        await self.tools.run(self.tools.img, "create", "-q", "-f", "qcow2", str(path), "1M")
        for more in arguments:
            await self.tools.run(self.tools.img, *more, str(path), "kept")
        return path

    async def see(self, *names, of, **arguments):
        error = await refused(self.vm.execute(of, **arguments))
        assert fitting(error) == set(names), f"{error.error_class}: {error.description}"
        self.seen |= set(names)

    async def serve(self, **more):
        await self.vm.execute("nbd-server-start", addr=self.address, **more)

    @property
    def address(self):
        return {"type": "unix", "data": {"path": str(self.folder / "nbd")}}


def file(path, **more):
    return {"driver": "file", "filename": str(path), **more}


async def names_that_are_not_there(asked):
    await asked.see("not_found", of="closefd", fdname="x")
    await asked.see("not_found", of="object-del", id="x")
    await asked.see("not_found", of="block-export-del", id="x")
    await asked.see("not_found", of="block-dirty-bitmap-remove", node="d0", name="x")
    await asked.see("no_node", of="blockdev-del", **{"node-name": "x"})
    for command, more in (("qom-get", {}), ("qom-set", {"value": "x"})):
        path = {"path": "/objects/x", "property": "data"}
        await asked.see("no_object", "not_found", of=command, **path, **more)
    await asked.see("no_command", of="x-nothing")
    nothing = file(asked.folder / "nothing")
    await asked.see("no_file", "could_not_open", of="blockdev-add", **nothing, **{"node-name": "x"})


async def names_that_are_there(asked):
    secret = {"qom-type": "secret", "id": "twice", "data": "x"}
    await asked.vm.execute("object-add", **secret)
    await asked.see("duplicate_object", of="object-add", **secret)
    node = {"driver": "null-co", "node-name": "twice"}
    await asked.vm.execute("blockdev-add", **node)
    await asked.see("duplicate_node", of="blockdev-add", **node)


async def nodes_that_are_needed(asked):
    await asked.vm.execute("blockdev-add", driver="null-co", **{"node-name": "below"})
    await asked.vm.execute("blockdev-add", driver="raw", file="below", **{"node-name": "above"})
    await asked.see("in_use", of="blockdev-del", **{"node-name": "below"})
    await asked.see("in_use", of="blockdev-del", **{"node-name": "d0"})
    await asked.see("is_busy", of="blockdev-del", **{"node-name": "d0-1"})
    await asked.see("not_owned", of="blockdev-del", **{"node-name": "d0-1-file"})


async def an_nbd_server(asked):
    await asked.see("not_running", of="nbd-server-stop")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host, port = taken.getsockname()
        inet = {"type": "inet", "data": {"host": host, "port": str(port)}}
        await asked.see("in_use", of="nbd-server-start", addr=inet)
    await asked.serve()
    await asked.see("already_running", of="nbd-server-start", addr=asked.address)
    await asked.vm.execute("nbd-server-stop")


async def an_export_with_a_client(asked):
    slow = {"driver": "null-co", "node-name": "slow", "latency-ns": SLOW, "size": MIB}
    await asked.vm.execute("blockdev-add", **slow)
    await asked.serve()
    export = {"type": "nbd", "id": "e", "name": "e", "node-name": "slow"}
    await asked.vm.execute("block-export-add", **export)
    where = UnixAddress(str(asked.folder / "nbd"))
    client = await Client.connect(where, export="e", contexts=(), in_flight=1, stall=60)
    reading = asyncio.create_task(client.read(0, 4096))
    try:
        await asked.see("in_use", of="block-export-del", id="e", mode="safe")
        await asyncio.sleep(0.2)  # until QEMU has the request
        await asked.vm.execute("block-export-del", id="e", mode="hard")
        await asked.see("already_shutting_down", of="block-export-del", id="e", mode="hard")
    finally:
        with contextlib.suppress(Error):
            await reading
        await client.close()
    while await asked.vm.execute("query-block-exports"):
        await asyncio.sleep(0.1)
    await asked.vm.execute("nbd-server-stop")


async def a_thread_of_its_own(asked):
    await asked.vm.execute("object-add", **{"qom-type": "iothread", "id": "thread"})
    await asked.serve()
    pinned = {"iothread": "thread", "fixed-iothread": True, "node-name": "d0"}
    export = {"type": "nbd", "id": "e", "name": "e", **pinned}
    await asked.see("iothread_is_fixed", of="block-export-add", **export)
    await asked.vm.execute("nbd-server-stop")


async def a_migration_under_way(asked):
    """It waits before the images change hands."""
    image = asked.folder / "blocker.vdi"
    image.write_bytes(_empty_vdi())
    waits = {"capability": "pause-before-switchover", "state": True}
    await asked.vm.execute("migrate-set-capabilities", capabilities=[waits])
    await asked.vm.execute("migrate", uri="exec:cat > /dev/null")
    while (await asked.vm.execute("query-migrate"))["status"] != "pre-switchover":
        await asyncio.sleep(0.05)
    blocker = {"driver": "vdi", "node-name": "vdi", "read-only": True, "file": file(image)}
    await asked.see("migration_in_progress", of="blockdev-add", **blocker)
    await asked.vm.execute("migrate_cancel")
    while (await asked.vm.execute("query-migrate"))["status"] != "cancelled":
        await asyncio.sleep(0.05)


async def images_for_reading_only(asked):
    base = await asked.make_image("base.qcow2", ("bitmap", "--add"))
    overlay = await asked.make_image("overlay.qcow2")
    below = {"driver": "qcow2", "node-name": "below-ro", "read-only": True}
    await asked.vm.execute("blockdev-add", **below, file=file(base, **{"read-only": True}))
    above = {"driver": "qcow2", "node-name": "above-ro", "backing": "below-ro"}
    await asked.vm.execute("blockdev-add", **above, file=file(overlay))
    await asked.see("read_only", of="block-commit", device="above-ro", **{"job-id": "j"})
    bitmap = {"node": "below-ro", "name": "kept"}
    await asked.see("bitmap_is_fixed", of="block-dirty-bitmap-remove", **bitmap)


async def a_key_that_is_wrong(asked):
    text = "about: Locked.\nimages:\n  - {format: luks, size: 1M, secret: right}\n"
    built = await build(parse_scenario(text, "locked"), asked.folder / "locked", asked.tools)
    image = built.disks[0].active.path
    await asked.vm.execute("object-add", **{"qom-type": "secret", "id": "wrong", "data": "wrong"})
    locked = {"driver": "luks", "node-name": "locked", "key-secret": "wrong", "file": file(image)}
    await asked.see("wrong_key", of="blockdev-add", **locked)


#: What provokes which refusals.
PROVOKE = {
    names_that_are_not_there: {
        *("not_found", "no_node", "no_object", "no_command", "no_file", "could_not_open"),
    },
    names_that_are_there: {"duplicate_object", "duplicate_node"},
    nodes_that_are_needed: {"in_use", "is_busy", "not_owned"},
    an_nbd_server: {"not_running", "in_use", "already_running"},
    an_export_with_a_client: {"in_use", "already_shutting_down"},
    a_thread_of_its_own: {"iothread_is_fixed"},
    images_for_reading_only: {"read_only", "bitmap_is_fixed"},
    a_key_that_is_wrong: {"wrong_key"},
    a_migration_under_way: {"migration_in_progress"},
}


@pytest.mark.scenarios("chain-3.yaml")
@pytest.mark.parametrize("provoke", PROVOKE, ids=lambda provoke: provoke.__name__)
async def test_each_refusal_has_its_name_and_no_other(
    provoke, scenario, start_qemu, vm_dir, qemu_binary, invariant
):
    vm = await start_qemu(scenario)
    invariant.forget(vm)
    asked = Refusals(vm, vm_dir, Tools.of(qemu_binary))
    await provoke(asked)
    assert asked.seen == PROVOKE[provoke]


def test_every_refusal_is_provoked():
    """Or said to be `ELSEWHERE`."""
    assert set().union(ELSEWHERE, *PROVOKE.values()) == set(PREDICATES)
