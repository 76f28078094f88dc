"""The ssh to another host, where it does not come there. The rest: live/test_migrate_ssh.py."""

import pytest

from qmpblock.address import SSHAddress
from qmpblock.errors import ConnectError, RequestError
from qmpblock.host.forward import Forward

NOBODY = SSHAddress("127.0.0.1", "/run/vm.qmp", port=1)


async def test_nobody_answers(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ConnectError) as failed:
        await Forward.open(NOBODY)
    assert "Connection refused" in str(failed.value)
    assert "ssh -o BatchMode=yes -p 1 127.0.0.1 true" in str(failed.value)
    assert list(tmp_path.iterdir()) == []


async def test_there_is_no_ssh(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConnectError, match="there is no ssh in PATH"):
        await Forward.open(NOBODY)


async def test_no_room_for_sockets_beside_the_monitor():
    with pytest.raises(RequestError, match="longer than 107 bytes"):
        await Forward.open(SSHAddress("127.0.0.1", f"/{'x' * 90}/q", port=1))
