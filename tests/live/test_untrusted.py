"""Root beside a QEMU whose user is not to be trusted: what he puts into his directory."""

import os
import socket
import tempfile
from pathlib import Path

import pytest
from otherusers import EVE, within

import qmpblock
from qmpblock.errors import Error
from qmpblock.names import NBD_LOCK
from qmpblock.qemu.lock import Holder
from qmpblock.testing.images import Tools
from qmpblock.testing.scenario import parse_scenario

pytestmark = pytest.mark.live

MIB = 1 << 20
#: Allocations beside which she races: a sample; more of them are a measurement.
ROUNDS = int(os.environ.get("QMPBLOCK_ROUNDS", "4"))


@pytest.mark.scenarios("chain-3.yaml")
async def test_eve_is_who_we_need(scenario, eve, vm_dir):
    """The rest means something: her QEMU is hers, root maps it, and she cannot do what root can."""
    vm = await eve.start(scenario)
    assert os.stat(f"/proc/{vm.pid}").st_uid == EVE
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        assert (await disk.map()).totals().layers
    secret = vm_dir / "secret"
    secret.write_text("root's")
    script = "import sys\ntry: open(sys.argv[1])\nexcept OSError as error: print(error.strerror)"
    assert eve.run(script, str(secret)) == "Permission denied\n"


BLANK = """\
about: A blank disk, of which any part can be reserved.
images: [{size: 64M}]
"""


async def test_a_link_in_the_place_of_a_file_that_we_fill(eve, vm_dir, qemu_binary):
    """Root's qemu-io opened Z by its name, again: another image of root's was written to."""
    vm = await eve.start(parse_scenario(BLANK, "blank"))
    tools = Tools.of(qemu_binary)
    victim = vm_dir / "victim"
    with (vm_dir / "data").open("wb"):
        pass
    options = f"data_file={vm_dir / 'data'}"
    await tools.run(tools.img, "create", "-q", "-f", "qcow2", "-o", options, str(victim), "4M")
    before = victim.read_bytes()
    images = Path(vm.disks[0].active.path).parent
    ends = []
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with eve.swapping(victim, images, "*-z") as swapped:
            for number in range(ROUNDS):
                try:
                    await disk.allocate(4 * number * MIB, 4 * MIB, full=True)
                except Error as error:
                    ends.append(str(error))
    assert victim.read_bytes() == before
    assert victim.stat().st_uid == 0
    # It means something only if she came in time: each of her links ends a command, or comes late.
    assert swapped[0] > 0
    for said in ends:
        assert "Traceback" not in said
    if os.environ.get("QMPBLOCK_FIGURES"):
        print(f"{ROUNDS} rounds, {swapped[0]} swapped, {len(ends)} ended: {set(ends)}")


async def test_a_fifo_in_the_place_of_an_overlay_hangs_nobody(eve):
    """It was opened again by its name, to be synced: that waited for ever."""
    vm = await eve.start(parse_scenario(BLANK, "blank"))
    images = Path(vm.disks[0].active.path).parent
    overlay = images / "overlay.qcow2"
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        real = controller.monitor._execute

        async def execute(name, arguments):
            answer = await real(name, arguments)
            if name == "blockdev-add" and (arguments or {}).get("filename") == str(overlay):
                overlay.unlink()
                os.mkfifo(overlay)
            return answer

        controller.monitor._execute = execute
        with within(10), pytest.raises(Error, match="another file, or a link"):
            await controller.snapshot({disk: overlay})
    assert overlay.is_fifo()  # it is not ours


async def test_her_link_does_not_have_root_make_her_a_file_elsewhere(eve):
    """Overlays are given to the image's owner: so he could have had a file in any directory."""
    vm = await eve.start(parse_scenario(BLANK, "blank"))
    roots = eve.directory / "roots"
    roots.mkdir(mode=0o755)
    eve.run("import os, sys; os.symlink(*sys.argv[1:])", str(roots), str(eve.directory / "hers"))
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        with pytest.raises(Error, match="leads through the link hers of user") as caught:
            await controller.snapshot({disk: eve.directory / "hers" / "over.qcow2"})
        assert caught.value.standing == "nothing was touched"
        assert list(roots.iterdir()) == []
        made = eve.directory / "over.qcow2"
        await controller.snapshot({disk: made})
    assert (made.stat().st_uid, made.stat().st_gid) == (EVE, EVE)


@pytest.mark.scenarios("chain-3.yaml")
async def test_a_lock_of_hers_removes_no_socket_of_roots(scenario, eve, vm_dir):
    """Its socket's path led through a link of hers, to any UNIX socket of the host."""
    vm = await eve.start(scenario)
    (vm_dir / "run").mkdir(mode=0o755)
    with socket.socket(socket.AF_UNIX) as victim:
        victim.bind(str(vm_dir / "run" / "nbd"))
    dead = Holder.me("deadbeef")
    link = eve.directory / "qmpblock-deadbeef"
    eve.run("import os, sys; os.symlink(*sys.argv[1:])", str(vm_dir / "run"), str(link))
    details = {
        "exports": ["d0"],
        "path": str(link / "nbd"),
        "ports": [],
        "monitor": vm.monitor_path,
        "custody": False,
    }
    forged = Holder(dead.run, dead.host, 1 << 22, 1, dead.boot, dead.pids, details)
    await vm.execute("object-add", qom_type="secret", id=NBD_LOCK, data=forged.text())
    await vm.execute(
        "nbd-server-start",
        addr={"type": "unix", "data": {"path": str(eve.directory / "nbd")}},
    )
    node = (await vm.execute("query-named-block-nodes", flat=True))[0]["node-name"]
    await vm.execute("block-export-add", type="nbd", id="qmpblock-deadbeef-0", node_name=node)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk, *_] = await controller.disks()
        assert await disk.map()
    assert (vm_dir / "run" / "nbd").is_socket()


# She listens in a directory of hers, and says who comes.
LISTEN = """
import os, socket, sys
os.chdir(sys.argv[1])
os.mkdir("hers")
server = socket.socket(socket.AF_UNIX)
server.bind("hers/nbd")
server.listen(50)
print("ready", flush=True)
while True:
    server.accept()
    print("TALKED", flush=True)
"""


@pytest.mark.scenarios("chain-3.yaml")
async def test_where_tmpdir_is_hers_root_talks_to_nobody_else(scenario, eve, vm_dir, monkeypatch):
    """Root made its socket there, and then connected to whatever had its name.

    Its own path could lead anywhere by the time it was bound, too: so nothing of root's is there.
    """
    vm = await eve.start(scenario)
    hers = eve.directory / "tmp"
    hers.mkdir(mode=0o755)
    eve.take(hers)
    monkeypatch.setattr(tempfile, "tempdir", str(hers))
    with eve.running(LISTEN, str(hers)) as process:
        with eve.swapping(vm_dir, hers, "qmpblock-*") as swapped:
            async with qmpblock.connect(vm.monitor_path) as controller:
                [disk] = await controller.disks()
                assert await disk.map()
        process.kill()
        assert process.stdout.read() == ""
    assert swapped == [0]
