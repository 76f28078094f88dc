"""What a copy goes on from: only what it could have made itself, and in nobody's use."""

import os
import struct
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qmpblock.copying.partialfile import find_partial, wrong_header
from qmpblock.copying.plan import CopyPlan
from qmpblock.errors import InUseError, RequestError
from qmpblock.graph.places import FileId
from qmpblock.host.ourfiles import Directory

MIB = 1 << 20


def plan(directory, fmt="qcow2", size=MIB, **more):
    chain = SimpleNamespace(active=SimpleNamespace(size=size))
    device = SimpleNamespace(name="vd0", chain=chain)
    return CopyPlan(device, str(directory / "copy"), fmt, **more)


def image(path, *options, size="1M"):
    """Have qemu-img make a qcow2 image, as QEMU would; return its first cluster."""
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size], check=True
    )
    return path.read_bytes()[: 64 << 10]


def found(directory, its, backing_name=None):
    with Directory(directory) as opened:
        return find_partial(opened, its, backing_name)


def test_where_there_is_nothing_it_begins_anew(tmp_path):
    assert found(tmp_path, plan(tmp_path)) is None


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_one_of_its_size_and_format_is_found(tmp_path, fmt):
    partial = tmp_path / "copy.partial"
    if fmt == "raw":
        partial.write_bytes(bytes(MIB))
    else:
        image(partial)
    assert found(tmp_path, plan(tmp_path, fmt)) == FileId.of(os.stat(partial))


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_one_of_another_size_is_refused(tmp_path, fmt):
    partial = tmp_path / "copy.partial"
    image(partial, size="2M") if fmt == "qcow2" else partial.write_bytes(bytes(2 * MIB))
    with pytest.raises(RequestError, match="of 2097152 bytes, and the disk of 1048576") as caught:
        found(tmp_path, plan(tmp_path, fmt))
    assert caught.value.standing == "nothing was touched"


def test_another_format_is_refused(tmp_path):
    (tmp_path / "copy.partial").write_bytes(bytes(MIB))
    with pytest.raises(RequestError, match="no qcow2 image") as caught:
        found(tmp_path, plan(tmp_path))
    assert "--format" in caught.value.remedy


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_no_plain_file_is_refused(tmp_path, kind):
    partial = tmp_path / "copy.partial"
    if kind == "link":
        image(tmp_path / "elsewhere")
        partial.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(partial)
    else:
        partial.mkdir()
    with pytest.raises(RequestError, match="no regular file"):
        found(tmp_path, plan(tmp_path))


def test_one_that_somebody_writes_to_is_refused(tmp_path):
    partial = tmp_path / "copy.partial"
    image(partial)
    with partial.open("r+b"), pytest.raises(InUseError, match="in use") as caught:
        found(tmp_path, plan(tmp_path))
    assert "wait for the copy" in caught.value.remedy


def test_the_backing_image_must_be_the_one_that_it_is_to_lie_on(tmp_path):
    image(tmp_path / "base")
    options = ("-b", "base", "-F", "qcow2")
    head = image(tmp_path / "top", *options)
    assert wrong_header(head, MIB, "base", encrypted=False) is None
    assert "names is base" in wrong_header(head, MIB, None, encrypted=False)
    assert "names is base" in wrong_header(head, MIB, "other", encrypted=False)
    assert "names is none" in wrong_header(image(tmp_path / "i"), MIB, "base", encrypted=False)


def test_the_plan_says_which_backing_image_where_no_name_is_given(tmp_path):
    base = SimpleNamespace(file=str(tmp_path / "base"), format="qcow2")
    image(tmp_path / "base")
    image(tmp_path / "copy.partial", "-b", base.file, "-F", "qcow2")
    its = plan(tmp_path, backing=base)
    assert found(tmp_path, its) is not None
    with pytest.raises(RequestError, match="backing image that it names"):
        found(tmp_path, its, "otherwise")
    with pytest.raises(RequestError, match="--layers"):
        found(tmp_path, replace(its, backing=None))


def test_a_data_file_which_qemu_would_write_to_is_refused(tmp_path):
    head = image(tmp_path / "i", "-o", f"data_file={tmp_path / 'data'}")
    assert "does not make" in wrong_header(head, MIB, None, encrypted=False)


def test_snapshots_other_versions_and_damage_are_refused(tmp_path):
    head = image(tmp_path / "i")
    assert wrong_header(head, MIB, None, encrypted=False) is None
    older = image(tmp_path / "old", "-o", "compat=0.10")
    assert "does not make" in wrong_header(older, MIB, None, encrypted=False)
    for at, form, value in ((60, ">I", 1), (72, ">Q", 2)):  # snapshots; the corrupt bit
        damaged = bytearray(head)
        struct.pack_into(form, damaged, at, value)
        assert "does not make" in wrong_header(bytes(damaged), MIB, None, encrypted=False)


def test_encryption_must_be_the_disks(tmp_path):
    plain = image(tmp_path / "i")
    luks = bytearray(plain)
    struct.pack_into(">I", luks, 32, 2)
    assert wrong_header(bytes(luks), MIB, None, encrypted=True) is None
    assert wrong_header(bytes(luks), MIB, None, encrypted=False) == "it is encrypted"
    assert "not encrypted" in wrong_header(plain, MIB, None, encrypted=True)
