"""The block graph, from replies recorded of three QEMUs (tests/data/graph/record.py)."""

import contextlib
import copy
import json
import time
from pathlib import Path

import drawing
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpblock.errors import AmbiguousError, Error, GraphError, NotFoundError, RequestError
from qmpblock.graph.builder import Replies, build
from qmpblock.graph.model import Bitmap

RECORDINGS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "data" / "graph").glob("*.json"))
}


def recorded(version, moment, **changes):
    return build(Replies(**{**RECORDINGS[version][moment], **changes}))


@pytest.fixture(params=sorted(RECORDINGS))
def version(request):
    return request.param


def test_recordings_cover_both_sources_of_edges():
    """Both must stay recorded: with `children` (QEMU 10.1 and newer) and without."""
    have = {"children" in r["quiet"]["nodes"][0] for r in RECORDINGS.values()}
    assert have == {True, False}


def test_chain_under_two_filters(version):
    chain = recorded(version, "quiet").device("vd0").chain
    assert [(node.name, node.driver) for node in chain.filters] == [
        ("cor", "copy-on-read"),
        ("thr", "throttle"),
    ]
    assert [(x.depth, x.format, x.file, x.size) for x in chain.layers] == [
        (0, "qcow2", "active.qcow2", 8 << 20),
        (1, "qcow2", "middle.qcow2", 8 << 20),
        (2, "raw", "base.raw", 8 << 20),
    ]
    assert chain.root.name == "cor"
    assert chain.active.node.name == "d0"
    assert [x.storage.driver for x in chain.layers] == ["file"] * 3
    assert chain.levels == (0, 1, 2)
    assert chain.level_sizes == (8 << 20,) * 3
    assert chain.layers[0].node.cluster_size == 65536
    assert chain.layers[1].node.backing_filename == "base.raw"


def test_devices_of_every_kind(version):
    graph = recorded(version, "quiet")
    by_name = {device.name: device for device in graph.devices}
    assert by_name["sd0"].drive == "drv1"
    assert by_name["sd0"].qom_path == "/machine/peripheral/sd0"
    assert by_name["ide0-hd0"].id is None
    assert by_name["ide0-hd0"].qom_path.startswith("/machine/unattached/device[")
    assert by_name["nv0"].chain.layers[1].file == "other.raw"
    anonymous = graph.device("df")
    assert anonymous.id is None
    assert anonymous.name.startswith("/machine/peripheral-anon/device[")
    assert by_name["cdx"].chain is None
    assert "unused" not in by_name  # a -drive that no guest device uses is no disk


def test_a_device_with_an_empty_tray_is_no_disk(version):
    graph = recorded(version, "quiet")
    empty = [one.name for one in graph.devices if one not in graph.disks()]
    assert empty == ["cdx"]
    assert all(one.chain.layers for one in graph.disks())


def test_data_file(version):
    layer = recorded(version, "quiet").device("df").chain.active
    assert layer.file == "withdata.qcow2"
    assert layer.data_file.filename == "data.raw"


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("vd0", "vd0"),
        ("/machine/peripheral/vd0", "vd0"),
        ("/machine/peripheral/vd0/virtio-backend", "vd0"),
        ("cor", "vd0"),
        ("thr", "vd0"),
        ("d0", "vd0"),
        ("active.qcow2", "vd0"),
        ("drv1", "sd0"),
        ("legacy.raw", "sd0"),
        ("nv", "nv0"),
    ],
)
def test_a_disk_goes_by_each_of_its_names(version, name, device):
    assert recorded(version, "quiet").device(name).name == device


def test_unknown_disk_lists_those_that_there_are(version):
    with pytest.raises(NotFoundError) as caught:
        recorded(version, "quiet").device("vda")
    assert caught.value.exit_code == 2
    assert any(line.startswith("vd0 (node d0") for line in caught.value.candidates)
    assert "cdx (empty)" in caught.value.candidates


def test_a_managers_names_are_names_and_listed(version):
    graph, called = recorded(version, "quiet"), {"vda": "vd0", "vdz": "gone"}
    assert graph.device("vda", called).name == "vd0"
    for name in ("vdb", "vdz"):
        with pytest.raises(NotFoundError, match=f"no disk called {name}") as caught:
            graph.device(name, called)
        assert any(line.startswith("vda: vd0 (node d0") for line in caught.value.candidates)
        assert "cdx (empty)" in caught.value.candidates


def test_a_backing_file_is_not_a_disks_name(version):
    """Two disks may share it: writing to the one it happens to name would be a mistake."""
    with pytest.raises(NotFoundError):
        recorded(version, "quiet").device("base.raw")


