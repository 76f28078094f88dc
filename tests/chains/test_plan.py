"""What a snapshot, stream or commit will do to a chain, and what is refused before it begins."""

import json

import pytest
from drawing import MIB, Drawing, bitmap, chain
from hypothesis import given
from hypothesis import strategies as st

from qmpblock.chains.plan import (
    Hidden,
    Merge,
    NewBitmap,
    check_idle,
    plan_commit,
    plan_snapshot,
    plan_stream,
)
from qmpblock.errors import BusyError, InUseError, NotFoundError, RequestError, UnsupportedError
from qmpblock.graph.options import key_secret
from qmpblock.graph.places import FileId, Place


def stream(drawing, top=None, base=None):
    graph = drawing.graph()
    return plan_stream(graph, graph.device("vd0"), top, base)


def commit(drawing, top=None, base=None):
    graph = drawing.graph()
    return plan_commit(graph, graph.device("vd0"), top, base)


def snapshot(drawing, fmt="qcow2"):
    graph = drawing.graph()
    return plan_snapshot(graph, graph.device("vd0"), fmt)


PLANS = {
    "stream": lambda drawing: stream(drawing),
    "commit": lambda drawing: commit(drawing),
    "snapshot": lambda drawing: snapshot(drawing),
}
CHANGES = {
    "commit of the active layer": lambda drawing: commit(drawing, base="@1"),
    "commit of a middle layer": lambda drawing: commit(drawing, top="@1", base="@2"),
    "stream into a middle layer": lambda drawing: stream(drawing, top="@1"),
}


def names(layers):
    return [layer.node.name for layer in layers]


# which layers


def test_stream_takes_everything_below_the_active_layer():
    plan = stream(chain("d0", "d1", "d2"))
    assert plan.top.node.name == "d0"
    assert names(plan.leaving) == ["d1", "d2"]
    assert plan.base is None
    assert plan.backing_name is None


def test_stream_stops_above_its_base():
    plan = stream(chain("d0", "d1", "d2", "d3"), base="@3")
    assert names(plan.leaving) == ["d1", "d2"]
    assert plan.backing_name == "/i/d3"


def test_stream_into_a_middle_layer():
    plan = stream(chain("d0", "d1", "d2", "d3"), top="d1", base="/i/d3")
    assert plan.top.node.name == "d1"
    assert names(plan.leaving) == ["d2"]


def test_commit_takes_everything_into_the_lowest():
    plan = commit(chain("d0", "d1", "d2"))
    assert names(plan.leaving) == ["d0", "d1"]
    assert plan.base.node.name == "d2"
    assert plan.pivots
    assert plan.backing_name is None  # nobody lies on the base afterwards


def test_commit_of_middle_layers_names_who_lies_on_the_base():
    plan = commit(chain("d0", "d1", "d2", "d3"), top="@1", base="@3")
    assert names(plan.leaving) == ["d1", "d2"]
    assert plan.above.node.name == "d0"
    assert not plan.pivots
    assert plan.backing_name == "/i/d3"


@pytest.mark.parametrize(
    ("plan", "layers"),
    [
        (lambda d: stream(d), ("d0",)),
        (lambda d: stream(d, base="@1"), ("d0", "d1")),
        (lambda d: stream(d, top="@1", base="@2"), ("d0", "d1", "d2")),
        (lambda d: stream(d, top="@1"), ("d0", "d1")),
        (lambda d: commit(d), ("d0",)),
        (lambda d: commit(d, top="@1"), ("d0", "d1")),
        (lambda d: commit(d, base="@0"), ("d0", "d1")),
    ],
)
def test_what_is_so_already_is_nothing_to_do(plan, layers):
    """Also beside a job: to say so touches nothing."""
    drawing = chain(*layers).job("backup0", "backup", "running", layers[0])
    found = plan(drawing)
    assert found.leaving == ()
    assert found.hidden == ()


