"""The Linux guest's boot files: what is read from packages, and what is packed."""

from __future__ import annotations

import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from qmpblock.testing import linux_image
from qmpblock.testing.linux_image import (
    INIT,
    LinuxUnavailableError,
    build,
    cpio,
    dependencies,
    initramfs,
    kernel_of,
)


def test_the_kernel_is_read_from_the_metapackage() -> None:
    depends = (
        "linux-image-cloud-amd64\n"
        "  Depends: linux-image-6.1.0-56-cloud-amd64\n"
        "    linux-image-6.1.0-56-cloud-amd64-unsigned\n"
    )
    assert kernel_of(depends) == "linux-image-6.1.0-56-cloud-amd64"
    assert kernel_of("linux-image-cloud-amd64\n") is None


@pytest.mark.parametrize(
    ("info", "names"),
    [
        (b"\0license=GPL\0depends=virtio,virtio-ring\0retpoline=Y\0", ["virtio", "virtio_ring"]),
        (b"\0depends=\0", []),
        (b"ELF", []),
    ],
)
def test_dependencies_of_a_module(info: bytes, names: list[str]) -> None:
    assert dependencies(info) == names


def entries(archive: bytes) -> list[tuple[str, int, bytes]]:
    """Unpack a newc archive by its definition: name, mode, content."""
    found = []
    offset = 0
    while True:
        assert archive[offset : offset + 6] == b"070701"
        fields = [int(archive[offset + 6 + 8 * i : offset + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[offset + 110 : offset + 110 + name_size - 1].decode()
        start = (offset + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found.append((name, mode, archive[start : start + size]))
        offset = (start + size + 3) & ~3


def test_an_archive_has_all_in_order() -> None:
    contents = {"a/b": b"12345", "c": b"", "longer/name": b"1234"}
    assert entries(cpio(["a", "longer"], contents)) == [
        ("a", 0o040755, b""),
        ("longer", 0o040755, b""),
        ("a/b", 0o100755, b"12345"),
        ("c", 0o100755, b""),
        ("longer/name", 0o100755, b"1234"),
        ("dev/console", 0o020600, b""),
    ]


def test_the_root_file_system_loads_its_modules_in_their_order() -> None:
    packed = {
        name: content for name, _, content in entries(initramfs(b"busy", {"z": b"1", "a": b"2"}))
    }
    assert packed["bin/busybox"] == b"busy"
    assert packed["modules/order"] == b"z.ko\na.ko\n"
    assert (packed["modules/z.ko"], packed["modules/a.ko"]) == (b"1", b"2")
    assert b"tail -c 65536 " in packed["init"]


def test_init_is_shell() -> None:
    subprocess.run(["sh", "-n"], input=INIT, text=True, check=True)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for apt: unpack a kernel, three modules and a busybox."""

    def unpack(*names: str, folder: Path, root: Path) -> None:
        assert names == ("linux-image-9-cloud-amd64", "busybox-static")
        modules = root / "lib/modules/9/kernel/drivers"
        modules.mkdir(parents=True)
        (modules / "virtio_blk.ko").write_bytes(b"blk\0depends=virtio-ring\0")
        (modules / "virtio-ring.ko.xz").write_bytes(lzma.compress(b"ring\0depends=\0"))
        (modules / "other.ko").write_bytes(b"other")
        for path, content in (("boot/vmlinuz-9", b"kernel"), ("bin/busybox", b"busy")):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)

    monkeypatch.setattr(linux_image, "_unpack", unpack)
    monkeypatch.setattr(linux_image, "_kernel_package", lambda: "linux-image-9-cloud-amd64")


@pytest.mark.usefixtures("packages")
def test_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boot = build(tmp_path)
    assert boot.kernel.read_bytes() == b"kernel"
    packed = {name: content for name, _, content in entries(boot.initrd.read_bytes())}
    assert packed["modules/order"] == b"virtio_ring.ko\nvirtio_blk.ko\n"
    assert packed["modules/virtio_ring.ko"].startswith(b"ring")
    assert [path.name for path in tmp_path.iterdir()] == [boot.kernel.parent.name]

    monkeypatch.setattr(linux_image, "_unpack", None)  # what is there needs no package
    assert build(tmp_path) == boot
    monkeypatch.setattr(linux_image, "MODULES", ("virtio_pci",))
    with pytest.raises(TypeError):  # another recipe does
        build(tmp_path)


@pytest.mark.usefixtures("packages")
def test_a_package_that_lacks_something_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = linux_image._unpack

    def lacking(*names: str, folder: Path, root: Path) -> None:
        whole(*names, folder=folder, root=root)
        shutil.rmtree(root / "bin")

    monkeypatch.setattr(linux_image, "_unpack", lacking)
    with pytest.raises(LinuxUnavailableError, match="hold 0 files bin/busybox or usr/bin/busybox"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_apt_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    apt = programs / "apt-cache"
    apt.write_text("#!/bin/sh\necho 'E: no \x1b[31mlists' >&2\nexit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(LinuxUnavailableError, match=r"E: no \\x1b\[31mlists") as caught:
        build(tmp_path / "cache")
    assert "apt-get update" in str(caught.value)
    apt.write_text("#!/bin/sh\n")
    with pytest.raises(LinuxUnavailableError, match="apt knows no package linux-image-cloud"):
        build(tmp_path / "cache")