def test_ambiguous_file_lists_the_disks(version):
    nodes = copy.deepcopy(RECORDINGS[version]["quiet"]["nodes"])
    for node in nodes:
        if node["file"] == "legacy.raw":
            node["file"] = "active.qcow2"
    with pytest.raises(AmbiguousError) as caught:
        recorded(version, "quiet", nodes=nodes).device("active.qcow2")
    assert len(caught.value.candidates) == 2


def test_empty_tray_is_refused(version):
    with pytest.raises(RequestError, match="empty"):
        recorded(version, "quiet").device("cdx")


def test_absolute_names_match_in_normal_form(version):
    nodes = copy.deepcopy(RECORDINGS[version]["quiet"]["nodes"])
    for node in nodes:
        if node["file"] == "legacy.raw":
            node["file"] = "/images/legacy.raw"
    graph = recorded(version, "quiet", nodes=nodes)
    assert graph.device("/images/../images/legacy.raw").name == "sd0"


@pytest.mark.parametrize("text", ["@1", "middle.qcow2"])
def test_layer_by_depth_and_by_file(version, text):
    assert recorded(version, "quiet").device("vd0").chain.layer(text).depth == 1


@pytest.mark.parametrize("text", ["@3", "@-1", "nosuch"])
def test_unknown_layer_lists_the_chain(version, text):
    with pytest.raises(NotFoundError) as caught:
        recorded(version, "quiet").device("vd0").chain.layer(text)
    assert len(caught.value.candidates) == 3


def test_layer_depth_must_be_a_number(version):
    with pytest.raises(RequestError, match="@N"):
        recorded(version, "quiet").device("vd0").chain.layer("@top")


def test_job_filters_on_top_are_found(version):
    """query-block skips them; a backup's is named even there (F8)."""
    graph = recorded(version, "jobs")
    assert [n.driver for n in graph.device("sd0").chain.filters] == ["mirror_top"]
    assert [n.driver for n in graph.device("df").chain.filters] == ["copy-before-write"]
    # An active commit is a mirror inside QEMU; its filter is under the user's own.
    drivers = [n.driver for n in graph.device("vd0").chain.filters]
    assert drivers[:2] == ["copy-on-read", "throttle"]
    assert drivers[2] in ("mirror_top", "commit_top")
    assert graph.device("vd0").chain.active.node.name == "d0"


def test_jobs_are_told_by_disk(version):
    graph = recorded(version, "jobs")
    ids = {device.name: [job.id for job in device.jobs] for device in graph.devices}
    assert ids["sd0"] == ["m"]
    assert ids["vd0"] == ["c"]
    assert ids["nv0"] == []
    assert {job.type for job in graph.jobs} == {"mirror", "backup", "commit"}


def test_without_the_debug_graph_chains_are_the_same(version):
    """x-debug-query-block-graph is unstable; what lies below the root must not need it."""
    whole = recorded(version, "quiet")
    stable = recorded(version, "quiet", debug_graph=None)
    for one, other in zip(whole.devices, stable.devices, strict=True):
        assert one.qom_path == other.qom_path
        if one.chain is not None:
            assert [x.node.name for x in one.chain.layers] == [
                x.node.name for x in other.chain.layers
            ]
            assert one.chain.root.name == other.chain.root.name
            assert [x.file for x in one.chain.layers] == [x.file for x in other.chain.layers]


def test_exports_are_told_by_disk(version):
    exports = [{"id": "e", "node-name": "d0", "type": "nbd", "shutting-down": False}]
    graph = recorded(version, "quiet", exports=exports)
    assert graph.device("vd0").exports == ("e",)
    assert graph.device("sd0").exports == ()


def node(name, driver, size=1 << 20, *children, **more):
    return {
        "node-name": name,
        "drv": driver,
        "file": f"/i/{name}",
        "ro": False,
        "image": {"virtual-size": size, "filename": f"/i/{name}", **more},
        "children": [{"child": c, "node-name": n} for c, n in children],
    }


def device(shown, **more):
    return {
        "device": "",
        "qdev": "vd0",
        "removable": False,
        "inserted": {"node-name": shown},
    } | more


def made(nodes, shown="n0", **changes):
    whole = {"block": [device(shown)], "nodes": nodes, "stats": [], "jobs": [], "exports": []}
    return build(Replies(**(whole | changes)))


def test_a_filter_inside_the_chain_counts_as_a_level():
    """Allocation depth counts it: depth 2 is the filter, and shows what n1 holds."""
    graph = made(
        [
            node("n0", "qcow2", 4096, ("backing", "c")),
            node("c", "commit_top", 4096, ("backing", "n1")),
            node("n1", "qcow2", 4096, ("backing", "n2")),
            node("n2", "raw", 2048),
        ]
    )
    chain = graph.device("vd0").chain
    assert chain.levels == (0, 1, 1, 2)
    assert chain.level_sizes == (4096, 4096, 4096, 2048)


