"""What is told of files that a VM has open. Found by real processes: test_openfiles.py."""

import os
from pathlib import Path

from qmpblock.graph.model import Node
from qmpblock.graph.places import FileId, Missing, Place, known

NODE = Node("f", "file", "/i/disk", 512, False)


def test_all_names_of_a_file_are_one(tmp_path):
    file, other = tmp_path / "a", tmp_path / "b"
    file.touch()
    other.touch()
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "hard").hardlink_to(file)
    found = {FileId.of((tmp_path / name).stat()) for name in ("a", "link", "hard")}
    assert len(found) == 1
    assert FileId.of(other.stat()) not in found
    assert not FileId.of(file.stat()).is_device


def test_a_block_device_is_its_number():
    status = list(Path("/").stat())
    status[0] = 0o060660  # S_IFBLK
    one, two = (os.stat_result(status, {"st_rdev": number}) for number in (0x700, 0x701))
    assert FileId.of(one).is_device
    assert FileId.of(one) == FileId(0x700, None)
    assert FileId.of(one) != FileId.of(two)


def test_what_is_no_image():
    assert FileId.of(Path("/").stat()) is None
    assert FileId.of(Path("/dev/null").stat()) is None


def test_only_a_place_is_known():
    place = Place(FileId(1, 2), "/i/disk", "/i/disk", "/i/disk")
    assert known({"f": place}, NODE) is place
    assert known({"f": Missing("is gone")}, NODE) is None
    assert known({}, NODE) is None
    assert known({"f": place}, None) is None
