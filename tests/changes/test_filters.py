"""Where a filter of ours goes in a disk's way, and that it gets out of it."""

import pytest
from drawing import RUN, chain
from fake_objects import fake_vm

from qmpblock.changes.filters import Spot, put_back, put_filter, spot_in, take_out
from qmpblock.errors import CommandError, Error, InUseError

VD0 = "/machine/peripheral/vd0"
FILTER, VIEW = f"qmpblock-{RUN}-0-filter", f"qmpblock-{RUN}-0-view"


def stack(*filters):
    """Draw a disk with filters over its active layer, by (name, driver), the root first."""
    drawn, below = chain("d0", "d1"), "d0"
    for name, driver in reversed(filters):
        drawn.filter(name, driver, below)
        below = name
    return drawn.device(below)


@pytest.mark.parametrize(
    ("filters", "above", "below"),
    [
        ((), "", "d0"),
        ((("t", "throttle"),), "t", "d0"),
        ((("t", "throttle"), ("u", "throttle")), "u", "d0"),
        ((("t", "throttle"), ("c", "copy-on-read")), "t", "c"),
        ((("c", "copy-on-read"), ("t", "throttle")), "", "c"),
        # Its name has no place on a command line: then what we read is charged to it.
        ((("a b", "throttle"),), "", "a b"),
    ],
)
def test_it_goes_below_throttles_and_above_all_else(filters, above, below):
    device = stack(*filters).graph().device("vd0")
    assert spot_in(device) == Spot(VD0, above, below)


async def asked(tmp_path, drawn, act, **answers):
    """Return what is sent that changes anything."""
    async with fake_vm(tmp_path / "q", drawn, **answers) as (vm, qemu):
        plain = qemu.get
        qemu.get = lambda command, default=None: (
            {"return": ""}
            if command in ("qom-set", "human-monitor-command") and command not in answers
            else answers.get(command) or plain(command, default)
        )
        await act(vm)
        return [
            one["arguments"]
            for one in qemu.fake.seen
            if one["execute"] in ("qom-set", "human-monitor-command")
        ]


def drive(node):
    return {"path": VD0, "property": "drive", "value": node}


def reopened(node, option):
    return {"command-line": f'qemu-io {node} "reopen -o {option}"'}


async def test_it_becomes_the_drive_of_the_device_or_the_child_of_a_throttle(tmp_path):
    spot = Spot(VD0, "", "d0")
    put = await asked(tmp_path, stack(), lambda vm: put_filter(vm, spot, FILTER))
    assert put == [drive(FILTER)]
    spot = Spot(VD0, "t", "d0")
    drawn = stack(("t", "throttle"))
    put = await asked(tmp_path, drawn, lambda vm: put_filter(vm, spot, FILTER))
    assert put == [reopened("t", f"file={FILTER}")]


async def test_what_qemu_says_then_is_an_error(tmp_path):
    spot = Spot(VD0, "t", "d0")
    drawn = stack(("t", "throttle"))
    answer = {"human-monitor-command": {"return": "no such option"}}
    with pytest.raises(CommandError, match="no such option"):
        await asked(tmp_path, drawn, lambda vm: put_filter(vm, spot, FILTER), **answer)
    spot = Spot(VD0, "t t", "d0")
    with pytest.raises(Error, match="command line"):
        await asked(tmp_path, drawn, lambda vm: put_filter(vm, spot, FILTER))


async def test_a_disk_is_put_back_below_its_filters(tmp_path):
    drawn = stack()
    put = await asked(tmp_path, drawn, lambda vm: put_back(vm, drawn.graph().device("vd0"), "d1"))
    assert put == [drive("d1")]
    drawn = stack(("t", "throttle"), ("c", "copy-on-read"))
    put = await asked(tmp_path, drawn, lambda vm: put_back(vm, drawn.graph().device("vd0"), "d1"))
    assert put == [reopened("c", "file=d1")]


async def gone(tmp_path, drawn):
    return await asked(tmp_path, drawn, lambda vm: take_out(vm, FILTER, drawn.graph()))


async def test_whatever_lies_on_it_comes_to_lie_on_what_it_lies_on(tmp_path):
    assert await gone(tmp_path, stack((FILTER, "copy-before-write"))) == [drive("d0")]
    drawn = stack(("t", "throttle"), (FILTER, "copy-before-write"))
    assert await gone(tmp_path, drawn) == [reopened("t", "file=d0")]
    # Somebody has taken a snapshot below it, and another one above.
    drawn = chain("new", "d0").filter(FILTER, "copy-before-write", "new").device(FILTER)
    assert await gone(tmp_path, drawn) == [drive("new")]
    drawn = chain("d0").filter(FILTER, "copy-before-write", "d0")
    drawn.image("top", backing=FILTER, recorded="/i/d0").device("top")
    assert await gone(tmp_path, drawn) == [reopened("top", "backing=d0")]


async def test_it_is_gone_or_in_nobodys_way(tmp_path):
    assert await gone(tmp_path, stack()) == []
    drawn = stack().filter(FILTER, "copy-before-write", "d0")
    assert await gone(tmp_path, drawn) == []


async def test_what_somebody_reads_through_it_keeps_it(tmp_path):
    drawn = stack((FILTER, "copy-before-write")).filter(VIEW, "snapshot-access", FILTER)
    with pytest.raises(InUseError, match="export theirs"):
        await gone(tmp_path, drawn.export("theirs", VIEW))


async def test_it_is_named_by_what_we_gave_a_name(tmp_path):
    """Of a view that hangs in a tree (K37) only the root has one."""
    drawn = stack((FILTER, "copy-before-write")).filter("#block7", "snapshot-access", FILTER)
    drawn.filter("#block8", "blkdebug", "#block7").filter(VIEW, "blkdebug", "#block8")
    with pytest.raises(InUseError, match=f"{VIEW} is used by export theirs"):
        await gone(tmp_path, drawn.export("theirs", VIEW))
