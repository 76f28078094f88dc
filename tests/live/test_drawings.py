"""The eight drawings of 2011, each by policy alone; a sample of the rounds under stress."""

import pytest
from applying import (
    DROPPED,
    applied,
    apply_to,
    check_closed,
    one_disk,
    plan_of,
    planned,
    written,
)
from rounds import rounds
from seed_drawings import (
    check_content,
    check_drawing,
    drawings,
    in_format,
    layers_of,
    space,
    wanted_by,
)
from stressed_drawings import stressed_rounds

from qmpblock.testing.images import Tools, build

pytestmark = pytest.mark.live

_ROUNDS = 3  # of 200 in soak; each takes two seconds


def test_all_eight_drawings_are_tried():
    assert len({param.values[0].name for param in drawings()}) == 8
    assert len(drawings()) == 8 * 2 + 4


@pytest.mark.parametrize(("scenario", "fmt"), drawings())
async def test_a_drawing_by_policy_alone(scenario, fmt, start_qemu, invariant, vm_dir, qemu_binary):
    drawing = scenario.drawing
    built = await build(in_format(scenario, fmt), vm_dir / "images", Tools.of(qemu_binary))
    digest = await built.disks[0].active.digest(built.tools)
    vm = await start_qemu(built)
    policy = one_disk(vm, "vd0", **wanted_by(drawing))
    path = written(vm_dir, policy)
    await check_content(vm, drawing)
    await invariant.begin(vm)
    [plan] = await planned(path)
    await invariant.verify(vm)  # a plan changes nothing

    await invariant.begin(vm)
    if drawing.independent:
        invariant.expect(DROPPED)
    [result] = await applied(path)
    assert result["state"] == "done"
    assert result["allocated"] + result["reserved"] >= plan["move"] + plan["reserve"]
    assert result["dropped"] == plan["leaving"]
    check_drawing(await layers_of(vm), drawing)

    # What the plan drew is what came of it; and there is nothing left to do.
    [again] = await plan_of(policy)
    if fmt == "raw":
        [wanted], [now] = plan["wanted"]["layers"], again["today"]["layers"]
        assert space(now["extents"]) == space(wanted["extents"])
    else:
        assert again["today"] == plan["wanted"]
    assert again["steps"] == []
    [result] = await apply_to(policy)
    assert result["state"] == "nothing"
    check_drawing(await layers_of(vm), drawing)
    await check_content(vm, drawing)

    await invariant.verify(vm)
    await vm.quit()
    await check_closed(built, digest, alone=drawing.independent)


async def test_drawings_while_the_guest_writes(start_qemu, vm_dir, qemu_binary):
    _, chance = rounds(_ROUNDS)
    print(await stressed_rounds(start_qemu, vm_dir, qemu_binary, chance, _ROUNDS))
