"""Full allocation of running disks of every format, while the guest writes."""

import pytest
from allocating import (
    STAGED,
    disks,
    ended,
    has_subclusters,
    is_raw_inside,
    started,
    without_space,
)

import qmpblock
from qmpblock.errors import DisconnectedError, UnsupportedError
from qmpblock.policy.file import DiskPolicy
from qmpblock.policy.look import look
from qmpblock.ranges import Ranges
from qmpblock.sizes import Amount
from qmpblock.testing.images import Tools

pytestmark = pytest.mark.live

_LARGEST = 256 << 20  # bytes of a disk that is made full in a test


def refusal(scenario, disk, version):
    """Return why a disk cannot be made full; None if it can."""
    image = disk.active
    if len(disk.images) > 1 and has_subclusters(image) and version < (10, 0, 0):
        return "subclusters"
    if is_raw_inside(image):
        return None
    if image.format not in STAGED:
        return image.format
    return None


def has_only_places(image):
    """Whether the image has a place for each cluster in a file that is sparse."""
    return dict(image.options).get("preallocation") == "metadata"


@pytest.mark.parametrize(("scenario", "name"), disks(lambda _, chain: chain[0].size <= _LARGEST))
async def test_every_disk(scenario, name, start_qemu, invariant, vm_dir, qemu_binary):
    vm, every = await started(scenario, name, start_qemu, vm_dir, qemu_binary)
    subject = every[name]
    await invariant.begin(vm)
    expected = refusal(scenario, subject.disk.spec, vm.version)
    async with qmpblock.connect(vm.monitor_path) as controller:
        disk = await controller.disk(subject.path)
        if expected is not None:
            with pytest.raises(UnsupportedError, match=expected) as caught:
                await disk.allocate(full=True)
            assert caught.value.standing == "nothing was touched"
        else:
            result = await disk.allocate(full=True)
            assert (result.held > 0) <= (not is_raw_inside(subject.disk.spec.active))
            doubts = [text for text in result.warnings if "dirty bitmap" not in text]
            assert len(doubts) == has_only_places(subject.disk.spec.active), doubts
        await subject.keeps_writing()
    await invariant.verify(vm)
    await ended(vm, every)
    if expected is None:
        left = await without_space(subject, Tools.of(qemu_binary))
        assert left == Ranges(), "no host space"


@pytest.mark.parametrize("verb", ["allocate", "make_room"])
async def test_where_qemu_has_died_that_is_why(verb, start_qemu, build_images, invariant):
    """Of a process that has ended nothing can be seen: the file is not what is wrong."""
    built = await build_images("about: Raw.\nimages: [{format: raw, size: 4M}]\n")
    vm = await start_qemu(built)
    invariant.forget(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        real = controller.monitor._execute

        async def execute(*arguments):
            found = await real(*arguments)
            if arguments[-2] == "query-block-exports":  # the last thing that is looked at
                await vm.kill()
            return found

        controller.monitor._execute = execute
        with pytest.raises(DisconnectedError):
            await (disk.allocate(full=True) if verb == "allocate" else disk.make_room(1 << 20))


async def test_where_qemu_has_died_that_is_why_a_policy_cannot_be_planned(
    start_qemu, build_images, invariant
):
    built = await build_images("about: Raw.\nimages: [{format: raw, size: 4M}]\n")
    vm = await start_qemu(built)
    invariant.forget(vm)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        wanted = DiskPolicy(vm.monitor_path, "vd0", allocation="full", keep_free=Amount(1 << 20))
        real, sent = controller.monitor._execute, []

        async def execute(*arguments):
            found = await real(*arguments)
            sent.append(arguments[-2])
            if len(sent) == last:
                await vm.kill()
            return found

        controller.monitor._execute, last = execute, 0
        await look(disk, wanted, undo=False)
        last = len(sent)
        sent.clear()
        with pytest.raises(DisconnectedError):
            await look(disk, wanted, undo=False)
        assert len(sent) == last  # all was seen by then, but for the file