@pytest.mark.parametrize(
    ("plan", "layers"),
    [
        (lambda d: stream(d, top="@1", base="@1"), 3),
        (lambda d: stream(d, top="@2", base="@0"), 3),
        (lambda d: stream(d, base="@0"), 3),
        (lambda d: commit(d, top="@2", base="@1"), 3),
        (lambda d: commit(d, top="@1", base="@0"), 3),
        (lambda d: commit(d, top="@1", base="@1"), 3),
    ],
)
def test_the_wrong_order_is_refused_with_the_right_one(plan, layers):
    with pytest.raises(RequestError, match="does not lie below") as caught:
        plan(chain(*(f"d{n}" for n in range(layers))))
    assert caught.value.standing == "nothing was touched"
    assert caught.value.remedy.index("@0 /i/d0") < caught.value.remedy.index("@2 /i/d2")


@pytest.mark.parametrize("option", ["top", "base"])
@pytest.mark.parametrize("plan", [stream, commit])
def test_an_unknown_layer_is_refused(plan, option):
    with pytest.raises(NotFoundError, match="nosuch"):
        plan(chain("d0", "d1"), **{option: "nosuch"})


@given(st.integers(1, 6), st.data())
def test_order_decides_alone(length, data):
    """For any two layers: refused, or exactly those between leave."""
    drawing = chain(*(f"d{n}" for n in range(length)))
    top = data.draw(st.integers(0, length - 1))
    base = data.draw(st.integers(0, length - 1))
    for plan, below in ((stream, top + 1), (commit, top)):
        if base <= top:
            with pytest.raises(RequestError):
                plan(drawing, f"@{top}", f"@{base}")
        else:
            leaving = plan(drawing, f"@{top}", f"@{base}").leaving
            assert [layer.depth for layer in leaving] == list(range(below, base))


# sizes


def test_a_base_larger_than_the_disk_is_refused():
    """The guest's disk would grow at the pivot."""
    drawing = chain("d0", "d1")
    drawing.nodes["d1"]["image"]["virtual-size"] = 65 * MIB
    with pytest.raises(RequestError, match="another size") as caught:
        commit(drawing)
    assert "block_resize" in caught.value.remedy


def test_a_larger_base_of_middle_layers_is_none_of_the_guests_business():
    drawing = chain("d0", "d1", "d2")
    drawing.nodes["d2"]["image"]["virtual-size"] = 65 * MIB
    assert names(commit(drawing, top="@1").leaving) == ["d1"]


def test_a_smaller_base_is_grown_by_qemu():
    drawing = chain("d0", "d1")
    drawing.nodes["d1"]["image"]["virtual-size"] = 63 * MIB
    assert commit(drawing).pivots


def sized(*sizes):
    drawing = Drawing()
    for depth in reversed(range(len(sizes))):
        below = f"d{depth + 1}" if depth + 1 < len(sizes) else None
        drawing.image(f"d{depth}", size=sizes[depth] * MIB, backing=below)
    return drawing.device("d0")


@pytest.mark.parametrize(
    ("sizes", "hidden"),
    [
        ((64, 64, 64), []),
        ((64, 32, 64), [(1, 32, 64)]),
        ((64, 32, 48), [(1, 32, 48)]),
        ((48, 32, 64), [(1, 32, 48)]),
        ((64, 32, 32), []),  # past the base's end there are zeros anyhow
        ((64, 64, 32), []),
        ((32, 64, 64), []),  # past the disk's end nobody reads
        ((32, 32, 64), []),
        ((64, 32, 16, 64), [(1, 32, 64), (2, 16, 64)]),
        ((64, 64, 16, 64), [(2, 16, 64)]),
        ((64, 32, 64, 64), [(1, 32, 64)]),
        ((64, 0, 64), [(1, 0, 64)]),
    ],
)
def test_what_short_layers_hide(sizes, hidden):
    """Facts 7b; into the active layer, by stream and by commit of all that lies between."""
    wanted = tuple(Hidden(depth, start * MIB, stop * MIB) for depth, start, stop in hidden)
    last = f"@{len(sizes) - 1}"
    assert stream(sized(*sizes), base=last).hidden == wanted
    assert commit(sized(*sizes), top="@1", base=last).hidden == wanted


