"""Root beside a QEMU whose user is not to be trusted: what he puts into his directory."""

import os
from pathlib import Path

import pytest
from untrusted import UID, within

import qmpblock
from qmpblock.errors import Error
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
    assert os.stat(f"/proc/{vm.pid}").st_uid == UID
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
    assert (made.stat().st_uid, made.stat().st_gid) == (UID, UID)
