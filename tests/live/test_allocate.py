"""Thin allocation of running disks, of every shape of chain, while the guest writes."""

import pytest
from allocating import area_of, check_thin, disks, ended, has_subclusters, started

import qmpblock
from qmpblock.errors import UnsupportedError

pytestmark = pytest.mark.live


@pytest.mark.parametrize(("scenario", "name"), disks(lambda _, chain: len(chain) > 1))
async def test_every_chain(scenario, name, start_qemu, invariant, vm_dir, qemu_binary):
    vm, every = await started(scenario, name, start_qemu, vm_dir, qemu_binary)
    subject = every[name]
    image = subject.disk.spec.active
    await invariant.begin(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk(subject.path)
        before = await disk.map()
        if has_subclusters(image) and vm.version < (10, 0, 0):
            with pytest.raises(UnsupportedError, match="subclusters"):
                await disk.allocate()
        else:
            result = await disk.allocate()
            after = await disk.map()
            cluster = disk.chain.active.node.cluster_size or 512
            check_thin(before, after, cluster, disk.size, area_of(subject, cluster))
            assert (result.rounded_offset, result.rounded_length) == (0, disk.size)
            again = await disk.allocate()
            assert (again.allocated, again.reserved) == (0, 0)
        await subject.keeps_writing()
    assert subject.changed_files() == set(), "a frozen layer has changed"
    await invariant.verify(vm)
    await ended(vm, every)
