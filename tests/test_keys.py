"""Which keys can be handed on, and which only QEMU has: recorded properties of objects."""

import os
from types import SimpleNamespace

import pytest

from qmpblock.address import TCPAddress, UnixAddress
from qmpblock.errors import CommandError, UnsupportedError
from qmpblock.keys import read_keys
from qmpblock.qemuimg import Key

PLAIN = {"type": "secret", "data": "", "file": "", "format": "raw", "keyid": "", "iv": ""}


def monitor(address=None, pid=None, **objects):
    async def read_key(path, name):
        known = objects.get(path.rpartition("/")[2])
        if known is None:
            raise CommandError("qom-get", None, "DeviceNotFound", f"Device '{path}' not found")
        if name not in known:
            raise CommandError("qom-get", None, "GenericError", f"Property '{name}' not found")
        return known[name]

    where = address or UnixAddress("/run/vm")
    return SimpleNamespace(address=where, peer_pid=pid or os.getpid(), read_key=read_key)


async def test_a_chain_of_keys_comes_lowest_first(tmp_path):
    (tmp_path / "master").write_bytes(b"bWFzdGVy\n")
    found = await read_keys(
        monitor(
            key=PLAIN | {"data": "ZGF0YQ==", "format": "base64", "keyid": "m", "iv": "aXY="},
            m=PLAIN | {"file": str(tmp_path / "master"), "format": "base64"},
        ),
        "key",
    )
    assert found == (Key(b"bWFzdGVy\n", "base64"), Key(b"ZGF0YQ==", "base64", "aXY="))
    assert "ZGF0" not in repr(found)


async def test_a_relative_file_is_qemus(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("sesame")
    monkeypatch.chdir(tmp_path)  # this process stands for QEMU here
    found = await read_keys(monitor(key=PLAIN | {"file": "key"}), "key")
    assert found == (Key(b"sesame"),)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ({"type": "secret_keyring", "serial": "5"}, "only QEMU itself can read"),
        ({"file": "/no/such/file"}, "No such file"),
        ({"file": "/dev/fd/11"}, "open file of QEMU's own"),
        ({"file": "/dev/stdin"}, "open file of QEMU's own"),
        ({"file": "/proc/self/fd/11"}, "open file of QEMU's own"),
        ({"file": "/dev/null"}, "no regular file"),
        ({"format": "raw,file=/etc/passwd"}, "cannot be told"),
        ({"iv": "x,file=/etc/passwd"}, "cannot be told"),
        ({"keyid": "other"}, "does not tell the key other"),
        ({"keyid": "key"}, "more than 8"),
    ],
)
async def test_what_cannot_be_handed_on(key, why):
    with pytest.raises(UnsupportedError, match=why) as refused:
        await read_keys(monitor(key=PLAIN | {"data": "sesame"} | key), "key")
    assert "sesame" not in str(refused.value)


async def test_what_has_no_such_properties():
    with pytest.raises(UnsupportedError, match="does not tell"):
        await read_keys(monitor(key={"type": "secret"}), "key")


async def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "key")
    with pytest.raises(UnsupportedError, match="no regular file"):
        await read_keys(monitor(key=PLAIN | {"file": str(tmp_path / "key")}), "key")


async def test_a_huge_file_is_no_key(tmp_path):
    with (tmp_path / "key").open("wb") as file:
        file.truncate(2 << 20)
    with pytest.raises(UnsupportedError, match="more than"):
        await read_keys(monitor(key=PLAIN | {"file": str(tmp_path / "key")}), "key")


async def test_no_key_crosses_a_network():
    known = PLAIN | {"data": "sesame"}
    assert await read_keys(monitor(TCPAddress("127.0.0.1", 4444), key=known), "key")
    with pytest.raises(UnsupportedError, match="in the clear"):
        await read_keys(monitor(TCPAddress("vm-host.example", 4444), key=known), "key")
