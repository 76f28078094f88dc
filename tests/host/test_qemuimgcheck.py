"""Images that a QEMU has left: sound, with clusters that nothing uses, damaged, another file."""

import os
import shutil
import struct
import subprocess

import pytest

from qmpblock.errors import InUseError, ToolError, UnsupportedError
from qmpblock.graph.places import FileId
from qmpblock.host.qemuimg import Key
from qmpblock.host.qemuimgcheck import QemuImgCheck
from qmpblock.luks import retried
from qmpblock.testing.images import Tools, find_qemu

CLUSTER = 64 << 10


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "i.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "4M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 128K", str(path)], check=True)
    return path


def refcounts(path, count):
    """Have the header's first refcount block count clusters as used, from the first free on."""
    data = bytearray(path.read_bytes())
    table = struct.unpack_from(">Q", data, 48)[0]
    block = struct.unpack_from(">Q", data, table)[0]
    first = len(data) // CLUSTER
    for number in range(first, first + count):
        struct.pack_into(">H", data, block + 2 * number, 1)
    path.write_bytes(data + bytes(count * CLUSTER))


def checked(path):
    found = subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=False)
    return found.returncode


async def free(path):
    await QemuImgCheck().free_leaks(str(path), "qcow2", FileId.of(os.stat(path)))


async def test_a_sound_one_stays_as_it_is(image):
    before = image.read_bytes()
    await free(image)
    assert image.read_bytes() == before


async def test_what_nothing_uses_is_given_back(image):
    refcounts(image, 3)
    assert checked(image) == 3
    await free(image)
    assert checked(image) == 0


async def test_what_nothing_uses_of_an_encrypted_one_is_given_back(tmp_path):
    path = tmp_path / "i.qcow2"
    key = ("--object", "secret,id=k,data=sesame")
    luks = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10"
    options = f"{luks},cluster_size={CLUSTER}"
    make = ["qemu-img", "create", *key, "-q", "-f", "qcow2", "-o", options, str(path), "4M"]
    await retried(lambda: Tools.of(find_qemu()).run(*make))
    refcounts(path, 3)
    name = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=k,file.filename={path}"
    look = ["qemu-img", "check", *key, "-q", "--image-opts", name]
    assert subprocess.run(look, check=False).returncode == 3
    file = FileId.of(os.stat(path))
    with pytest.raises(ToolError):
        await QemuImgCheck().free_leaks(str(path), "qcow2", file, [Key(b"wrong")])
    assert subprocess.run(look, check=False).returncode == 3
    await QemuImgCheck().free_leaks(str(path), "qcow2", file, [Key(b"sesame")])
    assert subprocess.run(look, check=False).returncode == 0


async def test_a_damaged_one_is_not_touched(image):
    data = bytearray(image.read_bytes())
    table = struct.unpack_from(">Q", data, 48)[0]
    block = struct.unpack_from(">Q", data, table)[0]
    struct.pack_into(">H", data, block + 2 * 5, 0)  # data that counts as free
    image.write_bytes(data)
    with pytest.raises(ToolError, match="refcount=0 reference=1") as caught:
        await free(image)
    assert "copy anew" in caught.value.remedy
    assert image.read_bytes() == data


async def test_another_file_is_not_touched(image, tmp_path):
    other = tmp_path / "other"
    shutil.copy(image, other)
    with pytest.raises(UnsupportedError, match="another file"):
        await QemuImgCheck().free_leaks(str(image), "qcow2", FileId.of(os.stat(other)))


async def test_one_that_a_qemu_has_open_is_not_touched(image):
    before = image.read_bytes()
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdin.write(b"read 0 1\n")
        other.stdin.flush()
        assert other.stdout.readline()
        with pytest.raises(InUseError):
            await free(image)
        other.stdin.close()
    assert image.read_bytes() == before
