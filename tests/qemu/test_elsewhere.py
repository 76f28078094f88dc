"""Disks that another process serves, in a fake VM. Real ones: live/test_elsewhere.py."""

import pytest
from drawing import chain
from fake_objects import fake_vm

from qmpblock.errors import NotFoundError, UnsupportedError
from qmpblock.qemu.elsewhere import ServedDisk, check_served_here, disks_served_elsewhere, socket_of

COMMAND = ("qemu", "-chardev", "socket,id=vu,path=/run/a,,b,server=off", "-chardev", "null,id=x")


@pytest.mark.parametrize(
    ("label", "filename", "socket"),
    [
        ("vu", "unix:/run/spdk,server=on", "/run/spdk"),
        ("vu", "unix:", "/run/a,b"),  # 7.2 leaves the path of a client's out
        ("x", "unix:", None),
        ("added later", "unix:", None),
        ("", "", None),
    ],
)
def test_the_socket_of_a_chardev(label, filename, socket):
    assert socket_of(label, {label: filename}, COMMAND) == socket


def test_who_serves_it():
    assert "/run/spdk" in ServedDisk("a", "/x/a", "vhost-user-blk-pci", "/run/spdk").where()
    assert "kernel" in ServedDisk(None, "/x/a", "vhost-scsi-pci", None).where()
    assert "\x1b" not in ServedDisk("a", "/x/a", "vhost-user-blk", "/\x1b").where()


async def test_they_are_found_among_the_devices(tmp_path):
    async with fake_vm(tmp_path / "q", chain("d0").device("d0")) as (vm, qemu):
        plain = qemu.get

        def get(command, default=None):
            arguments = qemu.fake.seen[-1].get("arguments", {})
            if command == "qom-list":
                anonymous = arguments["path"].endswith("-anon")
                kind = "vhost-scsi-pci" if anonymous else "vhost-user-blk-pci"
                name = "device[3]" if anonymous else "vu0"
                others = [{"name": "vd0", "type": "child<virtio-blk-pci>"}]
                return {"return": [{"name": name, "type": f"child<{kind}>"}, *others]}
            if command == "qom-get" and arguments["path"].endswith("vu0"):
                return {"return": "c0"}
            if command == "query-chardev":
                return {"return": [{"label": "c0", "filename": "unix:/run/spdk"}]}
            return plain(command, default)

        qemu.get = get
        assert await disks_served_elsewhere(vm.monitor) == (
            ServedDisk("vu0", "/machine/peripheral/vu0", "vhost-user-blk-pci", "/run/spdk"),
            ServedDisk(None, "/machine/peripheral-anon/device[3]", "vhost-scsi-pci", None),
        )
        await check_served_here(vm.monitor, "vd7")
        with pytest.raises(UnsupportedError, match="the process behind /run/spdk"):
            await vm.disk("vu0")
        with pytest.raises(NotFoundError):
            await vm.disk("vd7")


async def test_a_storage_daemon_is_no_vm(tmp_path):
    with pytest.raises(UnsupportedError, match="storage daemon"):
        async with fake_vm(
            tmp_path / "q",
            chain("d0"),
            **{"query-status": {"error": {"class": "CommandNotFound", "desc": "not found"}}},
        ):
            raise AssertionError("connected")
