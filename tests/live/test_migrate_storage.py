"""To other storage: the guest stays in its QEMU, and its disks go over, all at one instant."""

import json

import pytest
from chains import cli
from disturbed import nothing_of_ours
from migrating import machine, spec, stressed

from qmpblock.testing import Tools, build, check_acknowledged, parse_scenario

pytestmark = pytest.mark.live

ALLOCATED = {"full": "allocated in full", "same": "allocated like the disk"}


@pytest.fixture
def begin(start_qemu, vm_dir, qemu_binary):
    """Give what starts a VM whose guest writes to all of its disks."""

    async def start(text):
        built = await build(parse_scenario(text, "vm"), vm_dir / "vm", Tools.of(qemu_binary))
        return await stressed(await start_qemu(built, guest=True), 100)

    return start


async def test_two_disks_go_over_and_the_guest_stays(
    begin, vm_dir, invariant, qemu_binary, tmp_path
):
    vm = await begin(machine(2))
    invariant.forget(vm)
    files = [vm_dir / "new0.qcow2", vm_dir / "new1.raw"]
    words = ("migrate", vm.monitor_path, "--storage-only")
    pairs = (f"vd0={files[0]}", f"vd1={files[1]}")
    code, out, err = await cli(*words, *pairs, "--dry-run")
    assert code == 0, err
    assert "nothing was copied (--dry-run)" in out
    assert not any(file.exists() for file in files)
    code, out, err = await cli(*words, *pairs, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["point"] == "pivot"
    assert [one["target"] for one in told["disks"]] == [str(file) for file in files]
    await nothing_of_ours(vm)
    ends = [await vm.guest.stop_stress(number) for number in range(2)]
    assert all((end.bad, end.errors) == (0, 0) for end in ends)
    assert [await vm.guest.check(number) > 0 for number in range(2)] == [True, True]
    await vm.quit()
    tools = Tools.of(qemu_binary)
    for number, file in enumerate(files):
        raw = tmp_path / "content"
        await tools.run(tools.img, "convert", "-f", "qcow2", "-O", "raw", str(file), str(raw))
        its = spec(number, rate=100)
        area = raw.read_bytes()[its.offset : its.offset + its.length]
        assert check_acknowledged(area, its, ends[number].acked, ends[number].issued).ok


@pytest.mark.parametrize("how", ["full", "same"])
async def test_in_the_format_that_is_asked_for(how, begin, vm_dir, invariant):
    vm = await begin(machine())
    invariant.forget(vm)
    target = vm_dir / "new"
    words = ("--format", "raw", "--allocation", how)
    code, out, err = await cli(
        "migrate", vm.monitor_path, "--storage-only", f"vd0={target}", *words
    )
    assert code == 0, err
    assert f"vd0: copied to {target}, raw, 64M, {ALLOCATED[how]}" in out
    taken = target.stat().st_blocks * 512
    assert taken >= 64 << 20 if how == "full" else 8 << 20 <= taken < 64 << 20


@pytest.mark.parametrize(
    "words",
    [
        ["--storage-only"],
        ["--storage-only", "--spawn", "vd0=new"],
        ["--storage-only", "--memory-only", "vd0=new"],
        ["--storage-only", "--quit-source", "vd0=new"],
        ["--storage-only", "--layers", "top", "--same-backing", "vd0=new"],
        ["there", "--format", "raw"],
        ["there", "elsewhere"],
    ],
    ids=" ".join,
)
async def test_what_does_not_go_together(words):
    code, _, err = await cli("migrate", "/nowhere.qmp", *words)
    assert code == 2
    assert "Usage" in err
