"""What qemu-img is told is what a create job would be told; and who makes an image."""

from types import SimpleNamespace

import pytest

from qmpblock.address import TCPAddress, UnixAddress
from qmpblock.chains import headers
from qmpblock.chains.headers import Header, by_qemu_img
from qmpblock.errors import UnsupportedError
from qmpblock.qemu.capabilities import Capabilities
from qmpblock.qemu.connection import NBDAccess

OLD, NEW = (7, 2, 22), (11, 1, 3)


def vm(version, address=None):
    monitor = SimpleNamespace(
        address=address or UnixAddress("/run/vm"), version=version, can_pass_fds=address is None
    )
    return SimpleNamespace(capabilities=Capabilities(version), monitor=monitor, nbd=NBDAccess())


def test_no_option_is_left_to_a_versions_default():
    options = Header("qcow2", 1 << 20).options("")
    assert options == {
        "cluster_size": 65536,
        "compat": "1.1",
        "lazy_refcounts": "off",
        "refcount_bits": 16,
        "extended_l2": "off",
        "compression_type": "zlib",
    }


def test_qed_knows_only_clusters():
    assert Header("qed", 1 << 20, cluster=4096).options("") == {"cluster_size": 4096}


def test_an_encrypted_image_names_the_key_that_the_tool_has():
    header = Header("qcow2", 1 << 20, key_secret="disk")
    options = header.options("key1")
    assert options["encrypt.format"] == "luks"
    assert options["encrypt.key-secret"] == "key1"
    assert header.job("f")["encrypt"] == {"format": "luks", "key-secret": "disk"}


def test_a_create_job_is_told_the_same():
    assert Header("qcow2", 1 << 20, ("base", "raw"), 4096).job("f") == {
        "driver": "qcow2",
        "file": "f",
        "size": 1 << 20,
        "cluster-size": 4096,
        "backing-file": "base",
        "backing-fmt": "raw",
    }
    assert "backing-file" not in Header("qed", 512).job("f")


@pytest.fixture
def no_tool(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setattr(headers.shutil, "which", lambda name: f"/bin/{name}")


async def test_qemu_img_makes_what_is_here(tool):
    assert await by_qemu_img(vm(OLD), None, local=True)
    assert await by_qemu_img(vm(NEW), None, local=True)


async def test_without_qemu_img_a_safe_qemu_does_it_and_another_is_refused(no_tool):
    assert not await by_qemu_img(vm(NEW), None, local=True)
    with pytest.raises(UnsupportedError, match="no qemu-img") as refused:
        await by_qemu_img(vm(OLD), None, local=True)
    assert refused.value.exit_code == 2
    assert refused.value.standing == "nothing was touched"
    assert "qemu-utils" in refused.value.remedy
    assert "10.0" in refused.value.remedy


async def test_on_another_host_a_safe_qemu_does_it(no_tool):
    far = TCPAddress("vm-host.example", 4444)
    assert not await by_qemu_img(vm(NEW, far), None, local=False)
