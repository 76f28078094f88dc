"""Files of a VM on this host: which they are."""

import os

from qmpblock.graph.model import Layer, Node
from qmpblock.host.imagefiles import home_of, local_path

MIB = 1 << 20


def layer(filename, driver="file"):
    storage = Node("s", driver, str(filename), MIB, False)
    return Layer(0, Node("f", "raw", str(filename), MIB, False), storage)


def test_a_file_counts_only_while_that_process_has_it_open(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"x")
    assert local_path(os.getpid(), layer(path)) is None
    with path.open():
        assert local_path(os.getpid(), layer(path)) == str(path)
        path.rename(tmp_path / "moved")
        path.write_bytes(b"another file of the same name")
        assert local_path(os.getpid(), layer(path)) is None


def test_relative_names_are_the_processs_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image").write_bytes(b"x")
    with (tmp_path / "image").open():
        assert local_path(os.getpid(), layer("image")) == str(tmp_path / "image")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "image").write_bytes(b"y")
        with (tmp_path / "other" / "image").open():
            assert local_path(os.getpid(), layer("image")) is None
            assert local_path(os.getpid(), layer("./other/image")) is not None


def test_what_cannot_be_told_is_not_local(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"x")
    with path.open():
        assert local_path(None, layer(path)) is None
        assert local_path(1 << 30, layer(path)) is None
        assert local_path(os.getpid(), layer(path, "nbd")) is None
        assert local_path(os.getpid(), layer(tmp_path / "gone")) is None
        assert local_path(os.getpid(), layer("bad\0name")) is None
        assert local_path(os.getpid(), Layer(0, layer(path).node, None)) is None


def test_an_image_is_at_home_under_its_real_name(tmp_path):
    (tmp_path / "image").touch()
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "link").symlink_to("../image")
    assert home_of(str(tmp_path / "dir" / "link")) == str(tmp_path / "image")
    gone = str(tmp_path / "gone")
    assert home_of(gone) == gone