def test_a_chain_of_150_layers_is_linear():
    nodes = [node(f"n{i}", "qcow2", 1 << 20, ("backing", f"n{i + 1}")) for i in range(2000)]
    chain = made([*nodes, node("n2000", "raw")]).device("vd0").chain
    assert len(chain.layers) == 2001


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([node("n0", "qcow2", 1, ("backing", "n0"))], "cycle"),
        (
            [node("n0", "throttle", 1, ("file", "n1")), node("n1", "throttle", 1, ("file", "n0"))],
            "cycle",
        ),
        (
            [node("n0", "qcow2", 1, ("file", "n1")), node("n1", "throttle", 1, ("file", "n1"))],
            "cycle",
        ),
        ([node("n0", "qcow2", 1, ("backing", "gone"))], "does not list"),
        ([node("other", "qcow2")], "does not list"),
        ([node("n0", "throttle")], "no child"),
        ([node("n0", "qcow2", -1)], "size"),
        ([node("n0", "qcow2", True)], "size"),
        ([node("n0", "qcow2", 1 << 63)], "size"),
        ([{"node-name": "n0"}], "no sense"),
        ("nonsense", "list"),
        ([5], "object"),
        ([node(7, "qcow2")], "node-name"),
    ],
)
def test_nonsense_is_one_clear_error(nodes, words):
    with pytest.raises(GraphError, match=words):
        made(nodes)


# what chain jobs ask of a graph


def test_bitmaps_of_a_node():
    """Jobs have bitmaps without a name: nobody's business."""
    described = {"granularity": 65536, "recording": True, "busy": False, "persistent": True}
    n0 = node("n0", "qcow2") | {
        "dirty-bitmaps": [
            {"name": "a", **described},
            {"name": "old", **described, "recording": False, "inconsistent": True},
            {"name": "used", **described, "busy": True, "persistent": False},
            {**described},
        ]
    }
    assert made([n0]).nodes["n0"].bitmaps == (
        Bitmap("a", 65536, True, True),
        Bitmap("old", 65536, False, True, inconsistent=True),
        Bitmap("used", 65536, True, False, busy=True),
    )
    assert made([node("n0", "qcow2")]).nodes["n0"].bitmaps == ()


@pytest.mark.parametrize(
    "bitmaps", [5, [5], [{"name": "a"}], [{"name": "a", "granularity": "x", "recording": True}]]
)
def test_bitmaps_that_make_no_sense(bitmaps):
    with pytest.raises(GraphError):
        made([node("n0", "qcow2") | {"dirty-bitmaps": bitmaps}])


def used():
    return made(
        [
            node("n0", "qcow2", 1, ("file", "f0"), ("backing", "n1")),
            node("f0", "file"),
            node("n1", "qcow2", 1, ("file", "f1")),
            node("f1", "file"),
            node("later", "qcow2", 1, ("backing", "n1")),
        ],
        exports=[{"id": "e\x1b", "node-name": "n1"}],
        jobs=[{"id": "j", "type": "backup", "status": "running"}],
        debug_graph={
            "nodes": [
                {"id": 1, "type": "block-job", "name": "j"},
                {"id": 2, "type": "block-driver", "name": "n1"},
            ],
            "edges": [{"parent": 1, "child": 2, "name": "main node"}],
        },
    )


def test_parents():
    graph = used()
    assert graph.parents("n1") == ("later", "n0")
    assert graph.parents("f0") == ("n0",)
    assert graph.parents("n0") == ()
    assert graph.parents("nosuch") == ()


def test_users_of_every_kind():
    """A node with one is never deleted."""
    graph = used()
    assert graph.users("n1") == ("export e\\x1b", "job j", "node later", "node n0")
    assert graph.users("n0") == ("device vd0 (node n0, file /i/n0)",)
    assert graph.users("later") == ()


def test_the_device_uses_its_filter_and_the_filter_the_image():
    graph = made([node("t", "throttle", 1, ("file", "n0")), node("n0", "qcow2")], shown="t")
    assert graph.users("n0") == ("node t",)
    assert [user.split()[0] for user in graph.users("t")] == ["device"]


def test_a_job_by_its_id(version):
    graph = recorded(version, "jobs")
    assert graph.job("c").type == "commit"
    assert graph.job("nosuch") is None
    assert not graph.job("c").ours
    jobs = [{"id": "qmpblock-deadbeef-stream", "type": "stream", "status": "running"}]
    assert recorded(version, "quiet", jobs=jobs).jobs[0].ours


def test_nodes_of_recorded_jobs_have_users(version):
    graph = recorded(version, "jobs")
    working = [(job.id, name) for job in graph.jobs for name in job.nodes]
    assert len(working) >= 3
    for job, name in working:
        assert f"job {job}" in graph.users(name)