@given(st.lists(st.integers(0, 8), min_size=3, max_size=6))
def test_hidden_is_what_appears_without_them(sizes):
    """By a model: which bytes read as zeros with the short layers, and from the base without."""
    last = len(sizes) - 1
    marked = {
        (one.depth, unit)
        for one in stream(sized(*sizes), base=f"@{last}").hidden
        for unit in range(one.start // MIB, one.stop // MIB)
    }
    for unit in range(max(sizes)):
        if unit >= sizes[0] or unit >= sizes[last]:
            assert not any((depth, unit) in marked for depth in range(last))
            continue  # the guest does not see it, or the base has nothing there
        short = {depth for depth in range(1, last) if sizes[depth] <= unit}
        assert {depth for depth in range(last) if (depth, unit) in marked} == short


def test_with_nothing_left_below_nothing_appears():
    assert stream(sized(64, 32, 64)).hidden == ()


def test_a_pivot_leaves_nobody_above_for_whom_it_appears():
    assert commit(sized(64, 32, 64)).hidden == ()


@pytest.mark.parametrize(
    "plan",
    [
        lambda d: stream(d, top="@1", base="@3"),
        lambda d: commit(d, top="@2", base="@3"),
    ],
)
def test_what_is_hidden_under_a_middle_layer_is_refused(plan):
    """Only in the active layer zeros can be made explicit."""
    with pytest.raises(
        UnsupportedError, match=r"@2 /i/d2 is shorter .* old data of\s*@3"
    ) as caught:
        plan(sized(64, 64, 32, 64))
    assert "into the active layer" in caught.value.remedy


# who else uses them


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_job_on_the_disk_is_in_the_way(plan):
    with pytest.raises(BusyError, match=r"backup0 \(backup, running\) runs on vd0") as caught:
        plan(chain("d0", "d1").job("backup0", "backup", "running", "d0"))
    assert "whoever started it" in caught.value.remedy


def test_a_job_that_is_paused_is_not_to_be_waited_for():
    with pytest.raises(BusyError, match=r"backup0 \(backup, paused\) runs on vd0") as caught:
        stream(chain("d0", "d1").job("backup0", "backup", "paused", "d0"))
    assert "does not end by itself" in caught.value.remedy


def test_a_job_of_ours_may_be_recovered():
    drawing = chain("d0", "d1").job("qmpblock-deadbeef-stream", "stream", "running", "d1")
    with pytest.raises(BusyError) as caught:
        stream(drawing)
    assert "qmpblock recover" in caught.value.remedy


def test_a_job_on_another_disk_is_not():
    drawing = chain("d0", "d1").image("e0").device("e0", "vd1").job("b", "backup", "running", "e0")
    check_idle(drawing.graph().device("vd0"))
    assert stream(drawing).leaving


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("how", ["one node", "two nodes of one file"])
def test_a_layer_of_another_disk_is_not_changed(change, how):
    """QEMU silently rewires both chains."""
    drawing = chain("d0", "d1", "d2")
    if how == "one node":
        drawing.image("e0", backing="d1")
    else:
        drawing.image("x2", file="/i/d2").image("x1", file="/i/d1", backing="x2")
        drawing.image("e0", backing="x1")
    drawing.device("e0", "vd1")
    with pytest.raises(InUseError, match=r"@1 /i/d1 is also a layer of vd1") as caught:
        change(drawing)
    assert caught.value.exit_code == 2
    assert caught.value.standing == "nothing was touched"


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_under_a_node_that_no_disk_uses_is_not_changed(change):
    """An overlay that somebody keeps for later, a backup's, say."""
    drawing = chain("d0", "d1", "d2").image("later", backing="d1")
    with pytest.raises(InUseError, match="used by the node later") as caught:
        change(drawing)
    assert "blockdev-del" in caught.value.remedy


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_a_second_node_uses_is_not_changed(change):
    """A format node of somebody's right on the protocol node of ours."""
    drawing = chain("d0", "d1", "d2")
    drawing._node("twin", "qcow2", 64 * MIB, "/i/d1", {"file": "d1-f"})
    with pytest.raises(InUseError, match="used by the node twin"):
        change(drawing)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("drivers", [("throttle",), ("blkdebug",), ("throttle", "blkdebug")])
@pytest.mark.parametrize("where", ["over the file", "over the image", "over the disk"])
def test_filters_of_ones_own_are_nobody_else(change, drivers, where):
    edges = {"throttle": "file", "blkdebug": "image"}
    drawing = Drawing().image("d2")
    below = "d2"
    for depth in (1, 0):
        drawing.image(f"d{depth}", backing=below, recorded=f"/i/d{depth + 1}")
        below = f"d{depth}"
        if where == "over the file":
            under = f"d{depth}-f"
            for number, driver in enumerate(drivers):
                drawing.filter(f"f{depth}{number}", driver, under, edges[driver])
                under = f"f{depth}{number}"
            drawing.nodes[f"d{depth}"]["children"][0]["node-name"] = under
        elif where == "over the image" or depth == 0:
            for number, driver in enumerate(drivers):
                drawing.filter(f"f{depth}{number}", driver, below, edges[driver])
                below = f"f{depth}{number}"
    drawing.device(below)
    assert names(drawing.graph().device("vd0").chain.layers) == ["d0", "d1", "d2"]
    assert change(drawing).leaving


def test_filters_do_not_hide_somebody_else():
    drawing = chain("d0", "d1", "d2").filter("f", "throttle", "d1").image("later", backing="f")
    with pytest.raises(InUseError, match="used by the node later"):
        commit(drawing)


def test_what_a_stream_only_reads_may_be_shared():
    """A golden image: two disks on one base is what streams are for."""
    drawing = chain("d0", "d1").image("e0", backing="d1").device("e0", "vd1")
    assert names(stream(drawing).leaving) == ["d1"]


def test_relative_names_of_two_disks_may_be_one_file():
    """Where they cannot be seen; where they can, they are what they are."""
    drawing = Drawing().image("d1", file="base").image("d0", backing="d1").device("d0")
    drawing.image("e1", file="base").image("e0", backing="e1").device("e0", "vd1")
    with pytest.raises(InUseError, match="also a layer of vd1, by the node e1-f"):
        commit(drawing)
    graph = drawing.graph()
    for number, refused in ((1, True), (2, False)):
        places = {
            f"{name}-f": Place(FileId(1, inode), f"/{name}", f"/{name}", f"/{name}")
            for name, inode in (("d0", 7), ("d1", 1), ("e0", 8), ("e1", number))
        }
        if refused:
            with pytest.raises(InUseError, match="also a layer of vd1"):
                plan_commit(graph, graph.device("vd0"), places=places)
        else:
            assert plan_commit(graph, graph.device("vd0"), places=places).leaving


# formats and encryption


@pytest.mark.parametrize("fmt", ["vmdk", "raw", "qcow"])
def test_a_header_that_cannot_record_is_not_given_another_backing_image(fmt):
    drawing = Drawing().image("d2").image("d1", backing="d2").image("d0", fmt, backing="d1")
    drawing.device("d0")
    with pytest.raises(UnsupportedError, match=rf"@0 /i/d0 .* header of a {fmt} image"):
        stream(drawing, base="@2")
    with pytest.raises(UnsupportedError, match="header"):
        commit(drawing, top="@1")
    assert commit(drawing).pivots  # nobody records anything


def test_qed_can_record():
    drawing = Drawing().image("d1").image("d0", "qed", backing="d1").device("d0")
    assert stream(drawing).leaving


def mixed(*encrypted):
    """Draw a chain whose layers, the active one first, are encrypted or not."""
    drawing = Drawing()
    for depth in reversed(range(len(encrypted))):
        below = f"d{depth + 1}" if depth + 1 < len(encrypted) else None
        drawing.image(f"d{depth}", backing=below, encrypted=encrypted[depth])
    return drawing.device("d0")


@pytest.mark.parametrize(
    ("layers", "plan"),
    [
        ((False, True), lambda d: stream(d)),
        ((False, False, True), lambda d: stream(d)),
        ((True, False, True), lambda d: stream(d, top="@1")),
        ((True, False), lambda d: commit(d)),
        ((False, True, False), lambda d: commit(d)),
        ((True, True, False), lambda d: commit(d, top="@1")),
    ],
)
def test_no_plaintext_of_an_encrypted_layer_is_stored(layers, plan):
    with pytest.raises(UnsupportedError, match="plaintext"):
        plan(mixed(*layers))


@pytest.mark.parametrize(
    ("layers", "plan"),
    [
        ((True, True), lambda d: stream(d)),
        ((True, False), lambda d: stream(d)),
        ((False, True), lambda d: commit(d)),
        ((False, False, True), lambda d: stream(d, base="@2")),  # the encrypted one stays
        ((True, False, False), lambda d: commit(d, top="@1")),
    ],
)
def test_what_ends_encrypted_or_was_not_is_allowed(layers, plan):
    assert plan(mixed(*layers)).leaving


def keyed(filename):
    drawing = Drawing().image("d0", encrypted=True, filename=filename).device("d0")
    return drawing.graph().device("vd0").chain.active


@pytest.mark.parametrize(
    "options",
    [
        {"driver": "luks", "key-secret": "s0"},
        {"driver": "qcow2", "encrypt.key-secret": "s0", "encrypt.format": "luks"},
        {"driver": "qcow2", "encrypt": {"format": "luks", "key-secret": "s0"}},
    ],
)
def test_the_secret_of_an_encrypted_layer(options):
    assert key_secret(keyed(f"json:{json.dumps(options)}")) == "s0"


@pytest.mark.parametrize(
    "filename",
    [
        "/i/d0",
        "json:{}",
        "json:[]",
        "json:5",
        "json:{torn",
        'json:{"key-secret": ""}',
        'json:{"key-secret": 5, "encrypt": "x"}',
        'json:{"encrypt": {"key-secret": null}}',
    ],
)
def test_without_its_secret_an_encrypted_layer_is_refused(filename):
    with pytest.raises(UnsupportedError, match="plaintext"):
        key_secret(keyed(filename))


def test_an_overlay_is_encrypted_as_the_disk_is():
    drawing = Drawing().image(
        "d0", encrypted=True, filename='json:{"encrypt.key-secret": "s0", "driver": "qcow2"}'
    )
    drawing.device("d0")
    assert snapshot(drawing).key_secret == "s0"
    with pytest.raises(UnsupportedError, match="qed cannot be"):
        snapshot(drawing, "qed")
    assert snapshot(chain("d0")).key_secret is None


@pytest.mark.parametrize("fmt", ["raw", "vmdk", "\x1b[2J"])
def test_formats_of_overlays(fmt):
    with pytest.raises(UnsupportedError, match="qcow2 and qed can") as caught:
        snapshot(chain("d0"), fmt)
    assert "\x1b" not in str(caught.value)
    assert snapshot(chain("d0"), "qed").active.node.name == "d0"


# dirty bitmaps


def test_stream_merges_what_both_have():
    drawing = chain("d0", "d1", "d2")
    drawing.nodes["d0"]["dirty-bitmaps"] = [bitmap("a"), bitmap("broken", bad=True)]
    drawing.nodes["d1"]["dirty-bitmaps"] = [bitmap("a"), bitmap("b")]
    drawing.nodes["d2"]["dirty-bitmaps"] = [
        bitmap("a", recording=False),
        bitmap("a2", bad=True),
        bitmap("broken"),
    ]
    plan = stream(drawing)
    assert plan.merges == (Merge("d0", "d1", "a"), Merge("d0", "d2", "a"))
    assert [warning.split(" of ")[0] for warning in plan.warnings] == [
        "the dirty bitmap b",
        "the dirty bitmap a2",
        "the dirty bitmap broken",
    ]


def test_stream_keeps_what_stays():
    """The base's bitmaps and the top's are not touched, and nothing is said of them."""
    drawing = chain("d0", "d1", "d2")
    for name in ("d0", "d2"):
        drawing.nodes[name]["dirty-bitmaps"] = [bitmap("a")]
    plan = stream(drawing, base="@2")
    assert plan.merges == ()
    assert plan.warnings == ()


def test_commit_has_recording_go_on_in_the_base():
    drawing = chain("d0", "d1", "d2")
    drawing.nodes["d0"]["dirty-bitmaps"] = [
        bitmap("a", 65536, persistent=True),
        bitmap("b", 512),
        bitmap("off", recording=False),
        bitmap("bad", bad=True),
        bitmap("there"),
        bitmap("stopped"),
    ]
    drawing.nodes["d1"]["dirty-bitmaps"] = [bitmap("a", 4096), bitmap("c")]
    drawing.nodes["d2"]["dirty-bitmaps"] = [bitmap("there"), bitmap("stopped", recording=False)]
    plan = commit(drawing)
    assert plan.bitmaps == (
        NewBitmap("d2", "a", 65536, True),
        NewBitmap("d2", "b", 512, False),
        NewBitmap("d2", "c", 65536, False),
    )
    lost = [warning.split()[3] for warning in plan.warnings]
    assert lost == ["off", "bad", "stopped"]


def test_a_bitmap_of_a_broken_one_in_the_base_ends():
    drawing = chain("d0", "d1")
    drawing.nodes["d0"]["dirty-bitmaps"] = [bitmap("a")]
    drawing.nodes["d1"]["dirty-bitmaps"] = [bitmap("a", bad=True)]
    plan = commit(drawing)
    assert plan.bitmaps == ()
    assert len(plan.warnings) == 1


def test_a_raw_base_stores_no_bitmaps():
    drawing = Drawing().image("d1", "raw").image("d0", backing="d1").device("d0")
    drawing.nodes["d0"]["dirty-bitmaps"] = [bitmap("a", persistent=True), bitmap("b")]
    plan = commit(drawing)
    assert [(one.name, one.persistent) for one in plan.bitmaps] == [("a", False), ("b", False)]
    assert len(plan.warnings) == 1
    assert "raw cannot store it" in plan.warnings[0]


@pytest.mark.parametrize(
    "plan",
    [
        lambda d: commit(d, top="@1"),
        lambda d: commit(d),
        lambda d: stream(d),
        lambda d: stream(d, top="@0"),
    ],
)
def test_a_bitmap_in_use_must_not_go(plan):
    """QEMU aborts when its node goes."""
    drawing = chain("d0", "d1", "d2")
    drawing.nodes["d0"]["dirty-bitmaps"] = [bitmap("b")]
    drawing.nodes["d1"]["dirty-bitmaps"] = [bitmap("b", busy=True)]
    with pytest.raises(BusyError, match=r"b of d1 .* QEMU aborts"):
        plan(drawing)


def test_a_bitmap_in_use_that_stays_is_nobodys_business():
    drawing = chain("d0", "d1", "d2")
    drawing.nodes["d2"]["dirty-bitmaps"] = [bitmap("b", busy=True)]
    assert commit(drawing, top="@1").leaving
    assert stream(drawing, base="@2").leaving


def test_recording_goes_on_in_an_overlay():
    drawing = chain("d0", "d1")
    drawing.nodes["d0"]["dirty-bitmaps"] = [
        bitmap("a", 512, persistent=True),
        bitmap("b"),
        bitmap("off", recording=False),
        bitmap("bad", persistent=True, bad=True),
    ]
    drawing.nodes["d1"]["dirty-bitmaps"] = [bitmap("old")]
    plan = snapshot(drawing)
    assert plan.bitmaps == (NewBitmap("", "a", 512, True), NewBitmap("", "b", 65536, False))
    assert plan.warnings == ()
    qed = snapshot(drawing, "qed")
    assert [(one.name, one.persistent) for one in qed.bitmaps] == [("a", False), ("b", False)]
    assert len(qed.warnings) == 1
    assert "qed cannot store it" in qed.warnings[0]


def test_hostile_names_are_escaped():
    drawing = chain("d0", "d1", "d2")
    drawing.nodes["d1"]["file"] = "/i/\x1b[2J"
    drawing.nodes["d1"]["dirty-bitmaps"] = [bitmap("\x1b[1m")]
    assert "\x1b" not in "".join(stream(drawing).warnings)
    with pytest.raises(RequestError) as caught:
        stream(drawing, base="@0")
    assert "\x1b" not in str(caught.value)
