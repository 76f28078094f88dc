"""Root looks at the layers of a VM whose user has rewritten their headers, and opens nothing of it.

The scenario is chain-3.yaml: d0 on d0-1 on d0-2.
"""

import os

import pytest
from headers_of_eve import Place, open_to_all, with_data_file
from otherusers import eve

import qmpblock
from qmpblock.host.handed import HandedFiles

__all__ = ["eve"]

pytestmark = [
    pytest.mark.live,
    pytest.mark.scenarios("chain-3.yaml"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else's deputy"),
]

MIB = 1 << 20


@pytest.fixture
def place():
    with open_to_all() as directory:
        found = Place(directory)
        yield found
        found.close()


def names_a_data_file(layer, place):
    hostile = with_data_file(place.eve / "hostile", place.secret)
    layer.write_bytes(hostile.read_bytes())  # the file is the same


def is_a_link(layer, place):
    layer.rename(layer.with_name("away"))
    layer.symlink_to(place.secret)


@pytest.mark.parametrize("deceit", [names_a_data_file, is_a_link])
async def test_a_frozen_layer_that_became_hostile(deceit, scenario, eve, place):
    vm = await eve.start(scenario)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        before = await disk.layers()
        assert [one.source for one in before] == ["nbd", "qemu-img", "qemu-img"]
        place.opened()
        deceit(vm.disks[0].active.chain()[1].path, place)
        place.opened()
        after = await disk.layers()
    assert [one.source for one in after] == ["nbd", "nbd", "qemu-img"]  # QEMU itself knows better
    assert [one.map for one in after] == [one.map for one in before]
    assert not place.opened()


async def test_full_allocation_of_her_disk(scenario, eve, monkeypatch):
    """Works as ever; what reads the frozen image runs as the user of her QEMU."""
    vm = await eve.start(scenario)
    as_whom = []
    real = HandedFiles.command

    def command(self, *arguments):
        found = real(self, *arguments)
        as_whom.extend([self.user.uid] if self.descriptors and self.user else [])
        return found

    monkeypatch.setattr(HandedFiles, "command", command)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        assert (await disk.allocate(full=True)).reserved > 0
        [active, *_] = await disk.layers()
        assert active.map.where(data=True).total == disk.size
    assert set(as_whom) == {os.stat(vm.disks[0].active.path).st_uid}
    await vm.quit()
    found = [one for one in eve.directory.rglob("*") if "qmpblock" in one.name]
    assert found == []
