"""libvirt's daemon: what is read of what it says, and what is believed; the rest is live."""

import asyncio
import os
import subprocess
import sys

import pytest

from qmpblock.address import LibvirtAddress
from qmpblock.errors import ConnectError
from qmpblock.host.libvirtd import Domain, Teller
from qmpblock.qemu.monitor import Monitor

UUID = "ca569914-10a3-4b9e-8cdc-a951453e797e"


@pytest.fixture
def started():
    """A process that was started for the domain."""
    process = subprocess.Popen(
        [sys.executable, "-c", "input()", "-uuid", UUID], stdin=subprocess.PIPE
    )
    yield process
    process.kill()
    process.communicate()


async def process_of(socket):
    domain = Domain(LibvirtAddress("web", f"qemu+unix:///system?socket={socket}"), Teller())
    domain.name, domain.uuid = "web", UUID
    try:
        return domain.process()
    finally:
        domain.close()


@pytest.mark.parametrize("folder", ["qemu", "qemu/run"])
async def test_the_process_is_the_pid_files(tmp_path, started, folder):
    file = tmp_path / folder / "web.pid"
    file.parent.mkdir(parents=True)
    assert await process_of(tmp_path / "s") is None
    file.write_text(f"{started.pid}\n")
    found = await process_of(tmp_path / "s")
    assert (found.pid, found.known()) == (started.pid, started.pid)
    file.write_text("x")
    assert await process_of(tmp_path / "s") is None
    file.write_text(str(os.getpid()))  # not started for it: the number is another's by now
    assert await process_of(tmp_path / "s") is None
    file.write_text(str(1 << 30))
    assert await process_of(tmp_path / "s") is None


async def test_a_pid_that_another_can_have_written_is_not_believed(tmp_path, started):
    folder = tmp_path / "qemu"
    folder.mkdir()
    (folder / "web.pid").write_text(str(started.pid))
    folder.chmod(0o777)
    assert await process_of(tmp_path / "s") is None
    folder.chmod(0o1777)
    assert await process_of(tmp_path / "s") is not None
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
        assert await process_of(tmp_path / "s") is None
        os.chown(folder, 0, -1)
        (tmp_path / "link").symlink_to(tmp_path)
        assert await process_of(tmp_path / "link" / "s") is not None
        os.lchown(tmp_path / "link", 12345, -1)
        assert await process_of(tmp_path / "link" / "s") is None


async def test_without_the_binding_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(ConnectError, match="binding is not installed") as refused:
        async with asyncio.timeout(120):
            await Monitor.connect("libvirt:web")
    assert "python3-libvirt" in refused.value.remedy
    assert "qmpblock[libvirt]" in refused.value.remedy
    assert refused.value.exit_code == 3
