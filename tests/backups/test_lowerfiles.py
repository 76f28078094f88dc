"""Every file below a disk's active layer, as the graph has them and the host sees them."""

import os

from qmpblock.backups.lower import ELSEWHERE, SEEN, UNSEEN
from qmpblock.backups.lowerfiles import lower_files
from qmpblock.graph.model import BlockGraph, Chain, DiskDevice, Edge, Layer, Node
from qmpblock.graph.places import FileId, Missing, Place


class Files:
    """What a VM has open, by the names of nodes; `count`: descriptors of each."""

    def __init__(self, paths, missing=(), count=1):
        self.paths, self.missing, self.count = paths, dict(missing), count

    def places(self, nodes):
        found = dict(self.missing)
        for one in nodes:
            if one.name in self.paths:
                path = str(self.paths[one.name])
                found[one.name] = Place(FileId.of(os.stat(path)), path, path, path)
        return found

    def descriptors(self, file):
        return list(range(self.count))

    def status(self, file):
        every = [os.stat(path) for path in self.paths.values()]
        return next((one for one in every if FileId.of(one) == file), None)


def node(name, driver="file", children=(), **more):
    edges = tuple(Edge(edge, below) for edge, below in children)
    return Node(name, driver, f"/i/{name}", 4096, True, children=edges, **more)


def device(*nodes, storage=()):
    """Return a disk whose layers are these nodes, and the graph of it and of what they lie on."""
    below = {one.name: one for one in storage}
    layers = tuple(
        Layer(depth, one, below.get(one.child("file") or "")) for depth, one in enumerate(nodes)
    )
    chain = Chain((), layers, (), ())
    graph = BlockGraph({one.name: one for one in (*nodes, *storage)}, ())
    return graph, DiskDevice("vd0", None, "/machine/vd0", False, False, chain)


def test_all_that_a_layer_is_in(tmp_path):
    """Not the active one, nor what is above; of each one below the data file and extents, too."""
    storage = [node(name) for name in ("s0", "s1", "d1", "s2", "e0", "e1")]
    graph, disk = device(
        node("top", "qcow2", [("file", "s0"), ("backing", "middle")]),
        node("middle", "qcow2", [("backing", "base"), ("file", "s1"), ("data-file", "d1")]),
        node("base", "vmdk", [("extents.1", "e1"), ("file", "s2"), ("extents.0", "e0")]),
        storage=storage,
    )
    for one in storage:
        (tmp_path / one.name).write_bytes(b"x")
    paths = {one.name: tmp_path / one.name for one in storage}
    [found] = lower_files(graph, [disk], Files(paths))
    assert [one.file for one in found] == ["/i/d1", "/i/s1", "/i/e0", "/i/e1", "/i/s2"]
    assert [one.format for one in found] == ["qcow2", "qcow2", "vmdk", "vmdk", "vmdk"]
    status = paths["d1"].stat()
    first = found[0]
    assert (first.told, first.length, first.size) == (SEEN, 1, 4096)
    assert (first.modified, first.inode) == (status.st_mtime_ns, status.st_ino)


def test_a_part_of_a_file(tmp_path):
    part = 'json:{"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "/i/s"}}'
    base = Node("base", "raw", part, 4096, True, children=(Edge("file", "s"),))
    graph, disk = device(node("top", "qcow2"), base, storage=[node("s")])
    (tmp_path / "s").write_bytes(b"x")
    [[one]] = lower_files(graph, [disk], Files({"s": tmp_path / "s"}))
    assert (one.offset, one.file) == (512, "/i/s")


def test_what_cannot_be_seen():
    """Nor what is no file: nothing tells when a device was written to."""
    storage = [node(name) for name in ("away", "other", "device")]
    layers = [node(f"n{one.name}", "raw", [("file", one.name)]) for one in storage]
    alone = node("nbd", "nbd")
    graph, disk = device(node("top", "qcow2"), *layers, alone, storage=storage)
    missing = {
        "away": Missing("cannot be found from here"),
        "other": Missing("is another file now", certain=True),
        "device": Place(FileId(7, None), "/dev/x", "/dev/x", "/dev/x"),
        "nbd": Missing("is no file of this host (its driver is nbd)"),
    }
    [found] = lower_files(graph, [disk], Files({}, missing))
    assert [one.told for one in found] == [UNSEEN, ELSEWHERE, UNSEEN, UNSEEN]
    assert {(one.length, one.modified, one.inode) for one in found} == {(0, 0, 0)}


def test_a_file_to_which_another_name_leads_now(tmp_path):
    """By two nodes, of which QEMU opened one for it: which, nobody can tell."""
    graph, disk = device(
        node("top", "qcow2"),
        node("middle", "raw", [("file", "s0")]),
        node("base", "raw", [("file", "s1")]),
        storage=[node("s0"), node("s1")],
    )
    (tmp_path / "s").write_bytes(b"x")
    paths = dict.fromkeys(("s0", "s1"), tmp_path / "s")
    for count, told in ((1, ELSEWHERE), (2, SEEN)):
        [found] = lower_files(graph, [disk], Files(paths, count=count))
        assert [one.told for one in found] == [told, told]