def test_a_hostile_name_is_escaped():
    graph = made([node("n0", "qcow2")])
    with pytest.raises(NotFoundError) as caught:
        graph.device("\x1b[2J")
    assert "\x1b" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def mutate(data, value):
    """Replace one value somewhere in a reply by another."""
    spots = []

    def walk(container):
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, item in items:
            spots.append((container, key))
            if isinstance(item, dict | list):
                walk(item)

    walk(value)
    container, key = spots[data.draw(st.integers(0, len(spots) - 1))]
    container[key] = data.draw(json_values)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    version=st.sampled_from(sorted(RECORDINGS)),
    moment=st.sampled_from(["quiet", "jobs"]),
)
def test_mutated_replies_give_a_graph_or_an_error_of_ours(data, version, moment):
    replies = copy.deepcopy(RECORDINGS[version][moment])
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(data, replies)
    try:
        graph = build(Replies(**{k: replies[k] for k in RECORDINGS[version][moment]}))
        graph.device("vd0")
    except Error:
        pass


@given(
    st.fixed_dictionaries(
        dict.fromkeys(("block", "nodes", "stats", "jobs", "exports", "debug_graph"), json_values)
    )
)
def test_arbitrary_replies_give_a_graph_or_an_error_of_ours(replies):
    with contextlib.suppress(GraphError):
        build(Replies(**replies))


def test_a_layer_seen_through_a_view_is_veiled():
    """QEMU's depths end at a snapshot-access node below the active layer."""
    seen = drawing.chain("d0", "d1").filter("f", "copy-before-write", "d0")
    seen.filter("v", "snapshot-access", "f").image("t", backing="v").device("t")
    [device] = seen.graph().devices
    assert device.chain.veiled
    assert [layer.node.name for layer in device.chain.layers] == ["t", "d0", "d1"]
    above = drawing.chain("d0").filter("v", "snapshot-access", "d0").device("v")
    assert not above.graph().devices[0].chain.veiled


def built(nodes, devices=("vd0",), **more):
    block = [{"device": "", "qdev": one, "inserted": {"node-name": "0"}} for one in devices]
    return build(
        Replies(**({"block": block, "nodes": nodes, "stats": [], "jobs": [], "exports": []} | more))
    )


def line(count, edge, driver="qcow2"):
    """Nodes 0, 1, 2, ... of which each has the next as a child."""
    nodes = [node(str(n), driver) for n in range(count)]
    for n, one in enumerate(nodes):
        more = [{"child": edge, "node-name": str(n + 1)}] if n + 1 < count else []
        one["children"] = more
    return nodes


@pytest.mark.parametrize(
    ("replies", "words"),
    [
        ({"nodes": line(20_001, "backing")}, "20001 where there can be 20000"),
        ({"nodes": line(2, "file"), "devices": ["a"] * 4001}, "4001 where"),
        ({"nodes": line(2, "file"), "jobs": [{}] * 4001}, "4001 where"),
        ({"nodes": line(2, "file"), "exports": [{}] * 4001}, "4001 where"),
        ({"nodes": line(2, "file") + line(1, "file")}, "lists the node 0 twice"),
    ],
)
def test_more_than_any_qemu_has_is_refused(replies, words):
    with pytest.raises(GraphError, match=words):
        built(**replies)


def test_a_node_of_too_many_children_is_refused():
    nodes = line(2, "file")
    nodes[0]["children"] *= 257
    with pytest.raises(GraphError, match="257 children"):
        built(nodes)


def test_the_largest_graph_takes_seconds():
    devices = [f"vd{n}" for n in range(4000)]
    begun = time.process_time()
    graph = built(line(20_000, "backing"), devices)
    assert len(graph.device("vd3999").chain.layers) == 20_000
    assert graph.parents("19999") == ("19998",)
    assert time.process_time() - begun < 20


def test_a_long_way_down_to_the_file_is_refused():
    """Compared each with each, its nodes took hours."""
    with pytest.raises(GraphError, match="more than 64 nodes lie below"):
        built(line(20_000, "file", "raw"))


def test_chains_that_meet_below_are_walked_so_often_and_no_more(monkeypatch):
    monkeypatch.setattr("qmpblock.graph.builder._MOST_STEPS", 2000)
    nodes = line(190, "backing")
    nodes += [node(f"top{n}", "qcow2") for n in range(20)]
    for one in nodes[190:]:
        one["children"] = [{"child": "backing", "node-name": "0"}]
    block = [{"qdev": f"vd{n}", "inserted": {"node-name": f"top{n}"}} for n in range(20)]
    with pytest.raises(GraphError, match="all chains together"):
        built(nodes, block=block)
